"""Comparison of engines that take turns, each in a worker process: a burst after a rest, round after round.

Each engine has its own process because some engines keep their threads spinning after a call, and because memory and the time to a
first image are then those of one engine. A speedup is the ratio of two bursts of one round; its interval is that of a median.
Outputs are checked against fp64 before anything is timed.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..utils.environment import environment
from ..utils.numerics import relative_error
from ..utils.subprocess import JsonWorker
from .worker import Setting
from .workload import Workload

Case = dict[str, Any]  # one batch size in one precision, as written to JSON
TOLERANCES = {
    "fp32": 1e-5,
    "fp16": 5e-3,
    "bf16": 0.05,
    "fp8": 0.15,
}  # relative error of a forward pass against fp64
STEP_TOLERANCE = (
    1e-4  # of ddpm_fast's images against the reference's steps with the same network outputs
)
FIRST_STEPS = 10  # of the first loop of a process
TIMEOUT = 900  # seconds for an answer: compilers take minutes
MIN_ROUNDS = 6  # the interval of a median of so many values holds with a probability of 95 %


@dataclass(frozen=True)
class Effort:
    """Time that a comparison takes.

    Args:
        seconds: Shortest total time of the rounds of one batch size; there are at least `MIN_ROUNDS`.
        burst: Seconds that an engine runs per turn, for forward passes and for loops.
        rest: Seconds before a turn, in which spinning threads of the engine before it go to sleep.
        steps: Of the sampling loops; None for as many as the slowest engine does per second, 4 to 50.
        warm_start_limit: An engine whose cold start takes fewer seconds is started again with its caches.
    """

    seconds: float = 30
    burst: float = 0.3
    rest: float = 0.2
    steps: int | None = None
    warm_start_limit: float = 0


class EngineProcess:
    """Worker process of one engine.

    Args:
        engine: Name of the engine, as `baselines.baseline` takes it.
        setting: Its workload; caches of Triton, torch.compile and ddpm_fast go to `setting.folder`.

    Raises:
        RuntimeError: The engine is unavailable, fails, or its process ends; the message is the reason.

    Attributes:
        name: Display name, with what was selected.
        reason: Why `Sampler` selected its engine, or "".
        start_time: `time.perf_counter()` before the process started.
    """

    def __init__(self, engine: str, setting: Setting) -> None:
        self.engine = engine
        caches = ("DDPM_FAST_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        variables = (
            {} if setting.folder is None else {name: f"{setting.folder}/{name}" for name in caches}
        )
        self.start_time = time.perf_counter()
        self._worker = JsonWorker(
            "ddpm_fast.benchmark.worker", [engine, json.dumps(asdict(setting))], variables
        )
        try:
            hello = self._checked(self._worker.receive(TIMEOUT))
        except BaseException:
            self.close()
            raise
        self.name, self.reason = hello["name"], hello["reason"]

    def request(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request of `worker` and returns its answer."""
        return self._checked(self._worker.request(dict(do=do, **arguments), TIMEOUT))

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "unavailable" in answer:
            raise RuntimeError(answer["unavailable"])
        return answer

    def close(self) -> None:
        self._worker.close()


class ReferenceCheck:
    """Check of an engine's outputs against the network in fp64."""

    def __init__(self, workload: Workload) -> None:
        self.workload, unet = workload, workload.unet
        self._exact = type(unet)(unet.config).double().eval()
        self._exact.load_state_dict(unet.state_dict())
        self._exact.to(workload.device)

    @torch.no_grad()
    def error(self, process: EngineProcess, batch: int) -> float:
        """Returns the relative error of a forward pass; RuntimeError if that or the loop is wrong."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.pt"
            process.request("check", batch=batch, out=str(out))
            results = torch.load(out, weights_only=True)
        x, *rest = (v[[0, -1]] for v in self.workload.inputs(batch))
        error = relative_error(results["output"], self._exact(x.double(), *rest).cpu())
        allowed = TOLERANCES[self.workload.dtype]
        if not error <= allowed:
            raise RuntimeError(
                f"not timed: the relative error of its output is {error:.1e}; expected at most {allowed:.1e}"
            )
        images, clip = results["images"], self.workload.checkpoint.clip
        if not images.isfinite().all() or (clip is not None and images.abs().max() > 1.05 * clip):
            raise RuntimeError("not timed: its loop does not end in images")
        if "reference_images" in results:
            error_of_steps = relative_error(images, results["reference_images"])
            if not error_of_steps <= STEP_TOLERANCE:
                raise RuntimeError(
                    f"not timed: the relative error of its steps is {error_of_steps:.1e}; expected at most {STEP_TOLERANCE:.1e}"
                )
        return error


# ---- statistics


def interval(values: Iterable[float], probability: float = 0.95) -> tuple[float, float, float]:
    """Confidence interval of the median of a distribution, by order statistics of its samples.

    The number of samples below the median is binomial. Of fewer than six values, their range.

    Returns:
        (median of the values, lower end, upper end)
    """
    v = sorted(values)
    n, outside, k = len(v), 0.0, 0
    while k < (n - 1) // 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 1 - probability:
        outside += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return statistics.median(v), v[k - 1], v[n - k]


def summarize(times: list[float], ddpm_fast_times: list[float]) -> dict[str, Any]:
    """Milliseconds, and the speedup of ddpm_fast in the same rounds: medians with their intervals."""
    ms, low, high = (_short(1e3 * v) for v in interval(times))
    ratios = (a / b for a, b in zip(times, ddpm_fast_times, strict=True))
    speedup, least, most = (_short(v) for v in interval(ratios))
    return dict(ms=ms, low=low, high=high, speedup=speedup, speedup_range=[least, most])


def _short(v: float) -> float:
    return float(f"{v:.4g}")


def case_of(setting: Setting, batch: int, workload: Workload) -> Case:
    """Identity of a case: two cases with equal values can be compared."""
    on_gpu = workload.device.type == "cuda"
    name = torch.cuda.get_device_name(workload.device) if on_gpu else environment()["cpu"]
    what = dict(batch=batch, dtype=setting.dtype, size=list(workload.shape[1:]))
    return dict(**what, device=workload.device.type, device_name=name, threads=setting.threads)


# ---- comparison


@contextmanager
def comparison(
    setting: Setting,
    engines: list[str],
    first_batch: int,
    effort: Effort,
    log: Callable[[str], None] = print,
) -> Iterator[Comparison]:
    """Context manager that starts the engines one after another, and ends them.

    Args:
        setting: What the engines run.
        engines: Names as `baselines.baseline` takes them; speedups are those of the first.
        first_batch: Batch size of the first images of each process.
        effort: How long it takes.
        log: Called with a line for each engine that is left out.

    Raises:
        RuntimeError: The first engine is unavailable or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        c = Comparison(setting, effort, log, Path(folder))
        try:
            for name in engines:
                c.start(name, first_batch)
            yield c
        finally:
            for process in c.processes:
                process.close()


class Comparison:
    """Engines that run one workload. Speedups are those of the first engine over the others."""

    def __init__(
        self, setting: Setting, effort: Effort, log: Callable[[str], None], folder: Path
    ) -> None:
        self.setting, self.effort, self.log, self.folder = setting, effort, log, folder
        self.workload = setting.workload()
        self.check = ReferenceCheck(self.workload)
        self.processes: list[EngineProcess] = []
        self.starts: dict[str, dict[str, float]] = {}
        self.left_out: dict[str, str] = {}

    def start(self, engine: str, batch: int) -> None:
        """Starts an engine with empty caches and times its first images; then with the caches it filled."""
        setting = replace(self.setting, folder=tempfile.mkdtemp(dir=self.folder))
        with self._or_left_out(engine):
            process = self._first_images(engine, setting, batch, "first_image_s")
            if self.starts[engine]["first_image_s"] < self.effort.warm_start_limit:
                process.close()
                process = self._first_images(engine, setting, batch, "warm_first_image_s")
            self.processes.append(process)

    def _first_images(self, engine: str, setting: Setting, batch: int, key: str) -> EngineProcess:
        process = EngineProcess(engine, setting)
        try:
            process.request("loop", batch=batch, steps=min(FIRST_STEPS, self.timesteps))
        except BaseException:
            process.close()
            raise
        self.starts.setdefault(engine, {})[key] = round(time.perf_counter() - process.start_time, 2)
        return process

    @contextmanager
    def _or_left_out(self, engine: str) -> Iterator[None]:
        """Leaves out an engine that fails inside, and logs the reason. The first engine's failure is raised."""
        try:
            yield
        except RuntimeError as error:
            failed = [process for process in self.processes if process.engine == engine]
            if not self.processes or failed == self.processes[:1]:
                raise RuntimeError(f"{engine}: {error}") from error
            self.left_out[engine] = str(error)
            self.log(f"{engine} left out: {error}")
            for process in failed:
                self.processes.remove(process)
                process.close()

    def case(self, batch: int, steps: int | None = None) -> Case:
        """Checks and times all engines at one batch size.

        Args:
            batch: Images per call.
            steps: Of the loops, if the effort names none.

        Returns:
            The case, with a row for each engine.

        Raises:
            RuntimeError: The first engine is wrong or fails.
        """
        errors = {}
        for process in list(self.processes):
            with self._or_left_out(process.engine):
                errors[process.engine] = self.check.error(process, batch)
        steps = self.effort.steps or steps or self._steps(batch)
        times: dict[str, dict[str, list[float]]] = {
            do: {p.engine: [] for p in self.processes} for do in ("forward", "loop")
        }
        start, rounds = time.perf_counter(), 0
        while rounds < MIN_ROUNDS or time.perf_counter() - start < self.effort.seconds:
            for process in random.Random(rounds).sample(
                self.processes, len(self.processes)
            ):  # another order each time
                time.sleep(self.effort.rest)
                with self._or_left_out(process.engine):
                    for do in times:
                        per_image = batch * (steps if do == "loop" else 1)
                        answer = process.request(
                            do, batch=batch, steps=steps, duration=self.effort.burst
                        )
                        times[do][process.engine].append(
                            statistics.median(answer["times"]) / per_image
                        )
            rounds += 1
        rows = [
            self._row(process, batch, errors[process.engine], times) for process in self.processes
        ]
        more = dict(
            steps=steps,
            rounds=rounds,
            load=round(os.getloadavg()[0], 2),
            left_out=dict(self.left_out),
        )
        return dict(**case_of(self.setting, batch, self.workload), **more, rows=rows)

    def _steps(self, batch: int) -> int:
        """Number of steps that the slowest engine does per second, 4 to 50."""
        few, slowest = min(4, self.timesteps), 0.0
        for process in list(self.processes):
            with self._or_left_out(process.engine):
                slowest = max(
                    slowest, process.request("loop", batch=batch, steps=few)["seconds"] / few
                )
        return max(few, min(50, self.timesteps, round(1 / slowest)))

    @property
    def timesteps(self) -> int:
        return len(self.workload.checkpoint.schedule)

    def _row(
        self,
        process: EngineProcess,
        batch: int,
        error: float,
        times: dict[str, dict[str, list[float]]],
    ) -> dict[str, Any]:
        first, engine = self.processes[0].engine, process.engine
        row = dict(engine=engine, name=process.name, reason=process.reason, error=_short(error))
        row |= {do: summarize(seconds[engine], seconds[first]) for do, seconds in times.items()}
        row["images_per_s"] = _short(1e3 / (row["loop"]["ms"] * self.timesteps))  # of all timesteps
        row["peak_bytes"] = process.request("memory", batch=batch)["bytes"]
        return row | self.starts[engine]
