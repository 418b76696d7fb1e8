"""Published checkpoints of the field's codebases, by name. Imports neither torch nor numpy."""

from __future__ import annotations

from typing import NamedTuple

# codebase -> the arguments of `convert_checkpoint` that it needs without a published name
NEEDED: dict[str, tuple[str, ...]] = {
    "ho": ("process", "sample_size", "dropout"),
    "improved-diffusion": ("flags",),
    "guided-diffusion": ("flags",),
    "edm": ("process", "dropout"),
    "diffusers-unet": ("process",),
}
CODEBASES = tuple(NEEDED)


class HoSettings(NamedTuple):
    """Settings of a network of Ho et al.; all have T = 1000, beta 1e-4 to 0.02, and clip x_0."""

    widths: tuple[int, ...]  # which the weights say too
    sample_size: int
    dropout: float
    variance: str


class Published(NamedTuple):
    """A published file and the settings that its weights do not say."""

    codebase: str
    file: str
    settings: HoSettings | str  # a string: OpenAI's flags, verbatim


_CIFAR = HoSettings((128, 256, 256, 256), 32, 0.1, "fixed_large")
_LSUN = HoSettings((128, 128, 256, 256, 512, 512), 256, 0.0, "fixed_small")
_IMAGENET_64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
_CIFAR_10 = (
    "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
)
_COSINE_4000 = "--diffusion_steps 4000 --noise_schedule cosine"
_UNSCALED = " --rescale_learned_sigmas False --rescale_timesteps False"
_BEDROOM = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 "
    "--diffusion_steps 1000 --noise_schedule linear" + _UNSCALED
)
_ADM = (
    "--attention_resolutions 32,16,8 --class_cond {classes} --diffusion_steps 1000 {dropout}"
    "--image_size {size} --learn_sigma True --noise_schedule {schedule} --num_channels {width} "
    "{heads} --num_res_blocks {layers} --resblock_updown True {order}--use_fp16 {half} "
    "--use_scale_shift_norm True"
)


def _adm(
    size: int, classes: bool = True, heads: str = "--num_head_channels 64", **changes: str
) -> str:
    fields = dict(dropout="", schedule="linear", width="256", layers="2", order="", half="True")
    return _ADM.format(size=size, classes=classes, heads=heads, **(fields | changes))


_IMPROVED, _GUIDED = "improved-diffusion", "guided-diffusion"
PUBLISHED: dict[str, Published] = {
    "ho-cifar10": Published("ho", "ema_cifar10 or cifar10", _CIFAR),
    "ho-celebahq": Published("ho", "celebahq256", _LSUN),
    "ho-lsun-bedroom": Published("ho", "ema_lsun_bedroom or lsun_bedroom", _LSUN),
    "ho-lsun-cat": Published("ho", "ema_lsun_cat or lsun_cat", _LSUN),
    "ho-lsun-church": Published("ho", "ema_lsun_church or lsun_church", _LSUN),
    "iddpm-cifar10": Published(_IMPROVED, "cifar10_uncond_50M_500K.pt", _CIFAR_10 + _COSINE_4000),
    "iddpm-cifar10-vlb": Published(
        _IMPROVED, "cifar10_uncond_vlb_50M_500K.pt", _CIFAR_10 + _COSINE_4000 + " --use_kl True"
    ),
    "iddpm-imagenet64": Published(
        _IMPROVED, "imagenet64_uncond_100M_1500K.pt", _IMAGENET_64 + _COSINE_4000
    ),
    "iddpm-imagenet64-vlb": Published(
        _IMPROVED,
        "imagenet64_uncond_vlb_100M_1500K.pt",
        _IMAGENET_64 + _COSINE_4000 + " --use_kl True",
    ),
    "iddpm-imagenet64-cond": Published(
        _IMPROVED,
        "imagenet64_cond_270M_250K.pt",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True "
        "--class_cond True " + _COSINE_4000 + _UNSCALED,
    ),
    "iddpm-lsun-bedroom": Published(_IMPROVED, "lsun_uncond_100M_1200K_bs128.pt", _BEDROOM),
    "iddpm-lsun-bedroom-bs64": Published(_IMPROVED, "lsun_uncond_100M_2400K_bs64.pt", _BEDROOM),
    "adm-imagenet64": Published(
        _GUIDED,
        "64x64_diffusion.pt",
        _adm(64, dropout="--dropout 0.1 ", schedule="cosine", width="192", layers="3",
             order="--use_new_attention_order True "),
    ),
    "adm-imagenet128": Published(_GUIDED, "128x128_diffusion.pt", _adm(128, heads="--num_heads 4")),
    "adm-imagenet256": Published(_GUIDED, "256x256_diffusion.pt", _adm(256)),
    "adm-imagenet256-uncond": Published(
        _GUIDED, "256x256_diffusion_uncond.pt", _adm(256, classes=False)
    ),
    "adm-imagenet512": Published(_GUIDED, "512x512_diffusion.pt", _adm(512, half="False")),
    "adm-lsun-bedroom": Published(
        _GUIDED, "lsun_bedroom.pt", _adm(256, classes=False, dropout="--dropout 0.1 ")
    ),
    "adm-lsun-cat": Published(
        _GUIDED, "lsun_cat.pt", _adm(256, classes=False, dropout="--dropout 0.1 ")
    ),
    "adm-lsun-horse": Published(
        _GUIDED, "lsun_horse.pt", _adm(256, classes=False, dropout="--dropout 0.1 ")
    ),
    "adm-lsun-horse-nodropout": Published(
        _GUIDED, "lsun_horse_nodropout.pt", _adm(256, classes=False, dropout="--dropout 0.0 ")
    ),
}  # fmt: skip
