"""FusedUNet: the function of a `UNet`, by kernels that are verified before they are used."""

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
    """eps_theta(x_t, t) of a trained `UNet`, for batches of up to `batch_size`.

    Before a plan is used, each launch is compared with its fallback; launches that fail run by
    their fallbacks, with one warning.

    Args:
        check: Whether to verify; default: on a GPU.
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
        """See the class."""
        return cls(unet, batch_size, **options)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, batch_size: int, dtype: str = "bf16", **options: Any
    ) -> FusedUNet:
        """From a diffusers folder; in fp8 with the folder's calibration, if it has one."""
        unet = load_pretrained(directory).unet
        if dtype == "fp8":
            options = dict(calibration=load_calibration(directory, unet)) | options
        return cls(unet, batch_size, dtype, **options)

    def _make_plan(self, size: tuple[int, int]) -> Plan:
        plan = super()._make_plan(size)
        check = self.device.type == "cuda" if self.check is None else self.check
        if (
            check and self.device.type != "meta" and not plan.fallbacks
        ):  # before the plan allocates: the worker needs as much
            spec = self.spec(size, plan)
            if cached_results(spec) is None and self.device.type == "cuda":
                compile_in_parallel(spec)
            plan.fallbacks = fallbacks_of(verify(spec))
        return plan
