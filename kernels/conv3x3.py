"""3x3 convolution of stride 1: a matrix product on bordered feature maps.

The weights are packed [K, 9 C], tap by tap. One step of the product takes BLOCK_K channels of one
tap, whose rows are the rows of the tile, shifted by a constant (`_feature_map`). With TMA (sm_90
and newer) both operands are loaded through descriptors, which return zeros for rows outside the
map. Without TMA they are loaded through masked pointers.
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
    box,
    cast,
    cost_of_conv,
    launch_conv,
    load_rows,
    pack,
    quantise,
    unpack,
)
from ._launch import begin
from ._tile_statistics import (
    TileStatisticsMixin,
    count_tiles,
    counted_rows,
    first_row,
    row_tiles,
    split_columns,
    store_statistics,
)
from ._triton import tl, triton


def conv3x3_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] -> conv(x) + bias + scale * residual [N, K, H, W]."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + scale * residual


@triton.jit
def _finish_conv3x3(
    acc,
    y,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    stats_ptr,
    residual_scale,
    tile,
    m0,
    o0,
    ROWS,
    WP,
    IMAGE,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DENSE: tl.constexpr,
    STATS: tl.constexpr,
):
    """Epilogue of acc [BLOCK_M, BLOCK_N] at row m0, output o0: scale, bias, residual, store."""
    cols = o0 + tl.arange(0, BLOCK_N)
    rows = m0 + tl.arange(0, BLOCK_M)
    r = rows % IMAGE
    inside = (rows < ROWS) & (r >= WP) & (r % WP != 0)
    if SCALED:
        acc = acc * tl.load(scale_ptr + cols, mask=cols < K, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    if RESIDUAL:
        offsets = rows.to(tl.int64)[:, None] * K + cols[None, :]
        # with STATS also loads the residual's zero border: a simpler mask needs fewer registers
        mask = rows < ROWS if STATS else inside
        residual = tl.load(
            residual_ptr + offsets, mask=mask[:, None] & (cols < K)[None, :], other=0.0
        )
        acc += residual_scale * residual.to(tl.float32)
    if DENSE:  # the network's output [N, H, W, K], without a border
        h = IMAGE // WP - 1
        pixel = (rows // IMAGE) * (h * (WP - 1)) + (r // WP - 1) * (WP - 1) + r % WP - 1
        offsets = pixel.to(tl.int64)[:, None] * K + cols[None, :]
        tl.store(y + offsets, acc.to(OUT), mask=inside[:, None] & (cols < K)[None, :])
    else:
        out = tl.where(inside[:, None], acc, 0.0).to(OUT)
        if TMA:
            y.store([m0, o0], out)
        else:
            offsets = rows.to(tl.int64)[:, None] * K + cols[None, :]
            tl.store(y + offsets, out, mask=(rows < ROWS)[:, None] & (cols < K)[None, :])
        if STATS:
            # with a residual, acc has the layout of its loads, and a split would move every column
            at_once: tl.constexpr = BLOCK_N if RESIDUAL else 32
            store_statistics(
                stats_ptr,
                tile,
                out,
                counted_rows(m0, rows, inside, IMAGE),
                o0,
                K,
                BLOCK_M,
                BLOCK_N,
                at_once,
            )


@triton.jit(do_not_specialize=["ROWS", "WP", "IMAGE"])
def _conv3x3_kernel(
    x,
    w,
    y,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    stats_ptr,
    residual_scale,
    ROWS,
    WP,
    IMAGE,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DENSE: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    per_tap: tl.constexpr = C // BLOCK_K
    tiles = count_tiles(ROWS, IMAGE, BLOCK_M, STATS) * n_out
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS if TMA else tiles, flatten=TMA):
        o0 = (tile % n_out) * BLOCK_N
        m0 = first_row(tile // n_out, IMAGE, BLOCK_M, STATS)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(9 * per_tap):
            tap = k // per_tap
            row0 = m0 + (tap // 3 - 1) * WP + (tap % 3 - 1)
            c0 = (k % per_tap) * BLOCK_K
            if TMA:
                a = x.load([row0, c0])
                b = w.load([o0, k * BLOCK_K])
            else:
                a = load_rows(x, row0, c0, ROWS, C, BLOCK_M, BLOCK_K)
                b = load_rows(w, o0, k * BLOCK_K, K, 9 * C, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)

        # with statistics, half of the columns at a time: all columns at once would spill registers
        parts = split_columns(acc, BLOCK_M, BLOCK_N) if STATS else (acc,)
        for i in tl.static_range(len(parts)):
            _finish_conv3x3(
                parts[i],
                y,
                bias_ptr,
                scale_ptr,
                residual_ptr,
                stats_ptr,
                residual_scale,
                tile // n_out,
                m0,
                o0 + i * (BLOCK_N // len(parts)),
                ROWS,
                WP,
                IMAGE,
                K,
                BLOCK_M,
                BLOCK_N // len(parts),
                TMA,
                OUT,
                BIAS,
                SCALED,
                RESIDUAL,
                DENSE,
                STATS,
            )


# ---- the operation


@dataclass(frozen=True, eq=False)
class Conv3x3(TileStatisticsMixin):
    """3x3 convolution + bias + residual_scale * residual, stride 1, padding 1.

    Reads bordered maps x [N, H, W, C] and residual [N, H, W, K], writes a bordered or dense map
    [N, H, W, K]. See `conv3x3_reference`.

    Args:
        weight: Packed [K, 9 C], in the type of the operands.
        bias: [K] fp32, or None.
        tiles: Tile sizes.
        scale: [K] fp32, factor of the product per output channel; None unless operands are e4m3.
        residual_scale: Factor of the residual.
        bounded: For e4m3 operands, adds the product of every step in fp32. Otherwise only the final
            sum is fp32: the tensor core of sm_90 accumulates with fewer bits.
    """

    weight: Tensor
    bias: Tensor | None
    tiles: Tiles
    scale: Tensor | None = None
    residual_scale: float = 1.0
    bounded: bool = True
    name = "conv3x3"

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        tiles: Tiles,
        x_scale: float = 1.0,
        residual_scale: float = 1.0,
        bounded: bool = True,
    ) -> Conv3x3:
        """Packs weight [K, C, 3, 3] and bias [K]; x_scale: scale of an e4m3 input."""
        packed, scale = quantise(pack(weight), dtype, x_scale)
        bias = None if bias is None else bias.float()
        return cls(packed, bias, tiles, scale, residual_scale, bounded)

    def run(
        self,
        x: FeatureMap,
        out: FeatureMap,
        residual: FeatureMap | None = None,
        stats: FeatureMap | None = None,
    ) -> None:
        t, k = self.tiles, len(self.weight)
        out_columns = t.block_n if stats is None else t.block_n // 2
        imprecise = 0 if self.scale is None else t.block_k if self.bounded else None
        x.expect("x", x.images, x.height, x.width, self.weight.shape[1] // 9, bordered=True)
        out.expect("out", x.images, x.height, x.width, k)
        if residual is not None:
            residual.expect("residual", x.images, x.height, x.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _conv3x3_kernel,
            t,
            self.grid(x, stats),
            box(x.rows, t.block_m, t.block_k, t.tma),
            box(self.weight, t.block_n, t.block_k, t.tma),
            box(out.rows, t.block_m, out_columns, t.tma and out.bordered),
            self.bias if self.bias is not None else self.weight,
            self.scale if self.scale is not None else self.weight,
            x.rows if residual is None else residual.rows,
            x.rows if stats is None else stats.rows,
            self.residual_scale,
            len(x.rows),
            x.width + 1,
            x.image_rows,
            C=x.channels,
            K=k,
            TMA=t.tma,
            OUT=TRITON_TYPE[out.rows.dtype],
            BIAS=self.bias is not None,
            SCALED=self.scale is not None,
            RESIDUAL=residual is not None,
            DENSE=not out.bordered,
            STATS=stats is not None,
            PRECISION=PRECISION[x.rows.dtype],
            IMPRECISE=imprecise,  # None: Triton's default
        )

    def fallback(
        self,
        x: FeatureMap,
        out: FeatureMap,
        residual: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        weight, bias = unpack(cast(self.weight, compute), 3), cast(self.bias, compute)
        y = F.conv2d(cast(x.pixels, compute), weight, padding=1)
        if self.scale is not None:
            y = y * cast(self.scale, y.dtype)[:, None, None]
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None, None]
        if residual is not None:
            y = y + self.residual_scale * cast(residual.pixels, y.dtype)
        out.write(y)
        self.write_stats(out, stats, compute)

    def grid(self, x: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Returns the number of tiles."""
        t = self.tiles
        return row_tiles(x, t.block_m, stats is not None) * triton.cdiv(len(self.weight), t.block_n)

    def cost(
        self,
        x: FeatureMap,
        out: FeatureMap,
        residual: FeatureMap | None = None,
        stats: FeatureMap | None = None,
    ) -> tuple[int, int]:
        return cost_of_conv(self.weight, (x, residual, stats), out)
