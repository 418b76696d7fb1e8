"""A process that holds one engine and runs it when asked: `python -m ddpm_fast.benchmark.worker` with a setting in JSON.

A request is a line of JSON on stdin, the answer one on stdout; what libraries print goes to stderr.

    {"do": "loop", "batch": 4, "steps": 10}          images are drawn            -> {"seconds": ...}
    {"do": "check", "batch": 4, "out": FILE}         what the engine computes goes into FILE, for the caller to judge
    {"do": "forward" | "loop", ..., "for": 0.3}      again and again, so many seconds -> {"times": [seconds of each]}
    {"do": "memory", "batch": 4}                     -> {"bytes": the most that were in use, on a GPU by a loop alone}
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
from .baselines import Baseline, Missing, Ours, Subject, baseline

CHECKED_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """Which network, and how it is run. weights: a diffusers folder; folder: where the engine may keep things."""

    weights: str
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    size: tuple[int, int] | None = None
    folder: str | None = None

    def subject(self) -> Subject:
        checkpoint = load_pretrained(self.weights)
        calibration = load_calibration(self.weights, checkpoint.unet) if self.dtype == "fp8" else None
        channels_last(checkpoint.unet.requires_grad_(False).to(self.device))
        size = None if self.size is None else (self.size[0], self.size[1])
        return Subject(checkpoint, self.dtype, None if self.folder is None else Path(self.folder), size, calibration)


def checked(batch: Tensor) -> Tensor:
    """The images whose results are judged: the first and the last."""
    return batch[[0, -1]].float().cpu()


class Worker:
    def __init__(self, name: str, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        if torch.device(setting.device).type == "cuda":
            torch.cuda.set_device(setting.device)
        self.subject = setting.subject()
        self.baseline: Baseline = baseline(name, self.subject)
        self.hello = dict(name=self.baseline.name, reason=getattr(self.baseline, "reason", ""))

    def answer(self, r: dict[str, Any]) -> dict[str, Any]:
        if r["do"] == "memory":
            return dict(bytes=self._memory(r["batch"]))
        if r["do"] == "check":
            return self._check(r["batch"], r["out"])
        given = self.subject.inputs(r["batch"])
        calls: dict[str, Callable[[], object]] = dict(
            forward=lambda: self.baseline.forward(*given), loop=lambda: self.baseline.loop(r["batch"], r["steps"])
        )
        if "for" not in r:
            return dict(seconds=self._timed(calls[r["do"]]))
        times: list[float] = []
        while sum(times) < r["for"]:
            times.append(self._timed(calls[r["do"]]))
        return dict(times=times)

    def _check(self, batch: int, out: str) -> dict[str, Any]:
        """Outputs of a forward pass, and images of a few steps; of ours also those that the reference's steps come to with this
        engine's outputs. RuntimeError where a loop draws something else than it was asked for.
        """
        steps = min(CHECKED_STEPS, len(self.subject.checkpoint.schedule))
        output, images = self.baseline.forward(*self.subject.inputs(batch)), self.baseline.loop(batch, steps)
        if tuple(images.shape) != (batch, *self.subject.shape):
            raise RuntimeError(f"its loop drew {tuple(images.shape)}; expected {(batch, *self.subject.shape)}")
        found = dict(output=checked(output), images=checked(images))
        if isinstance(self.baseline, Ours):
            stepped = self.subject.sampler("reference", "fp32", self.baseline.forward)
            found["stepped"] = checked(stepped.sample(batch, steps=steps, batch_size=batch, output="float"))
        torch.save(found, out)
        return {}

    def _memory(self, batch: int) -> int:
        device = self.subject.device
        if device.type == "cuda":
            if isinstance(self.baseline, Ours):
                self.baseline.forget()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.baseline.loop(batch, min(CHECKED_STEPS, len(self.subject.checkpoint.schedule)))
        return peak_memory(device)

    def _timed(self, call: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize(self.subject.device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    spec = json.loads(sys.argv[1])

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        worker = Worker(spec["baseline"], Setting(**spec["setting"]))
        say(worker.hello)
        for line in sys.stdin:
            say(worker.answer(json.loads(line)))
    except (Missing, ValueError) as error:
        say(dict(missing=str(error)))
    except (RuntimeError, MemoryError) as error:  # of this engine alone
        say(dict(missing=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


if __name__ == "__main__":
    main()
