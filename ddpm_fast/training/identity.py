"""Identity of a training run: what must fit together, and what must not change when it resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ..data.datasets import ImageData
from ..diffusion.schedule import NoiseSchedule
from ..models.config import UNetConfig
from ..models.unet import UNet
from .config import TrainConfig

_SCHEDULE = ("ddpm_beta_schedule", "ddpm_num_steps", "rescale_betas_zero_snr")
_LARGEST_REPEAT = 4  # passes over the data in one batch
_ALWAYS_ALLOWED = (
    1024  # images of a batch, however small the data: to overfit a few images is a usual test
)
_IDENTITY = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "random_flip",
    "use_ema",
    "seed",
    "prediction_type",
    "loss_type",
    "snr_gamma",
    "timestep_sampling",
)


def run_identity(
    network: UNetConfig, schedule: NoiseSchedule, data: ImageData, config: TrainConfig
) -> dict[str, Any]:
    """What must not change between the parts of a run, as JSON holds it."""
    return dict(
        network=network.to_config(),
        beta=hashlib.sha256(schedule.beta.tobytes()).hexdigest(),
        **data_identity(data),
        **config_identity(config),
    )


def config_identity(config: TrainConfig) -> dict[str, Any]:
    """The part of the identity that the configuration determines."""
    return {name: getattr(config, name) for name in _IDENTITY}


def data_identity(data: ImageData) -> dict[str, Any]:
    """The part of the identity that the data determines."""
    return dict(data=data.digest, shape=list(data.images.shape), classes=data.num_classes)


def differences(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    options_then: Mapping[str, Any] | None = None,
    options_now: Mapping[str, Any] | None = None,
) -> list[str]:
    """What differs between the identity in a checkpoint and the keys of another one, by the names of the options.

    Args:
        then: identity in the checkpoint.
        now: identity now, or a part of it.
        options_then: options of `ddpm-fast train` in the checkpoint; they name a schedule that differs.
        options_now: those now.
    """
    changed = [
        f"--{name} {then.get(name)} in the checkpoint, {now[name]} now"
        for name in _IDENTITY
        if name in now and then.get(name) != now[name]
    ]
    if "network" in now and then["network"] != now["network"]:
        changed += _network_differences(then["network"], now["network"])
    if "data" in now and then["data"] != now["data"]:
        changed += _data_differences(then, now)
    if "beta" in now and then["beta"] != now["beta"]:
        a, b = options_then or {}, options_now or {}
        named = [
            f"--{name} {a.get(name)} in the checkpoint, {b.get(name)} now"
            for name in _SCHEDULE
            if a.get(name) != b.get(name)
        ]
        changed += named or ["the noise schedule is not that of the checkpoint"]
    return changed


def _network_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    a, b = _network_options(then), _network_options(now)
    named = [
        f"--{name} {a[name]} in the checkpoint, {b[name]} now" for name in a if a[name] != b[name]
    ]
    return named or [
        f"the network's {key} {then.get(key)} in the checkpoint, {value} now"
        for key, value in now.items()
        if then.get(key) != value
    ]


def _network_options(network: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet2DModel configuration as the options that set it."""
    layers = network["layers_per_block"]
    blocks = enumerate(network["down_block_types"])
    return dict(
        channels=",".join(map(str, network["block_out_channels"])),
        layers=",".join(map(str, layers)) if isinstance(layers, list) else layers,
        attention=",".join(str(level) for level, name in blocks if "Attn" in name) or "none",
        head_dim=network["attention_head_dim"],
        dropout=network["dropout"],
        resolution=network["sample_size"],
    )


def _data_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    (count, *size), (count_now, *size_now) = then["shape"], now["shape"]
    if count != count_now:
        return [f"--train_data_dir: {count} images then, {count_now} now"]
    if size[0] != size_now[0]:
        return [f"--resolution {size[0]} in the checkpoint, {size_now[0]} now"]
    if size != size_now:
        a, b = (" x ".join(map(str, s)) for s in (size, size_now))
        return [f"--train_data_dir: images of {a} then, {b} now"]
    if then["classes"] != now["classes"]:
        a, b = then["classes"] or "no", now["classes"] or "no"
        return [f"--train_data_dir or --class_labels: {a} classes then, {b} now"]
    return [f"--train_data_dir or --fit: {count} images then and now, with other pixels or labels"]


def check_batch(config: TrainConfig, images: int) -> None:
    """ValueError for a batch far beyond the data.

    A step cannot be interrupted, so one of many passes over the data would ignore every signal for minutes. It
    gains nothing either: several batches per step (gradient_accumulation_steps) or more steps use the same images.
    """
    size, most = config.train_batch_size, max(_LARGEST_REPEAT * images, _ALWAYS_ALLOWED)
    if size > most:
        raise ValueError(
            f"train_batch_size is {size} with {images} images; expected at most {most}: lower --train_batch_size"
        )


def check_fit(unet: UNet, data: ImageData, learned_variance: bool = False) -> None:
    """ValueError where the network cannot train on these images."""
    (_, height, width, channels), c = data.images.shape, unet.config
    coarsest = 2 ** (len(c.channels) - 1)
    if height % coarsest or width % coarsest:
        raise ValueError(
            f"the images are {height} x {width}; {len(c.channels)} levels need sides divisible by {coarsest}"
        )
    expected = channels * (1 + learned_variance)
    if c.in_channels != channels or c.out_channels != expected:
        raise ValueError(
            f"the images have {channels} channels, so the network must take {channels} and give {expected}"
            f"{' (mean and variance)' if learned_variance else ''}; it takes {c.in_channels} and gives {c.out_channels}"
        )
    if c.num_classes is not None and (data.num_classes is None or data.num_classes > c.num_classes):
        raise ValueError(
            f"the network has {c.num_classes} classes, the data {data.num_classes or 'no labels'}"
        )
