"""Identity of a training run: settings that must not change when it resumes, and their checks."""

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
_ALWAYS_ALLOWED = 1024  # images per batch for any data: overfitting a few images is a usual test
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
    """All settings that must not change when a run resumes, as JSON values."""
    return dict(
        network=network.to_diffusers(),
        beta=hashlib.sha256(schedule.beta.tobytes()).hexdigest(),
        **data_identity(data),
        **config_identity(config),
    )


def config_identity(config: TrainConfig) -> dict[str, Any]:
    """The identity's entries from the configuration."""
    return {name: getattr(config, name) for name in _IDENTITY}


def data_identity(data: ImageData) -> dict[str, Any]:
    """The identity's entries from the data."""
    return dict(data=data.digest, shape=list(data.images.shape), classes=data.num_classes)


def differences(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    options_then: Mapping[str, Any] | None = None,
    options_now: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compares an identity with that of a checkpoint.

    Args:
        then: Identity in the checkpoint.
        now: Current identity, or a part of it.
        options_then: Options of `ddpm-fast train` in the checkpoint, to name a different schedule.
        options_now: Current options.

    Returns:
        One text per difference, with the option's name and both values.
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
        changed += named or ["the noise schedule differs from the checkpoint's"]
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
    """The command-line options that correspond to a UNet2DModel configuration."""
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
        return [f"--train_data_dir: {count} images in the checkpoint, {count_now} now"]
    if size[0] != size_now[0]:
        return [f"--resolution {size[0]} in the checkpoint, {size_now[0]} now"]
    if size != size_now:
        a, b = (" x ".join(map(str, s)) for s in (size, size_now))
        return [f"--train_data_dir: images of {a} in the checkpoint, {b} now"]
    if then["classes"] != now["classes"]:
        a, b = then["classes"] or "no", now["classes"] or "no"
        return [f"--train_data_dir or --class_labels: {a} classes in the checkpoint, {b} now"]
    return [f"--train_data_dir or --fit: {count} images as before, but other pixels or labels"]


def check_batch(config: TrainConfig, images: int) -> None:
    """ValueError for a batch that is much larger than the data.

    A step cannot be interrupted: one with many passes over the data ignores signals for minutes. It
    has no advantage over several batches per step or more steps.
    """
    size, limit = config.train_batch_size, max(_LARGEST_REPEAT * images, _ALWAYS_ALLOWED)
    if size > limit:
        raise ValueError(
            f"train_batch_size is {size} with {images} images; expected at most {limit}: "
            "lower --train_batch_size"
        )


def check_fit(unet: UNet, data: ImageData, learned_variance: bool = False) -> None:
    """ValueError if the network cannot train on these images."""
    (_, height, width, channels), c = data.images.shape, unet.config
    coarsest = 2 ** (len(c.channels) - 1)
    if height % coarsest or width % coarsest:
        raise ValueError(
            f"the images are {height} x {width}; {len(c.channels)} levels need sides divisible by "
            f"{coarsest}"
        )
    expected = channels * (1 + learned_variance)
    if c.in_channels != channels or c.out_channels != expected:
        why = " (mean and variance)" if learned_variance else ""
        raise ValueError(
            f"the network has {c.in_channels} input and {c.out_channels} output channels; expected "
            f"{channels} and {expected}{why} for images of {channels} channels"
        )
    if c.num_classes is not None and (data.num_classes is None or data.num_classes > c.num_classes):
        raise ValueError(
            f"the network has {c.num_classes} classes, the data {data.num_classes or 'no labels'}; "
            "expected labels of the network's classes"
        )
