"""Fast, exact engine for denoising diffusion probabilistic models (DDPM; Ho et al. 2020)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint, load_pretrained, save_pretrained
    from .data.datasets import ImageData, load_images
    from .data.image_io import encode_png, save_grid, to_pil
    from .diffusion.forward_process import training_loss
    from .diffusion.reverse_process import p_sample_loop
    from .diffusion.schedule import NoiseSchedule
    from .engines.fused.unet import FusedUNet
    from .evaluation.likelihood import bits_per_dimension
    from .integrations.diffusers import accelerate, restore
    from .integrations.torch_dataset import GeneratedImages
    from .models.config import UNetConfig
    from .models.unet import UNet
    from .sampling.callbacks import Trajectory
    from .sampling.request import SamplingParams
    from .sampling.sampler import Sampler
    from .training.config import TrainConfig
    from .training.trainer import Trainer

__version__ = "0.1.0"

# Names are imported on first use, so that `import ddpm_fast` is fast: Triton alone takes 0.25 s.
_HOME = {
    "Checkpoint": "checkpoints.checkpoint",
    "FusedUNet": "engines.fused.unet",
    "GeneratedImages": "integrations.torch_dataset",
    "ImageData": "data.datasets",
    "NoiseSchedule": "diffusion.schedule",
    "Sampler": "sampling.sampler",
    "SamplingParams": "sampling.request",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "Trajectory": "sampling.callbacks",
    "UNet": "models.unet",
    "UNetConfig": "models.config",
    "accelerate": "integrations.diffusers",
    "bits_per_dimension": "evaluation.likelihood",
    "encode_png": "data.image_io",
    "load_images": "data.datasets",
    "load_pretrained": "checkpoints.checkpoint",
    "p_sample_loop": "diffusion.reverse_process",
    "restore": "integrations.diffusers",
    "save_grid": "data.image_io",
    "save_pretrained": "checkpoints.checkpoint",
    "to_pil": "data.image_io",
    "training_loss": "diffusion.forward_process",
}

__all__ = [
    "Checkpoint",
    "FusedUNet",
    "GeneratedImages",
    "ImageData",
    "NoiseSchedule",
    "Sampler",
    "SamplingParams",
    "TrainConfig",
    "Trainer",
    "Trajectory",
    "UNet",
    "UNetConfig",
    "accelerate",
    "bits_per_dimension",
    "encode_png",
    "load_images",
    "load_pretrained",
    "p_sample_loop",
    "restore",
    "save_grid",
    "save_pretrained",
    "to_pil",
    "training_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)  # public names only
