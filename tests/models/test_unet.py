import dataclasses
import warnings

import pytest
import torch

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.utils.numerics import relative_error

diffusers = pytest.importorskip("diffusers")

HO = dict(
    layers_per_block=2,
    attention_head_dim=None,
    norm_num_groups=32,
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
)
CIFAR = dict(
    HO,
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
CELEBA = dict(
    HO,
    sample_size=256,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
)
IMPROVED = dict(
    sample_size=32,
    layers_per_block=3,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    out_channels=6,
    attention_head_dim=64,
    attn_norm_num_groups=32,
    resnet_time_scale_shift="scale_shift",
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    norm_eps=1e-5,
)
SMALL = dict(
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,  # widths of 4 and 8 channels
)
RESNET = dict(
    SMALL,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
)
# name -> diffusers' configuration, (B, C, H, W), parameters as published or None
MODELS = {
    "CIFAR-10 (Ho)": (CIFAR, (2, 3, 32, 32), 35_746_307),
    "CelebA-HQ 256 (Ho)": (CELEBA, (1, 3, 256, 256), 113_673_219),
    "CIFAR-10 (improved-diffusion)": (IMPROVED, (2, 3, 32, 32), 52_546_438),
    "class-conditional": (dict(SMALL, num_class_embeds=10), (3, 1, 32, 32), None),
    "non-square 32x48": (SMALL, (2, 1, 32, 48), None),
    "28x28": (SMALL, (2, 1, 28, 28), None),
    "ADM's residual resampling, mid attention without norm": (RESNET, (2, 1, 16, 16), None),
    "no attention at the bottom, mid scale, centred input, other time width": (
        dict(
            SMALL,
            add_attention=False,
            mid_block_scale_factor=1.5,
            center_input_sample=True,
            time_embedding_dim=40,
        ),
        (2, 1, 16, 16),
        None,
    ),
    "diffusers' defaults, narrowed": (
        dict(block_out_channels=(32, 64, 64, 64)),
        (2, 3, 16, 16),
        None,
    ),
}


def unet_and_baseline(config):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        baseline = diffusers.UNet2DModel(**config).eval()
    unet = UNet(UNetConfig.from_diffusers(dict(baseline.config))).eval()
    unet.load_state_dict(baseline.state_dict(), strict=True)
    baseline.load_state_dict(unet.state_dict(), strict=True)
    return unet, baseline


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full) if "CelebA-HQ 256" in n else n for n in MODELS],
)
@torch.no_grad()
def test_parity_with_diffusers(name, figure):
    config, shape, parameters = MODELS[name]
    unet, baseline = unet_and_baseline(config)
    count = sum(p.numel() for p in unet.parameters())
    assert parameters in (None, count)
    x, t = torch.randn(shape), torch.tensor([3, 977, 500])[: shape[0]]
    labels = torch.tensor([1, 9, 0])[: shape[0]] if unet.config.num_classes else None
    want = baseline(x, t, class_labels=labels).sample
    got = unet(x, t, labels)
    assert got.shape == want.shape
    error = relative_error(got, want)
    figure(
        f"UNet and diffusers, {name}, {count / 1e6:.1f} M parameters: relative error",
        f"{error:.1e}",
    )
    assert error < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(name):
    config = UNetConfig.from_diffusers(MODELS[name][0])
    assert UNetConfig.from_diffusers(config.to_diffusers()) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_default_is_the_cifar_network():
    assert UNetConfig() == UNetConfig.from_diffusers(CIFAR)


def test_missing_keys_take_diffusers_defaults_and_underscored_ones_are_metadata():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults = dict(diffusers.UNet2DModel().config)
    assert UNetConfig.from_diffusers(
        {"_class_name": "UNet2DModel", "_anything": 1}
    ) == UNetConfig.from_diffusers(defaults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cross_attention_dim=8), "unknown key 'cross_attention_dim'"),
        (dict(time_embedding_type="fourier"), "time_embedding_type='fourier' is not supported"),
        (dict(act_fn="gelu"), "act_fn='gelu' is not supported"),
        (dict(class_embed_type="timestep"), "class_embed_type='timestep' is not supported"),
        (dict(mid_block_type=None), "mid_block_type=None is not supported"),
        (
            dict(down_block_types=("SkipDownBlock2D",) * 3),
            "block type 'SkipDownBlock2D' is not supported",
        ),
        (dict(block_out_channels=(16, 32)), "one entry per level"),
        (dict(norm_num_groups=5), "norm_groups=5"),
        (dict(attention_head_dim=12), "attention heads"),
    ],
)
def test_refuses_what_it_does_not_compute(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_diffusers({**SMALL, **change})


def test_heads_by_number_or_by_width_per_level():
    by_number = UNetConfig(channels=(32, 64), attention=(True, True), heads=(4, 4))
    assert UNetConfig(channels=(32, 64), attention=(True, True), head_dim=(8, 16)) == by_number
    assert UNet(by_number).down_blocks[1].attentions[0].heads == 4
    with pytest.raises(ValueError, match="attention_head_dim"):
        by_number.to_diffusers()
    with pytest.raises(ValueError, match="give one of them"):
        UNetConfig(heads=4, head_dim=8)
    for bad in (
        dict(heads=1.5),
        dict(heads=0),
        dict(head_dim=0),
        dict(channels=5),
        dict(layers=0),
        dict(num_classes=0),
    ):
        with pytest.raises(ValueError, match=r"heads|expected .*integers? from 1 to"):
            UNetConfig(**bad)


def test_residual_blocks_per_level():
    config = UNetConfig(channels=(32, 64), attention=(False, True), layers=(1, 3))
    unet = UNet(config).eval()
    assert [len(level.resnets) for level in unet.down_blocks] == [1, 3]
    assert [len(level.resnets) for level in unet.up_blocks] == [4, 2]
    assert unet(torch.randn(1, 3, 8, 8), 5).shape == (1, 3, 8, 8)
    expected = config.to_diffusers()
    assert expected["layers_per_block"] == [1, 3] and UNetConfig.from_diffusers(expected) == config
    with pytest.raises(TypeError):  # diffusers does not build another network
        diffusers.UNet2DModel.from_config(expected)
    with pytest.raises(ValueError, match=r"layers=\(1, 3, 1\) has 3 entries"):
        UNetConfig.from_diffusers({**expected, "layers_per_block": [1, 3, 1]})
    assert (
        UNetConfig(channels=(32, 64), attention=False, layers=(2, 2)).to_diffusers()[
            "layers_per_block"
        ]
        == 2
    )


@torch.no_grad()
def test_residual_blocks_per_level_are_those_of_diffusers():
    """The baseline is a `UNet2DModel` with the blocks of one level from a deeper one."""
    common = dict(
        SMALL, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D")
    )
    common["up_block_types"] = ("AttnUpBlock2D", "UpBlock2D")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        baseline, deeper = (
            diffusers.UNet2DModel(**dict(common, layers_per_block=n)).eval() for n in (1, 2)
        )
    baseline.down_blocks[1], baseline.up_blocks[0] = deeper.down_blocks[1], deeper.up_blocks[0]
    unet = UNet(UNetConfig.from_diffusers(dict(baseline.config, layers_per_block=[1, 2]))).eval()
    unet.load_state_dict(baseline.state_dict(), strict=True)
    x, t = torch.randn(2, SMALL["in_channels"], 16, 16), torch.tensor([3, 977])
    assert relative_error(unet(x, t), baseline(x, t).sample) < 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@torch.no_grad()
def test_runs_in_every_precision(dtype):
    unet, _ = unet_and_baseline(dict(SMALL, num_class_embeds=10))
    x, t, labels = torch.randn(2, 1, 16, 16), torch.tensor([5, 990]), torch.tensor([0, 9])
    exact = unet.double()(x.double(), t, labels)
    got = unet.to(dtype)(x, t, labels)
    assert got.dtype == dtype
    assert relative_error(got, exact) < {8: 1e-6, 4: 1e-5}.get(dtype.itemsize, 0.05)


@torch.no_grad()
def test_fractional_and_single_timesteps():
    unet, baseline = unet_and_baseline(SMALL)
    x = torch.randn(2, 1, 16, 16)
    t = torch.tensor([0.25, 998.5])
    assert relative_error(unet(x, t), baseline(x, t).sample) < 1e-5
    assert torch.equal(unet(x, 7), unet(x, torch.tensor([7, 7])))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 30, 32), (1, 32, 32)])
def test_refuses_wrong_images(shape):
    unet = UNet(UNetConfig.from_diffusers(SMALL))
    with pytest.raises(ValueError, match=r"expected \[B, 1, H, W\] with H and W divisible by 4"):
        unet(torch.zeros(shape), 0)


def test_refuses_wrong_labels():
    plain, classy = (
        UNet(UNetConfig.from_diffusers(SMALL)),
        UNet(UNetConfig.from_diffusers(dict(SMALL, num_class_embeds=10))),
    )
    x = torch.zeros(2, 1, 16, 16)
    with pytest.raises(ValueError, match="labels given"):
        plain(x, 0, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"labels missing; expected labels \[B\] in 0..9"):
        classy(x, 0)
    with pytest.raises(ValueError, match=r"expected \[2\]"):
        classy(x, 0, torch.tensor([1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(x_t=torch.zeros(2, 3, 8)), r"x_t has shape \(2, 3, 8\)"),
        (dict(x_t=torch.zeros(2, 1, 8, 8)), r"expected \[B, 3, H, W\] with H and W divisible by 4"),
        (dict(x_t=torch.zeros(2, 3, 8, 6)), "divisible by 4"),
        (dict(size=(8, 4)), r"expected \[B, 3, H, W\] with \(H, W\) = \(8, 4\)"),
        (dict(labels=None), r"labels missing; expected labels \[B\] in 0..4"),
        (
            dict(labels=torch.zeros(3, dtype=torch.int64)),
            r"labels have shape \(3,\); expected \[2\]",
        ),
        (
            dict(labels=torch.tensor([0, 5])),
            r"labels: torch.int64 \(2,\) in 0..5; expected integers \[2\] in 0..4",
        ),
        (dict(labels=torch.tensor([0.0, 1.0])), "labels: torch.float32"),
        (
            dict(t=torch.tensor([0, 10])),
            r"t: torch.int64 \(2,\) in 0..10; expected integers \[2\] in 0..9",
        ),
        (dict(t=torch.tensor([-1, 1])), r"t: .* in -1..1"),
        (dict(t=torch.tensor([True, False])), "t: torch.bool"),
        (dict(t=torch.tensor([1])), r"t: torch.int64 \(1,\); expected integers \[2\]"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_call_is_validated_by_the_configuration(call, message):
    config = UNetConfig(8, channels=(8, 16, 16), attention=False, norm_groups=4, num_classes=5)
    valid = dict(
        x_t=torch.zeros(2, 3, 8, 8),
        labels=torch.tensor([0, 4]),
        t=torch.tensor([0, 9]),
        timesteps=10,
    )
    config.check_call(**valid)
    config.check_call(**valid, size=(8, 8))
    with pytest.raises(ValueError, match=message):
        config.check_call(**{**valid, **call})
