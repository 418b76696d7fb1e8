"""ddpm_fast: an exact and fast engine for denoising diffusion probabilistic models."""

from .schedule import NoiseSchedule
from .unet import UNet
from .unet_config import UNetConfig

__all__ = ["NoiseSchedule", "UNet", "UNetConfig"]
