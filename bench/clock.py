"""Timing that waits for the device, and does not believe a single run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of `runs`, and how far the middle half spreads, relative to it."""

    median: float
    spread: float
    runs: int


def measure(call: Callable[[], object], device: torch.device, seconds: float = 0.5, least: int = 5) -> Timing:
    """Warms up, then times at least `least` single calls until `seconds` have passed: by events on a GPU, by the clock on a CPU."""
    began = time.perf_counter()
    for _ in range(3):
        call()
        if time.perf_counter() - began > seconds:
            break
    _wait(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        times.append(_once(call, device))
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
