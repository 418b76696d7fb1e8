"""Engines of a comparison, in this process or in a worker process.

Both execute the same requests, JSON objects that name a batch size:

    do="loop", steps=10                      -> {"seconds": ...}
    do="check", out=FILE                     -> {}; writes outputs and images to FILE
    do="forward" | "loop", duration=0.3, ... -> {"times": [seconds of each call]}
    do="memory"                              -> {"bytes": peak memory}
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from ..utils.environment import peak_memory
from ..utils.subprocess import JsonWorker, WorkerEnded, WorkerTimeout
from .baselines import Baseline, DdpmFast, baseline
from .workload import Cause, Setting, Unavailable, Workload

CHECKED_STEPS = 3
TIMEOUT = 900  # seconds for an answer: compilers take minutes


class EngineFailed(RuntimeError):
    """Raised where an engine is unavailable, fails, or its process ends."""

    def __init__(self, reason: str, cause: Cause = Cause.FAILED) -> None:
        super().__init__(reason)
        self.cause = cause


class Engine(Protocol):
    """Engine of a comparison.

    Attributes:
        engine: Name as `baselines.baseline` takes it.
        name: Display name, with what was selected.
        reason: Why `Sampler` selected its engine, or "".
        start_time: `time.perf_counter()` before the start.
    """

    engine: str
    name: str
    reason: str
    start_time: float

    def request(self, do: str, batch: int, **arguments: Any) -> dict[str, Any]: ...
    def close(self) -> None: ...


@contextmanager
def failures() -> Iterator[None]:
    """Converts what an engine may raise into EngineFailed, with a message of one line."""
    try:
        yield
    except EngineFailed:
        raise
    except Unavailable as error:
        raise EngineFailed(str(error), error.cause) from error
    except ValueError as error:
        raise EngineFailed(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise EngineFailed(f"{type(error).__name__}: {first_line}") from error


class LocalEngine:
    """Engine in this process. Raises EngineFailed, as do its requests."""

    def __init__(self, engine: str, workload: Workload) -> None:
        self.engine, self.workload = engine, workload
        self.start_time = time.perf_counter()
        before = self._allocated()
        with failures():
            self._baseline: Baseline = baseline(engine, workload)
        self.name, self.reason = self._baseline.name, getattr(self._baseline, "reason", "")
        weights = sum(p.numel() * p.element_size() for p in workload.unet.parameters())
        self._memory_held = weights + self._allocated() - before

    def request(self, do: str, batch: int, **arguments: Any) -> dict[str, Any]:
        """Executes a request and returns its answer."""
        requests: dict[str, Callable[..., dict[str, Any]]] = dict(
            forward=self._forward, loop=self._loop, check=self._check, memory=self._peak_memory
        )
        before = self._allocated()
        with failures():
            answer = requests[do](batch, **arguments)
        self._memory_held += self._allocated() - before
        return answer

    def close(self) -> None:
        """Releases the engine's memory."""
        del self._baseline
        self._collect()

    def _forward(self, batch: int, duration: float | None = None) -> dict[str, Any]:
        inputs = self.workload.inputs(batch)
        return self._timed(lambda: self._baseline.forward(*inputs), duration)

    def _loop(self, batch: int, steps: int, duration: float | None = None) -> dict[str, Any]:
        return self._timed(lambda: self._baseline.loop(batch, steps), duration)

    def _check(self, batch: int, out: str) -> dict[str, Any]:
        """Writes outputs of a forward pass and images of a few steps.

        For `DdpmFast` also the images of the reference's steps with this engine's outputs.
        RuntimeError if the loop returns another number or shape of images.
        """
        steps = self._few_steps
        output = self._baseline.forward(*self.workload.inputs(batch))
        images = self._baseline.loop(batch, steps)
        expected = (batch, *self.workload.shape)
        if tuple(images.shape) != expected:
            raise RuntimeError(
                f"its loop returned images of shape {tuple(images.shape)}; expected {expected}"
            )
        results = dict(output=first_and_last(output), images=first_and_last(images))
        if isinstance(self._baseline, DdpmFast):
            sampler = self.workload.sampler("reference", "fp32", self._baseline.forward)
            reference = sampler.sample(batch, steps=steps, batch_size=batch, output="float")
            results["reference_images"] = first_and_last(reference)
        torch.save(results, out)
        return {}

    def _peak_memory(self, batch: int) -> dict[str, Any]:
        """On a GPU: of a loop, with what the engine holds. On a CPU: of the whole process."""
        device = self.workload.device
        if device.type == "cpu":
            return dict(bytes=peak_memory(device))
        others = self._allocated() - self._memory_held
        if isinstance(self._baseline, DdpmFast):
            self._baseline.release()
        self._collect()
        torch.cuda.reset_peak_memory_stats(device)
        self._baseline.loop(batch, self._few_steps)
        return dict(bytes=peak_memory(device) - others)

    @property
    def _few_steps(self) -> int:
        return min(CHECKED_STEPS, self.workload.timesteps)

    def _timed(self, call: Callable[[], object], duration: float | None) -> dict[str, Any]:
        """Seconds of one call; or of each of the calls that take `duration` in total."""
        if duration is None:
            return dict(seconds=self._seconds(call))
        times: list[float] = []
        while sum(times) < duration:
            times.append(self._seconds(call))
        return dict(times=times)

    def _seconds(self, call: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.workload.device.type == "cuda":
            torch.cuda.synchronize(self.workload.device)

    def _allocated(self) -> int:
        device = self.workload.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def _collect(self) -> None:
        gc.collect()  # graphs and compiled code hold memory
        if self.workload.device.type == "cuda":
            torch.cuda.empty_cache()


def first_and_last(batch: Tensor) -> Tensor:
    """The two images of a batch that are checked."""
    return batch[[0, -1]].float().cpu()


class EngineProcess:
    """Engine in a worker process. Raises EngineFailed, as do its requests.

    Args:
        engine: Name of the engine, as `baselines.baseline` takes it.
        setting: Its workload; caches of Triton, torch.compile and ddpm_fast go to
            `setting.folder`.
    """

    def __init__(self, engine: str, setting: Setting) -> None:
        self.engine = engine
        caches = ("DDPM_FAST_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        folder = setting.folder
        variables = {} if folder is None else {name: f"{folder}/{name}" for name in caches}
        self.start_time = time.perf_counter()
        self._worker = JsonWorker(
            "ddpm_fast.benchmark.worker", [engine, json.dumps(asdict(setting))], variables
        )
        try:
            first = self._answer(None)
        except BaseException:
            self.close()
            raise
        self.name, self.reason = first["name"], first["reason"]

    def request(self, do: str, batch: int, **arguments: Any) -> dict[str, Any]:
        """Sends a request to the worker and returns its answer."""
        return self._answer(dict(do=do, batch=batch, **arguments))

    def close(self) -> None:
        self._worker.close()

    def _answer(self, request: dict[str, Any] | None) -> dict[str, Any]:
        if request is not None:
            self._worker.send(request)
        try:
            answer = self._worker.receive(TIMEOUT)
        except (WorkerEnded, WorkerTimeout) as error:
            raise EngineFailed(str(error)) from error
        if "failed" in answer:
            raise EngineFailed(answer["failed"], Cause(answer["cause"]))
        return answer
