"""Projection of the time embedding for every layer, for networks with more classes than a table of
all (t, class) can hold.

One matrix product per step: row n holds what image n's residual blocks add, W SiLU(time[t_n] + classes[label_n]) + b.
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
    """W SiLU(time[t] + classes[label]) + bias for every layer. See `time_embedding_reference`.

    time [T, D], classes [K, D], bias [S] fp32; weight [S, D] in the operands' type. Writes fp32 rows [N, S].
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
        hidden = (
            F.silu(self.time[t.long()] + self.classes[label.long()])
            .to(self.weight.dtype)
            .to(weight.dtype)
        )
        out.rows.copy_(F.linear(hidden, weight) + self.bias.to(weight.dtype))

    def grid(self, out: FeatureMap, **_: FeatureMap) -> int:
        """Tiles of the product."""
        return triton.cdiv(out.images, self.tiles.block_m) * triton.cdiv(
            len(self.weight), self.tiles.block_n
        )

    def cost(self, out: FeatureMap, **_: object) -> tuple[int, int]:
        s, d = self.weight.shape
        return (
            2 * out.images * s * d,
            self.weight.numel() * self.weight.element_size() + out.rows.numel() * 4,
        )
