"""Projection of the time embedding for all layers, for networks with too many classes for a table.

One matrix product per step: row n is W SiLU(time[t_n] + classes[label_n]) + bias, which the norms
of image n read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import PRECISION, Tiles, cast, launch_conv, load_rows
from ._launch import begin
from ._triton import tl, triton


def time_embedding_reference(
    time: Tensor, classes: Tensor, t: Tensor, label: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """time [T, D], classes [K, D], t and label [N], weight [S, D], bias [S] -> [N, S]."""
    return F.linear(F.silu(time[t.long()] + classes[label.long()]), weight, bias)


@triton.jit(do_not_specialize=["N", "S"])
def _time_embedding_kernel(
    time_ptr,
    classes_ptr,
    t_ptr,
    label_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    N,
    S,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    outputs = tl.cdiv(S, BLOCK_N)
    o0 = tl.program_id(0) % outputs * BLOCK_N
    n = tl.program_id(0) // outputs * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = n < N
    t = tl.load(t_ptr + n, mask=exists, other=0).to(tl.int64)
    label = tl.load(label_ptr + n, mask=exists, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        d = k + tl.arange(0, BLOCK_K)
        a = tl.load(time_ptr + t[:, None] * D + d[None, :], mask=exists[:, None], other=0.0)
        a += tl.load(classes_ptr + label[:, None] * D + d[None, :], mask=exists[:, None], other=0.0)
        w = load_rows(w_ptr, o0, k, S, D, BLOCK_N, BLOCK_K)
        acc = tl.dot((a * tl.sigmoid(a)).to(w.dtype), w.T, acc, input_precision=PRECISION)
    cols = o0 + tl.arange(0, BLOCK_N)
    acc += tl.load(bias_ptr + cols, mask=cols < S, other=0.0)[None, :]
    tl.store(
        out_ptr + n.to(tl.int64)[:, None] * S + cols[None, :],
        acc,
        mask=exists[:, None] & (cols < S)[None, :],
    )


@dataclass(frozen=True, eq=False)
class TimeEmbeddingProjection:
    """W SiLU(time[t] + classes[label]) + bias for all layers; writes rows [N, S] fp32.

    Args:
        time: [T, D] fp32, embedding of each timestep.
        classes: [K, D] fp32, embedding of each class.
        weight: [S, D], projections of all layers, in the type of the operands.
        bias: [S] fp32.
        tiles: Tile sizes.
    """

    time: Tensor
    classes: Tensor
    weight: Tensor
    bias: Tensor
    tiles: Tiles
    name = "time_embedding"

    def run(self, out: FeatureMap, t: Tensor, label: Tensor) -> None:
        tiles, (s, d) = self.tiles, self.weight.shape
        launch_conv(
            _time_embedding_kernel,
            tiles,
            self.grid(out),
            self.time,
            self.classes,
            t,
            label,
            self.weight,
            self.bias,
            out.rows,
            out.images,
            s,
            D=d,
            PRECISION=PRECISION[self.weight.dtype],
        )

    def fallback(
        self, out: FeatureMap, t: Tensor, label: Tensor, compute: torch.dtype | None = None
    ) -> None:
        weight = cast(self.weight, compute)
        hidden = F.silu(self.time[t.long()] + self.classes[label.long()])
        hidden = hidden.to(self.weight.dtype).to(weight.dtype)  # rounded as in the kernel
        out.rows.copy_(F.linear(hidden, weight) + self.bias.to(weight.dtype))

    def grid(self, out: FeatureMap, **_: FeatureMap) -> int:
        """Returns the number of tiles."""
        t = self.tiles
        return triton.cdiv(out.images, t.block_m) * triton.cdiv(len(self.weight), t.block_n)

    def cost(self, out: FeatureMap, **_: object) -> tuple[int, int]:
        weight = self.weight
        moved = weight.numel() * weight.element_size() + out.rows.numel() * 4
        return 2 * out.images * weight.numel(), moved
