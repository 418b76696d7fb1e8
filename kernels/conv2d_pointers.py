"""The 3x3 convolutions that are not of stride 1 on a bordered map: the first layer, and stride 2.

All operands come through pointers: a row of the product gathers its channels from wherever its pixel lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import PRECISION, TRITON_TYPE, Tiles, cost_of_conv, launch_conv, power_of_two, wide
from ._launch import begin
from ._tile_statistics import KeepsStatistics, first_row, own_rows, row_tiles, store_statistics
from ._triton import tl, triton
from .conv3x3 import load_rows, pack, unpack


def downsample_reference(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] -> [N, K, H / 2, W / 2], stride 2.

    padding 1: one zero all around (OpenAI). padding 0: one on the right and at the bottom (Ho et al.; TensorFlow's SAME).
    """
    return F.conv2d(F.pad(x, (padding, 1, padding, 1)), weight, bias, stride=2)[..., : x.shape[2] // 2, : x.shape[3] // 2]


@triton.jit
def pixel_of(rows, ROWS, H, W, BORDER: tl.constexpr):
    """(image, y, x, inside) of rows of a map of [H, W] images: y or x is -1 on the border."""
    IMAGE = (H + BORDER) * (W + BORDER)
    image = rows // IMAGE
    r = rows - image * IMAGE
    y = r // (W + BORDER) - BORDER
    x = r % (W + BORDER) - BORDER
    return image, y, x, (rows < ROWS) & (y >= 0) & (x >= 0)


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _first_conv_kernel(
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
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OUT: tl.constexpr,
    CENTER: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BO - 1) // BO
    o0 = (tl.program_id(0) % n_out) * BO
    tile = tl.program_id(0) // n_out
    m0 = first_row(tile, (H + 1) * (W + 1), BM, STATS)
    rows = m0 + tl.arange(0, BM)
    image, y, x, inside = pixel_of(rows, ROWS, H, W, 1)
    acc = tl.zeros((BM, BO), tl.float32)
    for k in range(DEPTH // BK):
        depth = k * BK + tl.arange(0, BK)  # tap and channel at once: C is no power of two
        tap = depth // C
        dy, dx = tap // 3 - 1, tap % 3 - 1
        sy, sx = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
        seen = inside[:, None] & (depth < 9 * C)[None, :] & (sy >= 0) & (sy < H) & (sx >= 0) & (sx < W)
        at = ((image.to(tl.int64)[:, None] * H + sy) * W + sx) * C + (depth % C)[None, :]
        a = tl.load(x_ptr + at, mask=seen, other=0.0)
        if CENTER:
            a = tl.where(seen, 2 * a - 1, 0.0)
        b = load_rows(w_ptr, o0, k * BK, K, DEPTH, BO, BK)
        acc = tl.dot(a.to(b.dtype), b.T, acc, input_precision=PRECISION)
    cols = o0 + tl.arange(0, BO)
    acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    out = tl.where(inside[:, None], acc, 0.0).to(OUT)
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(y_ptr + at, out, mask=(rows < ROWS)[:, None] & (cols < K)[None, :])
    if STATS:
        store_statistics(stats_ptr, tile, out, own_rows(m0, rows, inside, (H + 1) * (W + 1)), o0, K, BM, BO, AT_ONCE=16)


@triton.jit(do_not_specialize=["ROWS", "ROWS_IN", "H", "W"])
def _downsample_kernel(
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
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OUT: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BO - 1) // BO
    per_tap: tl.constexpr = C // BK
    o0 = (tl.program_id(0) % n_out) * BO
    tile = tl.program_id(0) // n_out
    m0 = first_row(tile, (H + 1) * (W + 1), BM, STATS)
    rows = m0 + tl.arange(0, BM)
    image, y, x, inside = pixel_of(rows, ROWS, H, W, 1)
    # the source is bordered, so a tap that falls off the image falls on a zero, or behind the last row
    WP = 2 * W + 1
    first = image * ((2 * H + 1) * WP) + (2 * y + 1 - PADDING) * WP + 2 * x + 1 - PADDING
    acc = tl.zeros((BM, BO), tl.float32)
    for k in range(9 * per_tap):
        tap = k // per_tap
        source = first + (tap // 3) * WP + tap % 3
        at = source.to(tl.int64)[:, None] * C + ((k % per_tap) * BK + tl.arange(0, BK))[None, :]
        a = tl.load(x_ptr + at, mask=(inside & (source < ROWS_IN))[:, None], other=0.0)
        acc = tl.dot(a, load_rows(w_ptr, o0, k * BK, K, 9 * C, BO, BK).T, acc, input_precision=PRECISION)
    cols = o0 + tl.arange(0, BO)
    acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    out = tl.where(inside[:, None], acc, 0.0).to(OUT)
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(y_ptr + at, out, mask=(rows < ROWS)[:, None] & (cols < K)[None, :])
    if STATS:
        store_statistics(stats_ptr, tile, out, own_rows(m0, rows, inside, (H + 1) * (W + 1)), o0, K, BM, BO, AT_ONCE=16)


# ---- the operations


@dataclass(frozen=True, eq=False)
class FirstConv(KeepsStatistics):
    """The network's first 3x3 convolution, of few channels, from dense fp32 pixels; of 2 x - 1 where `center`.

    weight packed [K, DEPTH], its 9 C columns padded with zeros to whole steps of the product; bias [K] fp32.
    """

    weight: Tensor
    bias: Tensor
    channels: int
    center: bool
    tiles: Tiles
    name = "first_conv"

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, tiles: Tiles, center: bool = False) -> FirstConv:
        packed = pack(weight)
        depth = -(-packed.shape[1] // tiles.bk) * tiles.bk
        return cls(F.pad(packed, (0, depth - packed.shape[1])).to(dtype).contiguous(), bias.float(), weight.shape[1], center, tiles)

    @staticmethod
    def step(channels: int) -> int:
        """BK: all of a few channels' taps in one step of the product."""
        return min(64, max(16, power_of_two(9 * channels)))

    def run(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> None:
        t, (k, depth) = self.tiles, self.weight.shape
        x.expect("x", x.images, x.height, x.width, self.channels, bordered=False)
        out.expect("out", x.images, x.height, x.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _first_conv_kernel,
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

    def fallback(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None, compute: torch.dtype | None = None) -> None:
        weight = wide(self.weight[:, : 9 * self.channels], compute)
        pixels = 2 * x.pixels - 1 if self.center else x.pixels
        seen = pixels.to(self.weight.dtype).to(weight.dtype)  # rounded to the operands' type, as the kernel does
        y = F.conv2d(seen, unpack(weight, 3), padding=1)
        out.write(y + self.bias.to(y.dtype)[:, None, None])
        self.write_stats(out, stats, compute)

    def grid(self, out: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Tiles of the product."""
        return row_tiles(out, self.tiles.bm, stats is not None) * triton.cdiv(len(self.weight), self.tiles.bo)

    def cost(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> tuple[int, int]:
        return cost_of_conv(self.weight[:, : 9 * self.channels], (x, stats), out)


@dataclass(frozen=True, eq=False)
class DownsampleConv(KeepsStatistics):
    """3x3, stride 2. See `downsample_reference`; weight packed [K, 9 C], bias [K] fp32."""

    weight: Tensor
    bias: Tensor
    padding: int
    tiles: Tiles
    name = "downsample_conv"

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, padding: int, dtype: torch.dtype, tiles: Tiles) -> DownsampleConv:
        return cls(pack(weight).to(dtype).contiguous(), bias.float(), padding, tiles)

    def run(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> None:
        t, k = self.tiles, len(self.weight)
        x.expect("x", x.images, 2 * out.height, 2 * out.width, self.weight.shape[1] // 9, bordered=True)
        out.expect("out", x.images, out.height, out.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _downsample_kernel,
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

    def fallback(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None, compute: torch.dtype | None = None) -> None:
        y = downsample_reference(wide(x.pixels, compute), unpack(wide(self.weight, compute), 3), None, self.padding)
        out.write(y + self.bias.to(y.dtype)[:, None, None])
        self.write_stats(out, stats, compute)

    def grid(self, out: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Tiles of the product."""
        return row_tiles(out, self.tiles.bm, stats is not None) * triton.cdiv(len(self.weight), self.tiles.bo)

    def cost(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> tuple[int, int]:
        return cost_of_conv(self.weight, (x, stats), out)
