"""Schedulers of diffusers with a fused `step`; needs the extra `diffusers`."""

from .integrations.diffusers_schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)

__all__ = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"]
