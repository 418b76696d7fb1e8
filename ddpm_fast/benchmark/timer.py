"""Timing that waits for the device, and does not believe a single run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]  # what is known of one case: it becomes JSON, and a line of a table


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of `runs`, and how far the middle half spreads, relative to it."""

    median: float
    spread: float
    runs: int


def row_of(timing: Timing) -> Row:
    return dict(ms=1e3 * timing.median, spread=timing.spread, runs=timing.runs)


def measure(
    call: Callable[[], object], device: torch.device, seconds: float = 0.5, least: int = 5, captured: bool = False
) -> Timing:
    """Warms up, then times at least `least` runs until `seconds` have passed: by events on a GPU, by the clock on a CPU.

    captured: on a GPU, replay ten calls as one CUDA graph, so that the time is the device's alone; without it the time of a
    short call is the host's time to launch it.
    """
    began = time.perf_counter()
    for _ in range(3):
        call()
        if time.perf_counter() - began > seconds:
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
    began = time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
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
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
