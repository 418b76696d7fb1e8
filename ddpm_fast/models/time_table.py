"""Time-embedding table: the projections for every residual block, looked up instead of computed.

`time_table` makes it for every engine; `TimeTable` gives the CPU engine its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .unet import UNet

LARGEST = 256 * 2**20  # bytes that a table of all (t, class) may take


def time_table(time: Tensor, classes: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """Computes row t * K + class = weight SiLU(time[t] + classes[class]) + bias for every (t, class).

    Args:
        time: Embeddings of the timesteps, [T, D].
        classes: Embeddings of the classes, [K, D]; one row of zeros if there are none.
        weight: Projections of all blocks, [S, D].
        bias: [S].

    Returns:
        [T * K, S] fp32; None if it takes more than `LARGEST` bytes.
    """
    if len(time) * len(classes) * len(weight) * 4 > LARGEST:
        return None
    return F.linear(F.silu(time[:, None] + classes).flatten(0, 1), weight, bias).float()


@dataclass(frozen=True)
class Rows:
    """The rows of some images: number `index` of `table` [R, S]."""

    table: Tensor
    index: NDArray[np.int64]

    @property
    def addresses(self) -> NDArray[np.int64]:
        return self.table.data_ptr() + self.index * self.table.stride(0) * 4


class TimeTable:
    """row(t, class) = weight SiLU(embedding of (t, class)) + bias, fp32.

    One table of all rows, or, if that is too large, each row by itself on demand: never in a batch whose size
    could change its last bit.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet, weight: Tensor, bias: Tensor, timesteps: int) -> None:
        classes = unet.config.num_classes
        self.classes, self.timesteps = classes or 1, timesteps
        self._weight, self._bias = weight, bias
        self._time = unet.embed(torch.arange(timesteps), None).clone()
        self._class = (
            unet.class_embedding.weight.detach().clone()
            if classes
            else torch.zeros(1, self._time.shape[1])
        )
        self._table = time_table(self._time, self._class, weight, bias)

    @property
    def nbytes(self) -> int:
        tables = (self._weight, self._bias, self._time, self._class, self._table)
        return sum(t.nbytes for t in tables if t is not None)

    @torch.no_grad()
    def rows(self, t: Tensor, labels: Tensor | None) -> Rows:
        """t [B], labels [B] int64 -> the images' rows."""
        labels = torch.zeros_like(t) if labels is None else labels
        if self._table is not None:
            return Rows(self._table, (t * self.classes + labels).numpy())
        pairs = list(zip(t.tolist(), labels.tolist(), strict=True))
        number = {pair: k for k, pair in enumerate(dict.fromkeys(pairs))}
        each = [
            F.linear(F.silu(self._time[a] + self._class[b])[None], self._weight, self._bias)
            for a, b in number
        ]
        return Rows(torch.cat(each), np.array([number[pair] for pair in pairs]))
