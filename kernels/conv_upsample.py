"""Nearest 2x upsampling followed by a 3x3 convolution, computed on the small map.

It equals four 2x2 convolutions of the small map, one per parity of the output's row and column.
Taps that read copies of one pixel are summed into one weight: exact except for the rounding of the
sums. Each convolution is a matrix product as in `conv3x3`.
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
    unpack,
)
from ._launch import begin
from ._tile_statistics import (
    TileStatisticsMixin,
    Tiling,
    count_tiles,
    counted_rows,
    first_row,
    row_tiles,
    store_statistics,
)
from ._triton import tl, triton


def conv_upsample_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] -> convolution of the upsampled x, [N, K, 2 H, 2 W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def pack_parities(weight: Tensor) -> Tensor:
    """weight [K, C, 3, 3] -> packed 2x2 filters [4 K, 4 C], one per parity (row, column), in fp64.

    Output row 2 y reads row y - 1 of the small map with tap 0, and row y with taps 1 and 2. Output
    row 2 y + 1 reads row y with taps 0 and 1, and row y + 1 with tap 2. Columns do the same.
    """
    w = weight.double()
    # [parity, tap of 2, tap of 3]
    fold = w.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    parities = torch.einsum("pai,qbj,kcij->pqkabc", fold, fold, w)
    return parities.flatten(3).flatten(0, 2)


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _conv_upsample_kernel(
    x,
    w,
    y_ptr,
    bias_ptr,
    stats_ptr,
    ROWS,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    OUT: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    per_tap: tl.constexpr = C // BLOCK_K
    WP = W + 1
    IMAGE = (H + 1) * WP
    tiles = count_tiles(ROWS, IMAGE, BLOCK_M, STATS) * n_out * 4
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS if TMA else tiles, flatten=TMA):
        o0 = (tile % n_out) * BLOCK_N
        parity = (tile // n_out) % 4
        m0 = first_row(tile // (n_out * 4), IMAGE, BLOCK_M, STATS)
        py = parity // 2
        px = parity % 2
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(4 * per_tap):
            tap = k // per_tap
            row0 = m0 + (tap // 2 - 1 + py) * WP + (tap % 2 - 1 + px)
            c0 = (k % per_tap) * BLOCK_K
            if TMA:
                a = x.load([row0, c0])
                b = w.load([parity * K + o0, k * BLOCK_K])
            else:
                a = load_rows(x, row0, c0, ROWS, C, BLOCK_M, BLOCK_K)
                b = load_rows(w, parity * K + o0, k * BLOCK_K, 4 * K, 4 * C, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        cols = o0 + tl.arange(0, BLOCK_N)
        rows = m0 + tl.arange(0, BLOCK_M)
        image = rows // IMAGE
        r = rows - image * IMAGE
        y = r // WP - 1
        x_ = r % WP - 1
        # the same arithmetic maps the border of the small map to that of the large map
        out_y = 2 * y + py
        out_x = 2 * x_ + px
        exists = (rows < ROWS) & (out_y >= -1) & (out_x >= -1)
        inside = (y >= 0) & (x_ >= 0)
        acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
        out = tl.where(inside[:, None], acc, 0.0).to(OUT)
        out_pixel_row = (
            image.to(tl.int64) * ((2 * H + 1) * (2 * W + 1)) + (out_y + 1) * (2 * W + 1) + out_x + 1
        )
        tl.store(
            y_ptr + out_pixel_row[:, None] * K + cols[None, :],
            out,
            mask=exists[:, None] & (cols < K)[None, :],
        )
        if STATS:
            counted = counted_rows(m0, rows, inside, IMAGE)
            store_statistics(stats_ptr, tile // n_out, out, counted, o0, K, BLOCK_M, BLOCK_N)


@dataclass(frozen=True, eq=False)
class ConvUpsample(TileStatisticsMixin):
    """Nearest 2x upsampling, 3x3 convolution and bias. See `conv_upsample_reference`.

    Reads a bordered map [N, H, W, C], writes a bordered map [N, 2 H, 2 W, K].

    Args:
        weight: Packed [4 K, 4 C] by `pack_parities`, in the type of the operands.
        bias: [K] fp32.
        tiles: Tile sizes.
    """

    weight: Tensor
    bias: Tensor
    tiles: Tiles
    name = "conv_upsample"

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, tiles: Tiles) -> ConvUpsample:
        return cls(pack_parities(weight).to(dtype), bias.float(), tiles)

    def run(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> None:
        t, k = self.tiles, len(self.weight) // 4
        x.expect("x", x.images, x.height, x.width, self.weight.shape[1] // 4, bordered=True)
        out.expect("out", x.images, 2 * x.height, 2 * x.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _conv_upsample_kernel,
            t,
            self.grid(x, stats),
            box(x.rows, t.block_m, t.block_k, t.tma),
            box(self.weight, t.block_n, t.block_k, t.tma),
            out.rows,
            self.bias,
            x.rows if stats is None else stats.rows,
            len(x.rows),
            x.height,
            x.width,
            C=x.channels,
            K=k,
            TMA=t.tma,
            OUT=TRITON_TYPE[out.rows.dtype],
            STATS=stats is not None,
            PRECISION=PRECISION[x.rows.dtype],
        )

    def fallback(
        self,
        x: FeatureMap,
        out: FeatureMap,
        stats: FeatureMap | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        weights, bias = cast(self.weight, compute).chunk(4), cast(self.bias, compute)
        pixels = cast(x.pixels, compute)
        n, _, h, w = pixels.shape
        y = pixels.new_empty(n, len(self.bias), h, 2, w, 2)
        for parity, weight in enumerate(weights):
            py, px = divmod(parity, 2)
            padded = F.pad(pixels, (1 - px, px, 1 - py, py))
            y[:, :, :, py, :, px] = F.conv2d(padded, unpack(weight, 2))
        out.write(y.reshape(n, -1, 2 * h, 2 * w) + bias.to(y.dtype)[:, None, None])
        self.write_stats(out, stats, compute)

    def tiling(self, out: FeatureMap) -> Tiling:
        return Tiling(out.height // 2, out.width // 2, self.tiles.block_m, parts=4)

    def grid(self, x: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Returns the number of tiles of the four products."""
        t, k = self.tiles, len(self.weight) // 4
        return 4 * row_tiles(x, t.block_m, stats is not None) * triton.cdiv(k, t.block_n)

    def cost(
        self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None
    ) -> tuple[int, int]:
        flops, moved = cost_of_conv(self.weight, (x, stats), out)
        return flops // 4, moved  # an output pixel uses the filter of one parity
