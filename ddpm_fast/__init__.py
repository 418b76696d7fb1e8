"""ddpm_fast: an exact and fast engine for denoising diffusion probabilistic models (Ho et al. 2020)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, load_pretrained, save_pretrained
    from .data import ImageData, load_images
    from .fused_unet import FusedUNet
    from .likelihood import bits_per_dimension
    from .sampler import Sampler
    from .schedule import NoiseSchedule
    from .train import Trainer
    from .train_config import TrainConfig
    from .unet import UNet
    from .unet_config import UNetConfig
    from .watching import Trajectory

__version__ = "0.1.0"

# Names are fetched on first use, so that importing the package costs next to nothing: Triton alone takes a quarter second.
_HOME = {
    "Checkpoint": "checkpoint",
    "FusedUNet": "fused_unet",
    "ImageData": "data",
    "NoiseSchedule": "schedule",
    "Sampler": "sampler",
    "TrainConfig": "train_config",
    "Trainer": "train",
    "Trajectory": "watching",
    "UNet": "unet",
    "UNetConfig": "unet_config",
    "bits_per_dimension": "likelihood",
    "load_images": "data",
    "load_pretrained": "checkpoint",
    "save_pretrained": "checkpoint",
}

__all__ = [
    "Checkpoint",
    "FusedUNet",
    "ImageData",
    "NoiseSchedule",
    "Sampler",
    "TrainConfig",
    "Trainer",
    "Trajectory",
    "UNet",
    "UNetConfig",
    "bits_per_dimension",
    "load_images",
    "load_pretrained",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
