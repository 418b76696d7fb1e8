"""First 3x3 convolution of the network: few channels, from dense fp32 pixels to a bordered map.

A matrix product whose rows are gathered through pointers, several taps of all channels per step.
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
    next_power_of_two,
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


def conv_in_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: bool = False
) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] -> conv(x) + bias [N, K, H, W]; center: of 2 x - 1."""
    return F.conv2d(2 * x - 1 if center else x, weight, bias, padding=1)


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _conv_in_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    stats_ptr,
    ROWS,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OUT: tl.constexpr,
    CENTER: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    o0 = (tl.program_id(0) % n_out) * BLOCK_N
    tile = tl.program_id(0) // n_out
    m0 = first_row(tile, (H + 1) * (W + 1), BLOCK_M, STATS)
    rows = m0 + tl.arange(0, BLOCK_M)
    image, y, x, inside = pixel_of(rows, ROWS, H, W, 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(DEPTH // BLOCK_K):
        depth = k * BLOCK_K + tl.arange(0, BLOCK_K)  # (tap, channel): C is not a power of two
        tap = depth // C
        dy, dx = tap // 3 - 1, tap % 3 - 1
        sy, sx = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
        mask = (
            inside[:, None] & (depth < 9 * C)[None, :] & (sy >= 0) & (sy < H) & (sx >= 0) & (sx < W)
        )
        offsets = ((image.to(tl.int64)[:, None] * H + sy) * W + sx) * C + (depth % C)[None, :]
        a = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        if CENTER:
            a = tl.where(mask, 2 * a - 1, 0.0)
        b = load_rows(w_ptr, o0, k * BLOCK_K, K, DEPTH, BLOCK_N, BLOCK_K)
        acc = tl.dot(a.to(b.dtype), b.T, acc, input_precision=PRECISION)
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
class ConvIn(TileStatisticsMixin):
    """First 3x3 convolution + bias. See `conv_in_reference`.

    Reads a dense fp32 map [N, H, W, C], writes a bordered map [N, H, W, K].

    Args:
        weight: Packed [K, 9 C], padded with zero columns to a multiple of `tiles.block_k`.
        bias: [K] fp32.
        channels: C.
        center: Convolves 2 x - 1, with zero padding.
        tiles: Tile sizes.
    """

    weight: Tensor
    bias: Tensor
    channels: int
    center: bool
    tiles: Tiles
    name = "conv_in"

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, tiles: Tiles, center: bool = False
    ) -> ConvIn:
        packed = pack(weight)
        depth = -(-packed.shape[1] // tiles.block_k) * tiles.block_k
        return cls(
            F.pad(packed, (0, depth - packed.shape[1])).to(dtype).contiguous(),
            bias.float(),
            weight.shape[1],
            center,
            tiles,
        )

    @staticmethod
    def block_k(channels: int) -> int:
        """Returns the columns per step: all taps in one step if there are few channels."""
        return min(64, max(16, next_power_of_two(9 * channels)))

    def run(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> None:
        t, (k, depth) = self.tiles, self.weight.shape
        x.expect("x", x.images, x.height, x.width, self.channels, bordered=False)
        out.expect("out", x.images, x.height, x.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _conv_in_kernel,
            t,
            self.grid(out, stats),
            x.rows,
            self.weight,
            out.rows,
            self.bias,
            x.rows if stats is None else stats.rows,
            len(out.rows),
            out.height,
            out.width,
            C=self.channels,
            K=k,
            DEPTH=depth,
            OUT=TRITON_TYPE[out.rows.dtype],
            CENTER=self.center,
            STATS=stats is not None,
            PRECISION=PRECISION[self.weight.dtype],
        )

    def fallback(
        self,
        x: FeatureMap,
        out: FeatureMap,
        stats: FeatureMap | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        weight = cast(self.weight[:, : 9 * self.channels], compute)
        pixels = 2 * x.pixels - 1 if self.center else x.pixels
        # rounded to the type of the operands, as in the kernel
        pixels = pixels.to(self.weight.dtype).to(weight.dtype)
        y = conv_in_reference(pixels, unpack(weight, 3), None)
        out.write(y + self.bias.to(y.dtype)[:, None, None])
        self.write_stats(out, stats, compute)

    def grid(self, out: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Returns the number of tiles."""
        t, by_image = self.tiles, stats is not None
        return row_tiles(out, t.block_m, by_image) * triton.cdiv(len(self.weight), t.block_n)

    def cost(
        self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None
    ) -> tuple[int, int]:
        return cost_of_conv(self.weight[:, : 9 * self.channels], (x, stats), out)
