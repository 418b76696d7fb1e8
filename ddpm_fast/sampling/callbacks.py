"""Sampling callbacks: trajectories and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .output import copy_to_host

Callback = Callable[[int, int, Tensor], None]  # (step, t, x)


class Trajectory:
    """Callback that records the state x_t after every `every`-th step.

    Attributes:
        t: the recorded timesteps, a list of length K.
        x: the recorded states, fp32 [K, N, C, H, W] on the CPU.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every = {every}; expected at least 1")
        self.every = every
        self._states: dict[int, list[Tensor]] = {}  # by step, one entry per batch
        self._timesteps: dict[int, int] = {}

    def __call__(self, step: int, t: int, x: Tensor) -> None:
        if (step + 1) % self.every == 0:
            self._states.setdefault(step, []).append(copy_to_host(x) if x.is_cuda else x.clone())
            self._timesteps[step] = t

    @property
    def t(self) -> list[int]:
        return list(self._timesteps.values())

    @property
    def x(self) -> Tensor:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are asynchronous
        return torch.stack([torch.cat(batches) for batches in self._states.values()])


def without_padding(callback: Callback | None, count: int) -> Callback | None:
    """The callback, called with the first `count` images of the batch; the rest are padding."""
    return None if callback is None else lambda step, t, x: callback(step, t, x[:count])


class _NoBar:
    def update(self, count: int = 1) -> None:
        pass


def progress_bar(progress: bool, total: int) -> Any:
    """A tqdm bar over `total` image-steps, as a context manager; without `progress`, an object that shows nothing."""
    if not progress:
        return nullcontext(_NoBar())
    from tqdm import tqdm

    return tqdm(total=total, unit="image-step", leave=False)
