"""Fused UNet: a `UNet` computed by kernels that are verified before they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import load_pretrained
from ...models.unet import UNet
from .calibration import load_calibration
from .model import PlannedUNet
from .plan import Plan
from .precompile import compile_in_parallel
from .verification import cached_results, fallbacks_of, verify


class FusedUNet(PlannedUNet):
    """Computes eps_theta(x_t, t) of a `UNet` for batches of up to `batch_size` images.

    Before a plan is used, each launch is compared with its fallback. Launches that fail run by
    their fallbacks, with one warning.

    Args:
        check: Whether to verify; default: on a GPU only.
        unet, batch_size, dtype, device, size, timesteps, **options: See `PlannedUNet`.

    Raises:
        ValueError: As `PlannedUNet`.
        RuntimeError: The verification cannot run.
    """

    def __init__(
        self,
        unet: UNet,
        batch_size: int,
        dtype: str | torch.dtype = "bf16",
        device: torch.device | str | None = None,
        size: tuple[int, int] | None = None,
        timesteps: int = 1000,
        *,
        check: bool | None = None,
        **options: Any,
    ) -> None:
        self.check = check
        super().__init__(unet, batch_size, dtype, device, size, timesteps, **options)

    @classmethod
    def from_unet(cls, unet: UNet, batch_size: int, **options: Any) -> FusedUNet:
        """Same as the constructor."""
        return cls(unet, batch_size, **options)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, batch_size: int, dtype: str = "bf16", **options: Any
    ) -> FusedUNet:
        """Loads a diffusers folder; in fp8 with its calibration, if there is one."""
        unet = load_pretrained(directory).unet
        if dtype == "fp8":
            options = dict(calibration=load_calibration(directory, unet)) | options
        return cls(unet, batch_size, dtype, **options)

    def _make_plan(self, size: tuple[int, int]) -> Plan:
        plan = super()._make_plan(size)
        kind = self.device.type
        check = kind == "cuda" if self.check is None else self.check
        # before the plan allocates memory, because the worker needs as much
        if check and kind != "meta" and not plan.fallbacks:
            spec = self.spec(size, plan)
            if cached_results(spec) is None and kind == "cuda":
                compile_in_parallel(spec)
            plan.fallbacks = fallbacks_of(verify(spec))
        return plan
