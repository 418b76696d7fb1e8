"""3x3 convolution of stride 2, from a bordered map to one of half the resolution.

A matrix product whose rows are gathered through pointers.
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
    pack,
    pixel_of,
    unpack,
)
from ._launch import begin
from ._tile_statistics import (
    TileStatisticsMixin,
    counted_rows,
    first_row,
    row_tiles,
    store_statistics,
)
from ._triton import tl, triton


def conv_downsample_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int
) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] -> [N, K, H / 2, W / 2], stride 2.

    padding 1: zeros on every side (OpenAI). padding 0: zeros on the right and at the bottom (Ho et
    al.; TensorFlow's SAME).
    """
    return F.conv2d(F.pad(x, (padding, 1, padding, 1)), weight, bias, stride=2)[
        ..., : x.shape[2] // 2, : x.shape[3] // 2
    ]


@triton.jit(do_not_specialize=["ROWS", "ROWS_IN", "H", "W"])
def _conv_downsample_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    stats_ptr,
    ROWS,
    ROWS_IN,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OUT: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    per_tap: tl.constexpr = C // BLOCK_K
    o0 = (tl.program_id(0) % n_out) * BLOCK_N
    tile = tl.program_id(0) // n_out
    m0 = first_row(tile, (H + 1) * (W + 1), BLOCK_M, STATS)
    rows = m0 + tl.arange(0, BLOCK_M)
    image, y, x, inside = pixel_of(rows, ROWS, H, W, 1)
    # the source is bordered: a tap outside the image reads a zero, or is after the last row
    WP = 2 * W + 1
    first = image * ((2 * H + 1) * WP) + (2 * y + 1 - PADDING) * WP + 2 * x + 1 - PADDING
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(9 * per_tap):
        tap = k // per_tap
        source = first + (tap // 3) * WP + tap % 3
        channels = (k % per_tap) * BLOCK_K + tl.arange(0, BLOCK_K)
        offsets = source.to(tl.int64)[:, None] * C + channels[None, :]
        a = tl.load(x_ptr + offsets, mask=(inside & (source < ROWS_IN))[:, None], other=0.0)
        acc = tl.dot(
            a,
            load_rows(w_ptr, o0, k * BLOCK_K, K, 9 * C, BLOCK_N, BLOCK_K).T,
            acc,
            input_precision=PRECISION,
        )
    cols = o0 + tl.arange(0, BLOCK_N)
    acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    out = tl.where(inside[:, None], acc, 0.0).to(OUT)
    offsets = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(y_ptr + offsets, out, mask=(rows < ROWS)[:, None] & (cols < K)[None, :])
    if STATS:
        store_statistics(
            stats_ptr,
            tile,
            out,
            counted_rows(m0, rows, inside, (H + 1) * (W + 1)),
            o0,
            K,
            BLOCK_M,
            BLOCK_N,
            AT_ONCE=16,
        )


# ---- the operation


@dataclass(frozen=True, eq=False)
class ConvDownsample(TileStatisticsMixin):
    """3x3 convolution of stride 2 + bias. See `conv_downsample_reference`.

    Reads a bordered map [N, 2 H, 2 W, C], writes a bordered map [N, H, W, K].

    Args:
        weight: Packed [K, 9 C], in the type of the operands.
        bias: [K] fp32.
        padding: 0 or 1.
        tiles: Tile sizes.
    """

    weight: Tensor
    bias: Tensor
    padding: int
    tiles: Tiles
    name = "conv_downsample"

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor, padding: int, dtype: torch.dtype, tiles: Tiles
    ) -> ConvDownsample:
        return cls(pack(weight).to(dtype).contiguous(), bias.float(), padding, tiles)

    def run(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> None:
        t, k = self.tiles, len(self.weight)
        x.expect(
            "x", x.images, 2 * out.height, 2 * out.width, self.weight.shape[1] // 9, bordered=True
        )
        out.expect("out", x.images, out.height, out.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _conv_downsample_kernel,
            t,
            self.grid(out, stats),
            x.rows,
            self.weight,
            out.rows,
            self.bias,
            x.rows if stats is None else stats.rows,
            len(out.rows),
            len(x.rows),
            out.height,
            out.width,
            C=x.channels,
            K=k,
            PADDING=self.padding,
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
        y = conv_downsample_reference(
            cast(x.pixels, compute), unpack(cast(self.weight, compute), 3), None, self.padding
        )
        out.write(y + self.bias.to(y.dtype)[:, None, None])
        self.write_stats(out, stats, compute)

    def grid(self, out: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Returns the number of tiles."""
        t, by_image = self.tiles, stats is not None
        return row_tiles(out, t.block_m, by_image) * triton.cdiv(len(self.weight), t.block_n)

    def cost(
        self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None
    ) -> tuple[int, int]:
        return cost_of_conv(self.weight, (x, stats), out)
