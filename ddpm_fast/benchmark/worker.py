"""Worker process that holds one engine: `python -m ddpm_fast.benchmark.worker ENGINE SETTING`, the setting in JSON.

A request is a line of JSON on stdin, its answer one on stdout (`utils.subprocess.JsonWorker`).

    {"do": "loop", "batch": 4, "steps": 10}                   -> {"seconds": ...}
    {"do": "check", "batch": 4, "out": FILE}                  -> {}; writes outputs and images to FILE
    {"do": "forward" | "loop", ..., "duration": 0.3}          -> {"times": [seconds of each call]}
    {"do": "memory", "batch": 4}                              -> {"bytes": peak memory; on a GPU of a loop alone}

An engine that is unavailable or fails answers {"unavailable": reason} and ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import load_pretrained
from ..engines.fused.calibration import load_calibration
from ..models.unet import channels_last
from ..utils.environment import peak_memory
from ..utils.subprocess import json_stdio
from .baselines import Baseline, DdpmFast, baseline
from .workload import Unavailable, Workload

CHECKED_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """Setting of a benchmark, serializable as JSON.

    Args:
        weights: Checkpoint: a diffusers folder.
        dtype: A name in `engines.base.DTYPES`.
        device: As torch names it.
        threads: CPU threads of torch.
        size: (H, W) in pixels; None for the size of the training images.
        folder: Cache folder of the engine; None where it may cache nothing.
    """

    weights: str
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    size: tuple[int, int] | None = None
    folder: str | None = None

    def workload(self) -> Workload:
        """Loads the checkpoint onto the device."""
        checkpoint = load_pretrained(self.weights)
        calibration = (
            load_calibration(self.weights, checkpoint.unet) if self.dtype == "fp8" else None
        )
        channels_last(checkpoint.unet.requires_grad_(False).to(self.device))
        size = None if self.size is None else (self.size[0], self.size[1])
        folder = None if self.folder is None else Path(self.folder)
        return Workload(checkpoint, self.dtype, folder, size, calibration)


def first_and_last(batch: Tensor) -> Tensor:
    """The two images of a batch that are checked."""
    return batch[[0, -1]].float().cpu()


class Worker:
    """Executes the requests of one engine."""

    def __init__(self, name: str, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            False  # fp32 without TF32
        )
        if torch.device(setting.device).type == "cuda":
            torch.cuda.set_device(setting.device)
        self.workload = setting.workload()
        self.baseline: Baseline = baseline(name, self.workload)
        self.hello = dict(name=self.baseline.name, reason=getattr(self.baseline, "reason", ""))

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do, batch = request["do"], request["batch"]
        if do == "memory":
            return dict(bytes=self._memory(batch))
        if do == "check":
            return self._check(batch, request["out"])
        inputs = self.workload.inputs(batch)
        calls: dict[str, Callable[[], object]] = dict(
            forward=lambda: self.baseline.forward(*inputs),
            loop=lambda: self.baseline.loop(batch, request["steps"]),
        )
        if "duration" not in request:
            return dict(seconds=self._timed(calls[do]))
        times: list[float] = []
        while sum(times) < request["duration"]:
            times.append(self._timed(calls[do]))
        return dict(times=times)

    def _check(self, batch: int, out: str) -> dict[str, Any]:
        """Writes outputs of a forward pass and images of a few steps.

        For `DdpmFast` also the images of the reference's steps with this engine's outputs.
        RuntimeError if the loop returns another number or shape of images.
        """
        steps = min(CHECKED_STEPS, len(self.workload.checkpoint.schedule))
        output = self.baseline.forward(*self.workload.inputs(batch))
        images = self.baseline.loop(batch, steps)
        expected = (batch, *self.workload.shape)
        if tuple(images.shape) != expected:
            raise RuntimeError(
                f"its loop returned images of shape {tuple(images.shape)}; expected {expected}"
            )
        results = dict(output=first_and_last(output), images=first_and_last(images))
        if isinstance(self.baseline, DdpmFast):
            sampler = self.workload.sampler("reference", "fp32", self.baseline.forward)
            reference = sampler.sample(batch, steps=steps, batch_size=batch, output="float")
            results["reference_images"] = first_and_last(reference)
        torch.save(results, out)
        return {}

    def _memory(self, batch: int) -> int:
        device = self.workload.device
        if device.type == "cuda":
            if isinstance(self.baseline, DdpmFast):
                self.baseline.release()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.baseline.loop(batch, min(CHECKED_STEPS, len(self.workload.checkpoint.schedule)))
        return peak_memory(device)

    def _timed(self, call: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.workload.device.type == "cuda":
            torch.cuda.synchronize(self.workload.device)


def main() -> None:
    name, setting = sys.argv[1:]
    requests, send = json_stdio()
    sys.path.append(os.getcwd())  # modules of the user, for baselines named `package.module:Class`
    try:
        worker = Worker(name, Setting(**json.loads(setting)))
        send(worker.hello)
        for request in requests:
            send(worker.answer(request))
    except (Unavailable, ValueError) as error:
        send(dict(unavailable=str(error)))
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # of this engine: the comparison goes on without it
        first_line = (str(error).splitlines() or [""])[0]
        send(dict(unavailable=f"{type(error).__name__}: {first_line}"))


if __name__ == "__main__":
    main()
