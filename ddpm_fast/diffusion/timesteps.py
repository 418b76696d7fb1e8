"""Timestep selection: which of the T timesteps a solver visits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

SPACINGS = ("linspace", "leading", "trailing", "quadratic", "openai")
Steps = int | str | Sequence[int] | None


def choose_timesteps(total: int, steps: Steps, spacing: str = "linspace") -> NDArray[np.int64]:
    """Returns the timesteps to visit, decreasing, each in 0 ... total-1.

    Args:
        total: T, the length of the training chain.
        steps: Number n of steps; or the timesteps, decreasing; or None: all of them. A string
            selects the spacing "openai".
        spacing: For n of T steps:
            "linspace": from T-1 to 0, both visited, rounded to the nearest; T-1 if n = 1;
            "leading": 0, k, 2k, ... with k = T // n; starts below T-1 unless k = 1 (diffusers);
            "trailing": T-1, T-1 - T/n, ...; ends above 0 (Lin et al. 2024);
            "quadratic": floor of the squares of n even steps from 0 to sqrt(0.8 T) (Song et al.
            2021, appendix D.2). Equal timesteps are visited once, so fewer than n may result;
            "openai": "10,20,30" takes that many steps from each third of the chain, "250" is one
            section, "ddim50" has an integer stride (Nichol & Dhariwal 2021).

    Raises:
        ValueError: The count is not in 1 ... total, the list does not decrease or leaves
            0 ... total-1, the sections do not fit, or the spacing is unknown.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r}; expected one of {', '.join(SPACINGS)}")
    if isinstance(steps, str):
        return _sections(total, steps)
    if isinstance(steps, (Sequence, np.ndarray, torch.Tensor)):
        return _check_list(total, np.asarray(steps))
    if steps is None:
        steps = total
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool):
        raise ValueError(
            f"steps = {steps!r}; expected a number of steps, a list of timesteps, or sections such "
            "as '10,20,30'"
        )
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} steps; expected 1 to {total}, the length of the training chain")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps)
    if spacing == "trailing":
        return np.round(total - np.arange(steps) * total / steps).astype(np.int64) - 1
    if spacing == "quadratic":
        return np.unique((np.linspace(0, np.sqrt(0.8 * total), steps) ** 2).astype(np.int64))[::-1]
    if spacing == "openai":
        return _sections(total, str(steps))
    return np.round(np.linspace(total - 1, 0, steps)).astype(np.int64)


def _check_list(total: int, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    within = (
        chosen.size and chosen.dtype.kind in "iu" and chosen.max() < total and chosen.min() >= 0
    )
    if not within or (np.diff(chosen) >= 0).any():
        raise ValueError(
            f"steps = {chosen.tolist()[:8]} ...; expected decreasing timesteps in 0..{total - 1}"
        )
    return chosen.astype(np.int64)


def _sections(total: int, text: str) -> NDArray[np.int64]:
    """Even, rounded steps in each section, from its first to its last timestep."""
    stride_only = text.startswith("ddim")
    try:
        counts = [int(part) for part in text.removeprefix("ddim").split(",")]
    except ValueError:
        raise ValueError(
            f"steps {text!r}; expected a number, or sections such as '10,20,30' or 'ddim50'"
        ) from None
    if stride_only:
        if len(counts) == 1:
            for stride in range(1, total + 1):
                if -(-total // stride) == counts[0]:
                    return np.arange(0, total, stride)[::-1]
        raise ValueError(
            f"steps {text!r}: no integer stride visits exactly that many of {total} timesteps"
        )
    sizes = [total // len(counts) + (i < total % len(counts)) for i in range(len(counts))]
    chosen, first = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if not 1 <= count <= size:
            raise ValueError(
                f"steps {text!r}: {count} steps in a section of {size}; expected 1 to {size}"
            )
        # the stride is summed, not multiplied, as by OpenAI: its rounding errors decide ties
        step = (size - 1) / (count - 1) if count > 1 else 1.0
        chosen.append(first + np.round(np.cumsum([0.0] + [step] * (count - 1))).astype(np.int64))
        first += size
    return np.concatenate(chosen)[::-1]
