"""Time-embedding table: precomputed projections of the time embedding for all residual blocks.

All engines use `time_table`; the CPU engine uses `TimeTable`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .unet import UNet

LARGEST = 256 * 2**20  # bytes of a table of all (t, class)


def time_table(time: Tensor, classes: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """Computes row t * K + class, weight SiLU(time[t] + classes[class]) + bias, for all (t, class).

    Args:
        time: Embeddings of the timesteps, [T, D].
        classes: Embeddings of the classes, [K, D]; one row of zeros if there are none.
        weight: Projections of all blocks, [S, D].
        bias: [S].

    Returns:
        [T * K, S] fp32; None if it is larger than `LARGEST`.
    """
    if len(time) * len(classes) * len(weight) * 4 > LARGEST:
        return None
    return F.linear(F.silu(time[:, None] + classes).flatten(0, 1), weight, bias).float()


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: row `index` [B] of `table` [R, S]."""

    table: Tensor
    index: NDArray[np.int64]

    @property
    def addresses(self) -> NDArray[np.int64]:
        return self.table.data_ptr() + self.index * self.table.stride(0) * 4


class TimeTable:
    """Rows weight SiLU(embedding of (t, class)) + bias, fp32.

    The rows are one table or, if it is too large, are computed on demand. Each is then computed
    separately, because its last bit could depend on the size of a batch.

    Args:
        unet: The network.
        weight, bias: Projections of all blocks, [S, D] and [S].
        timesteps: T.
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
        """Returns the rows of t [B] and labels [B] or None, both int64."""
        labels = torch.zeros_like(t) if labels is None else labels
        if self._table is not None:
            return Rows(self._table, (t * self.classes + labels).numpy())
        pairs = list(zip(t.tolist(), labels.tolist(), strict=True))
        index = {pair: k for k, pair in enumerate(dict.fromkeys(pairs))}
        rows = [
            F.linear(F.silu(self._time[a] + self._class[b])[None], self._weight, self._bias)
            for a, b in index
        ]
        return Rows(torch.cat(rows), np.array([index[pair] for pair in pairs]))
