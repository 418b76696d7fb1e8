"""Timer of one call: median over repeated runs, synchronized with the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]  # one measured case, as written to JSON and shown as a line of a table


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median of `runs`, and interquartile range relative to the median."""

    median: float
    spread: float
    runs: int


def row_of(timing: Timing) -> Row:
    return dict(ms=1e3 * timing.median, spread=timing.spread, runs=timing.runs)


def measure(
    call: Callable[[], object],
    device: torch.device,
    seconds: float = 0.5,
    least: int = 5,
    captured: bool = False,
) -> Timing:
    """Times `call` after a warm-up: by CUDA events on a GPU, by the host's clock on a CPU.

    Args:
        call: Called with no arguments.
        device: Device that runs it.
        seconds: Shortest total time of the timed runs.
        least: Smallest number of timed runs.
        captured: On a GPU, replays ten calls as one CUDA graph, which excludes the host's time to
            launch a short call.
    """
    start_time = time.perf_counter()
    for _ in range(3):
        call()
        if time.perf_counter() - start_time > seconds:
            break
    _wait(device)
    calls = 1
    if captured and device.type == "cuda":
        calls = 10
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        call = graph.replay
        call()
    times: list[float] = []
    start_time = time.perf_counter()
    while len(times) < least or time.perf_counter() - start_time < seconds:
        times.append(_once(call, device) / calls)
    times.sort()
    quarter = len(times) // 4
    median = times[len(times) // 2]
    return Timing(median, (times[-1 - quarter] - times[quarter]) / median, len(times))


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_time = time.perf_counter()
    call()
    return time.perf_counter() - start_time


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
