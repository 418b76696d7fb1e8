"""Comparison of engines on one network: `compare`.

A checkpoint folder runs each engine in a worker process: some engines keep their threads spinning
after a call, and memory and the time to a first image are then those of one engine. A `Checkpoint`
in memory runs all engines in this process, which starts faster.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint, load_pretrained
from ..engines.base import DTYPES
from ..utils.environment import environment
from ..utils.numerics import full_fp32
from .baselines import BASELINES
from .check import ReferenceCheck
from .engines import Engine, EngineFailed, EngineProcess, LocalEngine
from .kernels import ceilings, kernel_times
from .results import Result, empty_result, same_case, table_of
from .rounds import REST, rounded, summarize, turns
from .workload import Cause, Setting, Workload, indexed

FIRST_STEPS = 10  # steps of the first loop of an engine
# operation -> engine -> seconds per image and, of a loop, per step: a value per round
Times = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Effort:
    """Time that a comparison takes.

    Args:
        seconds: Shortest total time of the rounds of one batch size; there are at least
            `rounds.MIN_ROUNDS`.
        burst: Seconds that an engine runs per turn, for forward passes and for loops.
        rest: Seconds before a turn, in which spinning threads of the previous engine go to sleep.
        steps: Steps of the sampling loops, of all or by batch size; None for as many as the slowest
            engine does per second, 4 to 50.
        warm_start_limit: An engine process whose cold start takes fewer seconds is started again
            with the caches that it filled.
    """

    seconds: float = 30
    burst: float = 0.3
    rest: float = REST
    steps: int | Mapping[int, int] | None = None
    warm_start_limit: float = 0

    def steps_of(self, batch: int) -> int | None:
        return self.steps.get(batch) if isinstance(self.steps, Mapping) else self.steps


class Stage(Enum):
    """What `Progress` reports."""

    STARTING = "an engine is started"
    LEFT_OUT = "an engine is left out"
    TIMING = "the engines of a case take turns"
    CASE = "a case is complete; the message is its table"
    ROOFLINE = "kernels and ceilings are timed"


@dataclass(frozen=True)
class Progress:
    """Progress of a comparison.

    Attributes:
        stage: What is reported.
        message: Text for a log.
        result: The result so far, complete up to the last case.
        engine: The engine that is started or left out.
        cause: Why it is left out.
    """

    stage: Stage
    message: str
    result: Result
    engine: str = ""
    cause: Cause | None = None


def compare(
    weights: str | Path | Checkpoint,
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] | None = None,
    engines: Sequence[str] = tuple(BASELINES),
    effort: Effort | None = None,
    *,
    device: str | torch.device | None = None,
    size: tuple[int, int] | None = None,
    name: str | None = None,
    older: Result | None = None,
    roofline: bool = True,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Compares engines on one network.

    Checks each engine against the network in fp64, then times forward passes and sampling loops in
    interleaved rounds. A baseline that is unavailable, wrong or fails is left out, with the reason.

    Args:
        weights: Checkpoint: a diffusers folder, with a worker process per engine, or a `Checkpoint`
            in memory, with all engines in this process.
        batches: Images per call.
        dtypes: Precisions of the network, of "fp32", "fp16", "bf16" and "fp8"; None for "bf16" on a
            GPU and "fp32" on a CPU.
        engines: Keys of `baselines.BASELINES` or `package.module:Class`. Speedups are those of the
            first.
        effort: Time that the comparison takes; None for `Effort()`.
        device: Device of a folder's network; None for the GPU if there is one. A `Checkpoint` stays
            on its device.
        size: (height, width) of the images in pixels; None for the size of the training images.
        name: Name of the network in the result; None for the folder's name.
        older: Older result, in which all cases must be; loops have as many steps as there.
        roofline: Adds the time of every kernel and the ceilings of the device.
        progress: Called as the comparison proceeds.

    Returns:
        The result, serializable as JSON (`results.py`).

    Raises:
        ValueError: An argument is invalid, or `older` has other cases.
        EngineFailed: The first engine is unavailable, wrong or fails (a RuntimeError).
    """
    effort, folder = effort or Effort(), None if isinstance(weights, Checkpoint) else Path(weights)
    checkpoint = weights if isinstance(weights, Checkpoint) else load_pretrained(weights)
    if folder is None:
        on = checkpoint.unet.conv_in.weight.device
    else:
        on = indexed(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if on.type == "cuda":
        torch.cuda.set_device(on)
    dtypes = dtypes or ("fp32" if on.type == "cpu" else "bf16",)
    _check_arguments(engines, batches, dtypes, effort, len(checkpoint.schedule), on)
    settings = [
        Setting(None if folder is None else str(folder), d, str(on), torch.get_num_threads(), size)
        for d in dtypes
    ]
    workloads = [setting.workload(checkpoint) for setting in settings]
    result = empty_result(workloads[0], name or (folder.resolve().name if folder else "network"))
    steps: dict[tuple[str, int], int] = {}
    if older is not None:
        for setting, workload in zip(settings, workloads, strict=True):
            for batch in batches:
                same = same_case(older, result["network"], case_of(setting, batch, workload))
                steps[setting.dtype, batch] = same["steps"]

    def report(stage: Stage, message: str, engine: str = "", cause: Cause | None = None) -> None:
        progress(Progress(stage, message, result, engine, cause))

    with full_fp32():
        for setting, workload in zip(settings, workloads, strict=True):
            comparison = partial(_Comparison, setting, workload, effort, report)
            with tempfile.TemporaryDirectory() as caches, closing(comparison(Path(caches))) as c:
                for engine in engines:
                    report(Stage.STARTING, f"{setting.dtype}: starting {engine}", engine)
                    c.start(engine, batches[0])
                for batch in batches:
                    names = ", ".join(e.name for e in c.engines)
                    what = f"{setting.dtype}, batch {batch}: {names} in turns"
                    report(Stage.TIMING, f"{what}, {effort.seconds:g} s or more")
                    case = c.case(batch, steps.get((setting.dtype, batch)))
                    result["cases"].append(case)
                    report(Stage.CASE, table_of(case, result["network"]))
        if roofline:
            report(Stage.ROOFLINE, "measuring the roofline and every kernel")
            result["ceilings"] = ceilings(on, dtypes[-1])
            result["kernels"] = kernel_times(workloads[-1], batches[-1])
    return result


def _check_arguments(
    engines: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    effort: Effort,
    timesteps: int,
    device: torch.device,
) -> None:
    if not engines:
        raise ValueError("engines is empty; expected at least one name")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches is {list(batches)}; expected positive integers such as 1, 4, 16")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if dtype == "fp8" and device.type == "cpu":
            raise ValueError(f"fp8 is unsupported on {device}; give fp32, fp16 or bf16")
    for steps in filter(None, map(effort.steps_of, batches)):
        if not 0 < steps <= timesteps:
            raise ValueError(
                f"steps is {steps}; expected at most {timesteps}, the timesteps of this checkpoint"
            )


def case_of(setting: Setting, batch: int, workload: Workload) -> dict[str, Any]:
    """Identity of a case: two cases with equal values can be compared."""
    on_gpu = workload.device.type == "cuda"
    name = torch.cuda.get_device_name(workload.device) if on_gpu else environment()["cpu"]
    what = dict(batch=batch, dtype=setting.dtype, size=list(workload.shape[1:]))
    return dict(**what, device=workload.device.type, device_name=name, threads=setting.threads)


class _Comparison:
    """Engines that run one workload. Speedups are those of the first engine over the others."""

    def __init__(
        self,
        setting: Setting,
        workload: Workload,
        effort: Effort,
        report: Callable[..., None],
        caches: Path,
    ) -> None:
        self.setting, self.workload, self.effort = setting, workload, effort
        self.report, self.caches = report, caches
        self.check = ReferenceCheck(workload)
        self.engines: list[Engine] = []
        self.starts: dict[str, dict[str, float]] = {}
        self.left_out: dict[str, str] = {}

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def start(self, name: str, batch: int) -> None:
        """Starts an engine and times its first images, with empty caches and with filled ones."""
        setting = replace(self.setting, folder=tempfile.mkdtemp(dir=self.caches))
        with self._or_left_out(name):
            engine = self._first_images(name, setting, batch, "first_image_s")
            cold = self.starts[name]["first_image_s"]
            if setting.weights is not None and cold < self.effort.warm_start_limit:
                engine.close()
                engine = self._first_images(name, setting, batch, "warm_first_image_s")
            self.engines.append(engine)

    def _first_images(self, name: str, setting: Setting, batch: int, key: str) -> Engine:
        engine: Engine
        if setting.weights is None:
            engine = LocalEngine(name, replace(self.workload, folder=Path(str(setting.folder))))
        else:
            engine = EngineProcess(name, setting)
        try:
            engine.request("loop", batch, steps=min(FIRST_STEPS, self.workload.timesteps))
        except BaseException:
            engine.close()
            raise
        self.starts.setdefault(name, {})[key] = round(time.perf_counter() - engine.start_time, 2)
        return engine

    @contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        """Leaves out an engine that fails, and reports it; a failure of the first is raised."""
        try:
            yield
        except EngineFailed as error:
            failed = [engine for engine in self.engines if engine.engine == name]
            if not self.engines or failed == self.engines[:1]:
                raise EngineFailed(f"{name}: {error}", error.cause) from error
            self.left_out[name] = str(error)
            for engine in failed:
                self.engines.remove(engine)
                engine.close()
            self.report(Stage.LEFT_OUT, f"{name} left out: {error}", name, error.cause)

    def case(self, batch: int, steps: int | None = None) -> dict[str, Any]:
        """Checks and times all engines at one batch size.

        Args:
            batch: Images per call.
            steps: Steps of the loops, if the effort does not set them.

        Returns:
            The case, with a row per engine.
        """
        errors: dict[str, float] = {}
        for engine in list(self.engines):
            with self._or_left_out(engine.engine):
                errors[engine.engine] = self.check.error(engine, batch)
        steps = self.effort.steps_of(batch) or steps or self._steps(batch)
        times: Times = {do: {name: [] for name in errors} for do in ("forward", "loop")}
        for engine in turns(self.engines, seconds=self.effort.seconds, rest=self.effort.rest):
            with self._or_left_out(engine.engine):
                self._time(engine, batch, steps, times)
        return dict(
            **case_of(self.setting, batch, self.workload),
            steps=steps,
            rounds=len(times["loop"][self.engines[0].engine]),
            load=round(os.getloadavg()[0], 2),
            left_out=dict(self.left_out),
            rows=[
                self._row(engine, batch, errors[engine.engine], times) for engine in self.engines
            ],
        )

    def _steps(self, batch: int) -> int:
        """Number of steps that the slowest engine does per second, 4 to 50."""
        timesteps = self.workload.timesteps
        few, slowest = min(4, timesteps), 0.0
        for engine in list(self.engines):
            with self._or_left_out(engine.engine):
                seconds = engine.request("loop", batch, steps=few)["seconds"]
                slowest = max(slowest, seconds / few)
        return max(few, min(50, timesteps, round(1 / slowest)))

    def _time(self, engine: Engine, batch: int, steps: int, times: Times) -> None:
        burst = self.effort.burst
        answer = engine.request("forward", batch, duration=burst)
        times["forward"][engine.engine].append(statistics.median(answer["times"]) / batch)
        answer = engine.request("loop", batch, steps=steps, duration=burst)
        times["loop"][engine.engine].append(statistics.median(answer["times"]) / batch / steps)

    def _row(self, engine: Engine, batch: int, error: float, times: Times) -> dict[str, Any]:
        first, name = self.engines[0].engine, engine.engine
        row: dict[str, Any] = dict(engine=name, name=engine.name, reason=engine.reason)
        row["error"] = rounded(error)
        row |= {do: summarize(seconds[name], seconds[first]) for do, seconds in times.items()}
        row["images_per_s"] = rounded(1e3 / row["loop"]["ms"] / self.workload.timesteps)
        row["peak_bytes"] = engine.request("memory", batch)["bytes"]
        return row | self.starts[name]
