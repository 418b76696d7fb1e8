"""1x1 convolution of one map, or of two maps concatenated along the channels.

A matrix product of the maps' rows with the weights; all operands are loaded through pointers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import (
    PRECISION,
    TRITON_TYPE,
    Tiles,
    cast,
    cost_of_conv,
    launch_conv,
    load_rows,
    pixel_of,
)
from ._launch import begin
from ._triton import tl, triton


def conv1x1_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x [N, C, H, W], weight [K, C], residual [N, K, H, W] -> W x + bias + scale * residual."""
    y = F.conv2d(x, weight[:, :, None, None], bias)
    return y if residual is None else y + scale * residual


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _conv1x1_kernel(
    x_ptr,
    x2_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    residual_ptr,
    residual_scale,
    ROWS,
    H,
    W,
    K,
    C: tl.constexpr,
    C2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out = tl.cdiv(K, BLOCK_N)
    o0 = (tl.program_id(0) % n_out) * BLOCK_N
    m0 = (tl.program_id(0) // n_out) * BLOCK_M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(C // BLOCK_K):
        a = load_rows(x_ptr, m0, k * BLOCK_K, ROWS, C, BLOCK_M, BLOCK_K)
        acc = tl.dot(
            a,
            load_rows(w_ptr, o0, k * BLOCK_K, K, C + C2, BLOCK_N, BLOCK_K).T,
            acc,
            input_precision=PRECISION,
        )
    for k in range(C2 // BLOCK_K):
        a = load_rows(x2_ptr, m0, k * BLOCK_K, ROWS, C2, BLOCK_M, BLOCK_K)
        acc = tl.dot(
            a,
            load_rows(w_ptr, o0, C + k * BLOCK_K, K, C + C2, BLOCK_N, BLOCK_K).T,
            acc,
            input_precision=PRECISION,
        )
    rows = m0 + tl.arange(0, BLOCK_M)
    cols = o0 + tl.arange(0, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * K + cols[None, :]
    exists = (rows < ROWS)[:, None] & (cols < K)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    if RESIDUAL:
        acc += residual_scale * tl.load(residual_ptr + offsets, mask=exists, other=0.0).to(
            tl.float32
        )
    if BORDER:
        _, _, _, inside = pixel_of(rows, ROWS, H, W, 1)
        acc = tl.where(inside[:, None], acc, 0.0)
    tl.store(y_ptr + offsets, acc.to(OUT), mask=exists)


@dataclass(frozen=True, eq=False)
class Conv1x1:
    """1x1 convolution + bias + residual_scale * residual, of one map or two concatenated maps.

    Reads maps [N, H, W, C] and [N, H, W, C2] and a residual [N, H, W, K], writes a map
    [N, H, W, K]; all dense or all bordered.

    Args:
        weight: [K, C + C2], in the type of the operands.
        bias: [K] fp32, or None.
        tiles: Tile sizes.
        residual_scale: Factor of the residual.
    """

    weight: Tensor
    bias: Tensor | None
    tiles: Tiles
    residual_scale: float = 1.0
    name = "conv1x1"

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        tiles: Tiles,
        residual_scale: float = 1.0,
    ) -> Conv1x1:
        bias = None if bias is None else bias.float()
        return cls(weight.to(dtype).contiguous(), bias, tiles, residual_scale)

    def run(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        residual: FeatureMap | None = None,
    ) -> None:
        t, k = self.tiles, len(self.weight)
        c2 = 0 if x2 is None else x2.channels
        for name, fm, c in (
            ("x", x, self.weight.shape[1] - c2),
            ("x2", x2, c2),
            ("residual", residual, k),
            ("out", out, k),
        ):
            if fm is not None:
                fm.expect(name, x.images, x.height, x.width, c, x.bordered)
        launch_conv(
            _conv1x1_kernel,
            t,
            self.grid(out),
            x.rows,
            x.rows if x2 is None else x2.rows,
            self.weight,
            out.rows,
            self.bias if self.bias is not None else self.weight,
            x.rows if residual is None else residual.rows,
            self.residual_scale,
            len(x.rows),
            x.height,
            x.width,
            k,
            C=x.channels,
            C2=c2,
            OUT=TRITON_TYPE[out.rows.dtype],
            BIAS=self.bias is not None,
            RESIDUAL=residual is not None,
            BORDER=out.bordered,
            PRECISION=PRECISION[x.rows.dtype],
        )

    def fallback(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        residual: FeatureMap | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        pixels = cast(x.pixels if x2 is None else torch.cat([x.pixels, x2.pixels], dim=1), compute)
        y = F.conv2d(pixels, cast(self.weight, compute)[:, :, None, None])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)[:, None, None]
        if residual is not None:
            y = y + self.residual_scale * cast(residual.pixels, y.dtype)
        out.write(y)

    def grid(self, out: FeatureMap, **_: FeatureMap) -> int:
        """Returns the number of tiles."""
        t = self.tiles
        return triton.cdiv(len(out.rows), t.block_m) * triton.cdiv(len(self.weight), t.block_n)

    def cost(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        residual: FeatureMap | None = None,
    ) -> tuple[int, int]:
        return cost_of_conv(self.weight, (x, x2, residual), out)
