"""Accuracy check of an engine against the network in fp64, before anything is timed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..utils.numerics import relative_error
from .engines import Engine, EngineFailed
from .workload import Workload

# of a forward pass against fp64
TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 0.05, "fp8": 0.15}
# of ddpm_fast's images against the reference's steps with the same network outputs
STEP_TOLERANCE = 1e-4


class ReferenceCheck:
    """Check of outputs and images against the network of a workload in fp64."""

    def __init__(self, workload: Workload) -> None:
        self.workload, unet = workload, workload.unet
        self._exact = type(unet)(unet.config).double().eval()
        self._exact.load_state_dict(unet.state_dict())
        self._exact.to(workload.device)

    @torch.no_grad()
    def error_of(self, output: Tensor, batch: int) -> float:
        """Returns the relative error of the first and the last image's output, on any device."""
        x, *rest = (v[[0, -1]] for v in self.workload.inputs(batch))
        return relative_error(output[[0, -1]].cpu(), self._exact(x.double(), *rest).cpu())

    def error(self, engine: Engine, batch: int) -> float:
        """Returns the relative error of a forward pass.

        Raises:
            EngineFailed: The output, the images of a loop or its steps are wrong.
        """
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.pt"
            engine.request("check", batch, out=str(out))
            results = torch.load(out, weights_only=True)
        error = self.error_of(results["output"], batch)
        _require("output", error, TOLERANCES[self.workload.dtype])
        images, clip = results["images"], self.workload.checkpoint.clip
        if not images.isfinite().all() or (clip is not None and images.abs().max() > 1.05 * clip):
            raise EngineFailed("not timed: the images of its loop are out of range or not finite")
        if "reference_images" in results:
            error_of_steps = relative_error(images, results["reference_images"])
            _require("steps", error_of_steps, STEP_TOLERANCE)
        return error


def _require(what: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise EngineFailed(
            f"not timed: the relative error of its {what} is {error:.1e}; "
            f"expected at most {allowed:.1e}"
        )
