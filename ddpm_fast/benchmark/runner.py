"""Engines taking turns: each in a process of its own, a burst after a rest, round after round.

A process each, because some engines keep their threads spinning after a call, and so that memory and the time to a first image are
one engine's alone. A ratio is of two bursts of one round; its interval is that of a median. Nothing is timed that is not right.
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from ..utils.environment import environment
from ..utils.numerics import relative_error
from .baselines import Subject
from .worker import Setting

Case = dict[str, Any]  # one batch size, in one type: becomes JSON
ALLOWED = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 0.05, "fp8": 0.15}  # relative error of a forward pass against fp64
STEPS_ALLOWED = 1e-4  # of images of our loop against the reference's steps with the same outputs of the network
FIRST_STEPS = 10  # of the loop that a process begins with
PATIENCE = 900  # seconds for an answer: compilers take minutes
LEAST = 6  # rounds: of so many, a median's interval has a probability of 95 %


@dataclass(frozen=True)
class Effort:
    """seconds  of rounds, for each batch size; there are at least `LEAST`
    burst    seconds an engine runs when it is its turn, for forward passes and for loops
    rest     seconds before, in which threads that still wait for work give up
    steps    of the sampling loops; None: as many as the slowest engine does in a second, 4 to 50
    again    an engine whose first start takes fewer seconds is started a second time, with what it could keep
    """

    seconds: float = 30
    burst: float = 0.3
    rest: float = 0.2
    steps: int | None = None
    again: float = 0


class Rival:
    """One engine's process. RuntimeError with a reason where it cannot be had, or ends."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.label = name
        spec = json.dumps(dict(baseline=name, setting=asdict(setting)))
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # nothing kept from before: ours, Triton's and torch.compile's
        caches = ("DDPM_FAST_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        env = {**os.environ, **({} if setting.folder is None else {name: f"{setting.folder}/{name}" for name in caches})}
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ddpm_fast.benchmark.worker", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        try:
            hello = self._read()
        except BaseException:
            self.close()
            raise
        self.name, self.reason = hello["name"], hello["reason"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(do=do, **request)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why, is read below
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._process.kill()
            raise RuntimeError(f"no answer within {PATIENCE} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"its process ended with {code}: {last[-1] if last else 'it said nothing'}")
        answer = json.loads(line)
        if "missing" in answer:
            raise RuntimeError(answer["missing"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # what it was asked last may still be on its way
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Truth:
    """What outputs are held against: the network in fp64."""

    def __init__(self, subject: Subject) -> None:
        self.subject, unet = subject, subject.unet
        self._exact = type(unet)(unet.config).double().eval()
        self._exact.load_state_dict(unet.state_dict())
        self._exact.to(subject.device)

    @torch.no_grad()
    def error(self, rival: Rival, batch: int) -> float:
        """Of a forward pass. RuntimeError where that or the loop is wrong: then nothing may be timed."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.pt"
            rival.ask("check", batch=batch, out=str(out))
            found = torch.load(out, weights_only=True)
        x, *rest = (v[[0, -1]] for v in self.subject.inputs(batch))
        error, allowed = relative_error(found["output"], self._exact(x.double(), *rest).cpu()), ALLOWED[self.subject.dtype]
        if not error <= allowed:
            raise RuntimeError(f"wrong, so not timed: its output is off by {error:.1e}, {allowed:.1e} allowed")
        images, clip = found["images"], self.subject.checkpoint.clip
        if not images.isfinite().all() or (clip is not None and images.abs().max() > 1.05 * clip):
            raise RuntimeError("wrong, so not timed: its loop does not end in images")
        if "stepped" in found and not (apart := relative_error(images, found["stepped"])) <= STEPS_ALLOWED:
            raise RuntimeError(f"wrong, so not timed: its steps are off by {apart:.1e}, {STEPS_ALLOWED:.1e} allowed")
        return error


# ---- figures


def interval(values: Iterable[float], probability: float = 0.95) -> tuple[float, float, float]:
    """(median, low, high): between the latter lies, with that probability, the median of whatever these are drawn from.

    By order statistics: the number of values below a median is binomial. Of fewer than six values, the extremes.
    """
    v = sorted(values)
    n, outside, k = len(v), 0.0, 0
    while k < (n - 1) // 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 1 - probability:
        outside += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return statistics.median(v), v[k - 1], v[n - k]


def figures(times: list[float], own: list[float]) -> dict[str, Any]:
    """Milliseconds, and how many times faster ours was in the same rounds: medians with their intervals."""
    ms, low, high = (_short(1e3 * v) for v in interval(times))
    ratio, least, most = (_short(v) for v in interval(a / b for a, b in zip(times, own, strict=True)))
    return dict(ms=ms, low=low, high=high, ours_is_faster_by=ratio, from_to=[least, most])


def _short(v: float) -> float:
    return float(f"{v:.4g}")


def case_of(setting: Setting, batch: int, subject: Subject) -> Case:
    """What a case is of: two with the same can be compared."""
    on_gpu = subject.device.type == "cuda"
    name = torch.cuda.get_device_name(subject.device) if on_gpu else environment()["cpu"]
    what = dict(batch=batch, dtype=setting.dtype, size=list(subject.shape[1:]))
    return dict(**what, device=subject.device.type, device_name=name, threads=setting.threads)


# ---- the race


@contextmanager
def race(
    setting: Setting, baselines: list[str], first_batch: int, effort: Effort, say: Callable[[str], None] = print
) -> Iterator[Race]:
    """The engines, begun one after another; `say` is told who cannot be had and why."""
    with tempfile.TemporaryDirectory() as folder:
        r = Race(setting, effort, say, Path(folder))
        try:
            for name in baselines:
                r.begin(name, first_batch)
            yield r
        finally:
            for rival in r.rivals:
                rival.close()


class Race:
    """Rivals over one network in one type. The first is the one that the others are measured by."""

    def __init__(self, setting: Setting, effort: Effort, say: Callable[[str], None], folder: Path) -> None:
        self.setting, self.effort, self.say, self.folder = setting, effort, say, folder
        self.subject = setting.subject()
        self.truth = Truth(self.subject)
        self.rivals: list[Rival] = []
        self.starts: dict[str, dict[str, float]] = {}
        self.left_out: dict[str, str] = {}

    def begin(self, name: str, batch: int) -> None:
        """Starts an engine with nothing kept; how long until its first images are there; and again, with what it kept."""
        home = tempfile.mkdtemp(dir=self.folder)
        setting = replace(self.setting, folder=home)
        with self._or_left_out(name):
            rival = self._first_images(name, setting, batch, "first_image_s")
            if self.starts[name]["first_image_s"] < self.effort.again:
                rival.close()
                rival = self._first_images(name, setting, batch, "again_s")
            self.rivals.append(rival)

    def _first_images(self, name: str, setting: Setting, batch: int, which: str) -> Rival:
        rival = Rival(name, setting)
        try:
            rival.ask("loop", batch=batch, steps=min(FIRST_STEPS, self.chain))
        except BaseException:
            rival.close()
            raise
        self.starts.setdefault(name, {})[which] = round(time.perf_counter() - rival.began, 2)
        return rival

    @contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        """From here on goes without an engine that fails inside, and says so. The first is the one that nothing goes without."""
        try:
            yield
        except RuntimeError as error:
            gone = [rival for rival in self.rivals if rival.label == name]
            if not self.rivals or gone == self.rivals[:1]:
                raise RuntimeError(f"{name}: {error}") from error
            self.left_out[name] = str(error)
            self.say(f"{name} left out: {error}")
            for rival in gone:
                self.rivals.remove(rival)
                rival.close()

    def case(self, batch: int, steps: int | None = None) -> Case:
        """One batch size: errors, rounds, and a row for each engine. RuntimeError where ours cannot be timed.

        steps: of the loops, where the effort names none
        """
        errors = {}
        for rival in list(self.rivals):
            with self._or_left_out(rival.label):
                errors[rival.label] = self.truth.error(rival, batch)
        steps = self.effort.steps or steps or self._steps(batch)
        times: dict[str, dict[str, list[float]]] = {do: {r.label: [] for r in self.rivals} for do in ("forward", "loop")}
        began, rounds = time.perf_counter(), 0
        while rounds < LEAST or time.perf_counter() - began < self.effort.seconds:
            for rival in random.Random(rounds).sample(self.rivals, len(self.rivals)):  # in another order each time
                time.sleep(self.effort.rest)
                with self._or_left_out(rival.label):
                    for do in times:
                        found = rival.ask(do, **{"batch": batch, "steps": steps, "for": self.effort.burst})["times"]
                        per_image = batch * (steps if do == "loop" else 1)
                        times[do][rival.label].append(statistics.median(found) / per_image)
            rounds += 1
        rows = [self._row(rival, batch, errors[rival.label], times) for rival in self.rivals]
        more = dict(steps=steps, rounds=rounds, load=round(os.getloadavg()[0], 2), left_out=dict(self.left_out))
        return dict(**case_of(self.setting, batch, self.subject), **more, rows=rows)

    def _steps(self, batch: int) -> int:
        """As many as the slowest does in a second."""
        few, slowest = min(4, self.chain), 0.0
        for rival in list(self.rivals):
            with self._or_left_out(rival.label):
                slowest = max(slowest, rival.ask("loop", batch=batch, steps=few)["seconds"] / few)
        return max(few, min(50, self.chain, round(1 / slowest)))

    @property
    def chain(self) -> int:
        return len(self.subject.checkpoint.schedule)

    def _row(self, rival: Rival, batch: int, error: float, times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
        row = dict(engine=rival.label, name=rival.name, reason=rival.reason, error=_short(error))
        row |= {do: figures(t[rival.label], t[self.rivals[0].label]) for do, t in times.items()}
        row["images_per_s"] = _short(1e3 / (row["loop"]["ms"] * self.chain))  # of the whole chain
        row["peak_bytes"] = rival.ask("memory", batch=batch)["bytes"]
        return row | self.starts[rival.label]
