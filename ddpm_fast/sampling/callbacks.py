"""Looking on while images are drawn: callbacks, trajectories, the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .output import to_host

Callback = Callable[[int, int, Tensor], None]  # (step, t, x)


class Trajectory:
    """A callback that keeps x after every `every`-th step: `t` [K] the timesteps, `x` [K, N, C, H, W] fp32 on the CPU."""

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every = {every}; expected at least 1")
        self.every = every
        self._kept: dict[int, list[Tensor]] = {}
        self._t: dict[int, int] = {}

    def __call__(self, step: int, t: int, x: Tensor) -> None:
        if (step + 1) % self.every == 0:
            self._kept.setdefault(step, []).append(to_host(x) if x.is_cuda else x.clone())
            self._t[step] = t

    @property
    def t(self) -> list[int]:
        return list(self._t.values())

    @property
    def x(self) -> Tensor:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies may still be under way
        return torch.stack([torch.cat(batches) for batches in self._kept.values()])


def of_first(count: int, callback: Callback | None) -> Callback | None:
    """The callback on the images that were asked for, without the padding."""
    return None if callback is None else lambda step, t, x: callback(step, t, x[:count])


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass


def bar_of(progress: bool, total: int) -> Any:
    """A tqdm bar over `total` steps of images, or what takes its place without one."""
    if not progress:
        return _Silent()
    from tqdm import tqdm

    return tqdm(total=total, unit="image-step", leave=False)
