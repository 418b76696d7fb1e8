"""Interleaved rounds of timings, and the statistics of their results.

In each round every engine has a turn, so a slowdown of the whole machine affects all of them. A
speedup is the ratio of two times of one round; its interval is that of a median.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

MIN_ROUNDS = 6  # the smallest number of values whose range holds their median with 95 % probability
REST = 0.2  # seconds, in which spinning threads of the previous engine go to sleep

T = TypeVar("T")


def turns(
    engines: list[T], rounds: int = MIN_ROUNDS, seconds: float = 0, rest: float = REST
) -> Iterator[T]:
    """Yields the engines in turns, in another order each round.

    Args:
        engines: An engine that is removed from the list has no further turns.
        rounds: Smallest number of rounds.
        seconds: Shortest total time.
        rest: Seconds before a turn.
    """
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        for engine in random.Random(done).sample(engines, len(engines)):
            if engine in engines:
                time.sleep(rest)
                yield engine
        done += 1


def interval(values: Iterable[float], probability: float = 0.95) -> tuple[float, float, float]:
    """Confidence interval of the median of a distribution, by order statistics of its samples.

    The number of samples below the median is binomial. The interval of fewer than six values is
    their range.

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
    """Milliseconds, and the speedup of ddpm_fast in the same rounds: medians with intervals.

    Args:
        times: Seconds of an engine, a value per round.
        ddpm_fast_times: Seconds of ddpm_fast in the same rounds.

    Returns:
        {"ms", "low", "high", "speedup", "speedup_range": [low, high]}
    """
    ms, low, high = (rounded(1e3 * v) for v in interval(times))
    ratios = (a / b for a, b in zip(times, ddpm_fast_times, strict=True))
    speedup, least, most = (rounded(v) for v in interval(ratios))
    return dict(ms=ms, low=low, high=high, speedup=speedup, speedup_range=[least, most])


def rounded(v: float) -> float:
    """The value with four significant digits."""
    return float(f"{v:.4g}")
