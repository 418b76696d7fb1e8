"""Identity of a training run: settings that must not change when it resumes, and their checks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
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
        network=network.to_config(),
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
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    saved_options: Mapping[str, Any] | None = None,
    current_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compares an identity with that of a checkpoint.

    Args:
        saved: Identity in the checkpoint.
        current: Current identity, or a part of it.
        saved_options: Options of `ddpm-fast train` in the checkpoint, to name a different schedule.
        current_options: Current options.

    Returns:
        One text per difference, with the option's name and both values.
    """
    names = [name for name in _IDENTITY if name in current]
    changed = _differences("--", names, saved, current)
    if "network" in current and saved["network"] != current["network"]:
        changed += _network_differences(saved["network"], current["network"])
    if "data" in current and saved["data"] != current["data"]:
        changed += _data_differences(saved, current)
    if "beta" in current and saved["beta"] != current["beta"]:
        named = _differences("--", _SCHEDULE, saved_options or {}, current_options or {})
        changed += named or ["the noise schedule differs from the checkpoint's"]
    return changed


def _differences(
    prefix: str, names: Iterable[str], saved: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
    """One text per name with different values."""
    return [
        f"{prefix}{name} {saved.get(name)} in the checkpoint, {current.get(name)} now"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def _network_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    a, b = _network_options(saved), _network_options(current)
    return _differences("--", a, a, b) or _differences("the network's ", current, saved, current)


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


def _data_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    (count, *size), (current_count, *current_size) = saved["shape"], current["shape"]
    if count != current_count:
        return [f"--train_data_dir: {count} images in the checkpoint, {current_count} now"]
    if size[0] != current_size[0]:
        return [f"--resolution {size[0]} in the checkpoint, {current_size[0]} now"]
    if size != current_size:
        a, b = (" x ".join(map(str, s)) for s in (size, current_size))
        return [f"--train_data_dir: images of {a} in the checkpoint, {b} now"]
    if saved["classes"] != current["classes"]:
        a, b = (identity["classes"] or "no" for identity in (saved, current))
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
