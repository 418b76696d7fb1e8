"""Identity of a training run: what must fit together, and what must not change when it resumes."""

from __future__ import annotations

import hashlib
from typing import Any

from ..data.datasets import ImageData
from ..diffusion.schedule import NoiseSchedule
from ..models.config import UNetConfig
from ..models.unet import UNet
from .config import TrainConfig

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
        network=network.to_diffusers(),
        beta=hashlib.sha256(schedule.beta.tobytes()).hexdigest(),
        data=data.digest,
        **{name: getattr(config, name) for name in _IDENTITY},
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
