"""Sampling callbacks: trajectories and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..utils.validation import integer
from .output import copy_to_host

Callback = Callable[[int, int, Tensor], None]  # (step, t, x)


class Trajectory:
    """Callback that records the state x_t after every `every`-th step.

    Each run of `Sampler.sample` or `Sampler.stream` replaces the records of the previous one. A
    batch that was stopped or repeated before its last step is left out.

    Args:
        every: Number of steps between two records, at least 1.

    Attributes:
        t: The recorded timesteps, a list of length K.
        x: The recorded states, fp32 [K, N, C, H, W] on the CPU.
    """

    def __init__(self, every: int = 1) -> None:
        if integer("every", every) < 1:
            raise ValueError(f"every = {every}; expected at least 1")
        self.every = every
        self.begin_run()

    def begin_run(self) -> None:
        """Removes all records."""
        self._batches: list[dict[int, Tensor]] = []  # per batch: states by step
        self._last: list[int] = []  # per batch: the last step
        self._timesteps: dict[int, int] = {}

    def __call__(self, step: int, t: int, x: Tensor) -> None:
        if step == 0 or not self._batches:
            self._batches.append({})
            self._last.append(step)
        self._last[-1] = step
        if (step + 1) % self.every == 0:
            self._batches[-1][step] = copy_to_host(x) if x.is_cuda else x.clone()
            self._timesteps[step] = t

    @property
    def t(self) -> list[int]:
        return list(self._timesteps.values())

    @property
    def x(self) -> Tensor:
        if not self._timesteps:
            raise RuntimeError(
                "the trajectory has no records; pass it as callback= to Sampler.sample, with at "
                f"least every = {self.every} steps"
            )
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are asynchronous
        steps = max(self._last)
        finished = [b for b, last in zip(self._batches, self._last, strict=True) if last == steps]
        return torch.stack([torch.cat([b[step] for b in finished]) for step in finished[0]])


def without_padding(callback: Callback | None, count: int) -> Callback | None:
    """Returns a callback that passes the first `count` images on; the rest are padding."""
    return None if callback is None else lambda step, t, x: callback(step, t, x[:count])


class _NoBar:
    def update(self, count: int = 1) -> None:
        pass


def progress_bar(progress: bool, total: int, unit: str = "image-step") -> Any:
    """Context manager of a tqdm bar over `total` units; of an invisible one without `progress`."""
    if not progress:
        return nullcontext(_NoBar())
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, leave=False)
