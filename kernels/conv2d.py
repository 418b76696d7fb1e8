"""3x3 convolutions as matrix products on bordered feature maps, channels-last: stride 1, and behind nearest 2x upsampling.

The weights are packed [C_out, taps * C_in], a tap's channels together; one step of the product takes BK channels of one tap,
whose rows are the tile's own rows, shifted by a constant (`_feature_map`). With TMA (sm_90 and newer) both operands come as
boxes of a descriptor, and rows before the first and behind the last read as zero; without, they come through pointers, masked.

Upsampling first and convolving then is four 2x2 convolutions of the small map, one for each parity of the output's row and
column: taps that fall on copies of one pixel are summed into one weight, exact but for the rounding of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._launch import begin
from ._tile_statistics import KeepsStatistics, Tiling, count_tiles, first_row, halves, own_rows, row_tiles, store_statistics
from ._tiles import PRECISION, TRITON_TYPE, Tiles, box, cost_of_conv, launch_conv, quantise, wide
from ._triton import tl, triton


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3], residual [N, K, H, W] -> conv(x) + bias + scale * residual."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + scale * residual


def upsample_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, C, H, W], weight [K, C, 3, 3] -> [N, K, 2 H, 2 W]: each pixel becomes a 2x2 block, then the convolution."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def pack(weight: Tensor) -> Tensor:
    """[K, C, h, w] -> [K, h * w * C]"""
    return weight.permute(0, 2, 3, 1).flatten(1)


def unpack(packed: Tensor, side: int) -> Tensor:
    """The reverse of `pack`."""
    return packed.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


def pack_parities(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] -> [4 K, 4 C]: for each parity (row, column) of the output a packed 2x2 filter on the small map.

    An even output row sees the pixel row above through tap 0 and its own through taps 1 and 2; an odd one its own through
    taps 0 and 1 and the next through tap 2. Columns alike. Summed in fp64.
    """
    w = weight.double()
    fold = w.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [parity, tap of 2, tap of 3]
    parities = torch.einsum("pai,qbj,kcij->pqkabc", fold, fold, w)
    return parities.flatten(3).flatten(0, 2)


@triton.jit
def load_rows(x_ptr, row, c0, ROWS, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Rows row ... row + BM of x [ROWS, C], channels c0 ... c0 + BK: zero for rows that do not exist."""
    rows = row + tl.arange(0, BM)
    at = rows.to(tl.int64)[:, None] * C + (c0 + tl.arange(0, BK))[None, :]
    return tl.load(x_ptr + at, mask=((rows >= 0) & (rows < ROWS))[:, None], other=0.0)


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
    BM: tl.constexpr,
    BO: tl.constexpr,
    TMA: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DENSE: tl.constexpr,
    STATS: tl.constexpr,
):
    """Sums acc [BM, BO] of rows m0 ... and outputs o0 ... -> what is stored."""
    cols = o0 + tl.arange(0, BO)
    rows = m0 + tl.arange(0, BM)
    r = rows % IMAGE
    inside = (rows < ROWS) & (r >= WP) & (r % WP != 0)
    if SCALED:
        acc = acc * tl.load(scale_ptr + cols, mask=cols < K, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    if RESIDUAL:
        at = rows.to(tl.int64)[:, None] * K + cols[None, :]
        seen = rows < ROWS if STATS else inside  # with the border, which is zero: fewer registers
        residual = tl.load(residual_ptr + at, mask=seen[:, None] & (cols < K)[None, :], other=0.0)
        acc += residual_scale * residual.to(tl.float32)
    if DENSE:  # [N, H, W, K] without borders: the network's output
        h = IMAGE // WP - 1
        pixel = (rows // IMAGE) * (h * (WP - 1)) + (r // WP - 1) * (WP - 1) + r % WP - 1
        at = pixel.to(tl.int64)[:, None] * K + cols[None, :]
        tl.store(y + at, acc.to(OUT), mask=inside[:, None] & (cols < K)[None, :])
    else:
        out = tl.where(inside[:, None], acc, 0.0).to(OUT)
        if TMA:
            y.store([m0, o0], out)
        else:
            at = rows.to(tl.int64)[:, None] * K + cols[None, :]
            tl.store(y + at, out, mask=(rows < ROWS)[:, None] & (cols < K)[None, :])
        if STATS:
            # behind a residual a thread holds columns as it loaded them, and cutting between them would move them all
            at_once: tl.constexpr = BO if RESIDUAL else 32
            store_statistics(stats_ptr, tile, out, own_rows(m0, rows, inside, IMAGE), o0, K, BM, BO, at_once)


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
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
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
    n_out: tl.constexpr = (K + BO - 1) // BO
    per_tap: tl.constexpr = C // BK
    tiles = count_tiles(ROWS, IMAGE, BM, STATS) * n_out
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS if TMA else tiles, flatten=TMA):
        o0 = (tile % n_out) * BO
        m0 = first_row(tile // n_out, IMAGE, BM, STATS)
        acc = tl.zeros((BM, BO), tl.float32)
        for k in range(9 * per_tap):
            tap = k // per_tap
            row = m0 + (tap // 3 - 1) * WP + (tap % 3 - 1)
            c0 = (k % per_tap) * BK
            if TMA:
                a = x.load([row, c0])
                b = w.load([o0, k * BK])
            else:
                a = load_rows(x, row, c0, ROWS, C, BM, BK)
                b = load_rows(w, o0, k * BK, K, 9 * C, BO, BK)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)

        # statistics of all columns at once would spill, so with them the tile is finished by halves
        parts = halves(acc, BM, BO) if STATS else (acc,)
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
                o0 + i * (BO // len(parts)),
                ROWS,
                WP,
                IMAGE,
                K,
                BM,
                BO // len(parts),
                TMA,
                OUT,
                BIAS,
                SCALED,
                RESIDUAL,
                DENSE,
                STATS,
            )


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _upsample_conv_kernel(
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
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    OUT: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n_out: tl.constexpr = (K + BO - 1) // BO
    per_tap: tl.constexpr = C // BK
    WP = W + 1
    IMAGE = (H + 1) * WP
    tiles = count_tiles(ROWS, IMAGE, BM, STATS) * n_out * 4
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS if TMA else tiles, flatten=TMA):
        o0 = (tile % n_out) * BO
        parity = (tile // n_out) % 4
        m0 = first_row(tile // (n_out * 4), IMAGE, BM, STATS)
        py = parity // 2
        px = parity % 2
        acc = tl.zeros((BM, BO), tl.float32)
        for k in range(4 * per_tap):
            tap = k // per_tap
            row = m0 + (tap // 2 - 1 + py) * WP + (tap % 2 - 1 + px)
            c0 = (k % per_tap) * BK
            if TMA:
                a = x.load([row, c0])
                b = w.load([parity * K + o0, k * BK])
            else:
                a = load_rows(x, row, c0, ROWS, C, BM, BK)
                b = load_rows(w, parity * K + o0, k * BK, 4 * K, 4 * C, BO, BK)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        cols = o0 + tl.arange(0, BO)
        rows = m0 + tl.arange(0, BM)
        image = rows // IMAGE
        r = rows - image * IMAGE
        y = r // WP - 1
        x_ = r % WP - 1
        # the border of the small map becomes, by the same arithmetic, the border of the large one
        out_y = 2 * y + py
        out_x = 2 * x_ + px
        exists = (rows < ROWS) & (out_y >= -1) & (out_x >= -1)
        inside = (y >= 0) & (x_ >= 0)
        acc += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
        out = tl.where(inside[:, None], acc, 0.0).to(OUT)
        out_row = image.to(tl.int64) * ((2 * H + 1) * (2 * W + 1)) + (out_y + 1) * (2 * W + 1) + out_x + 1
        tl.store(y_ptr + out_row[:, None] * K + cols[None, :], out, mask=exists[:, None] & (cols < K)[None, :])
        if STATS:
            own = own_rows(m0, rows, inside, IMAGE)
            store_statistics(stats_ptr, tile // n_out, out, own, o0, K, BM, BO)


# ---- the operations: packed weights, and what a plan needs to know of them


@dataclass(frozen=True, eq=False)
class Conv3x3(KeepsStatistics):
    """conv(x) + bias + residual_scale * residual, stride 1, padding 1. See `conv3x3_reference`.

    weight  packed [K, 9 C] in the operands' type;  bias [K] fp32 or None
    scale   [K] fp32 where the operands are e4m3: what one unit of the product is worth, per output channel
    bounded of e4m3 operands: does every step's product join the sum in fp32 (sm_90's tensor core itself adds with fewer bits), or
            only the whole sum?
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
        """From weight [K, C, 3, 3] and bias [K]; x_scale: what one unit of an e4m3 input is worth."""
        packed, scale = quantise(pack(weight), dtype, x_scale)
        return cls(packed, None if bias is None else bias.float(), tiles, scale, residual_scale, bounded)

    def run(self, x: FeatureMap, out: FeatureMap, residual: FeatureMap | None = None, stats: FeatureMap | None = None) -> None:
        t, k = self.tiles, len(self.weight)
        x.expect("x", x.images, x.height, x.width, self.weight.shape[1] // 9, bordered=True)
        out.expect("out", x.images, x.height, x.width, k)
        if residual is not None:
            residual.expect("residual", x.images, x.height, x.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _conv3x3_kernel,
            t,
            self.grid(x, stats),
            box(x.rows, t.bm, t.bk, t.tma),
            box(self.weight, t.bo, t.bk, t.tma),
            box(out.rows, t.bm, t.bo if stats is None else t.bo // 2, t.tma and out.bordered),
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
            IMPRECISE=0 if self.scale is None else t.bk if self.bounded else None,  # None: as Triton does it
        )

    def twin(
        self,
        x: FeatureMap,
        out: FeatureMap,
        residual: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        weight, bias = unpack(wide(self.weight, compute), 3), wide(self.bias, compute)
        y = F.conv2d(wide(x.pixels, compute), weight, padding=1)
        if self.scale is not None:
            y = y * wide(self.scale, y.dtype)[:, None, None]
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None, None]
        if residual is not None:
            y = y + self.residual_scale * wide(residual.pixels, y.dtype)
        out.write(y)
        self.write_stats(out, stats, compute)

    def grid(self, x: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Tiles of the product."""
        return row_tiles(x, self.tiles.bm, stats is not None) * triton.cdiv(len(self.weight), self.tiles.bo)

    def cost(
        self, x: FeatureMap, out: FeatureMap, residual: FeatureMap | None = None, stats: FeatureMap | None = None
    ) -> tuple[int, int]:
        """FLOP (of real pixels) and the fewest bytes that must move."""
        return cost_of_conv(self.weight, (x, residual, stats), out)


@dataclass(frozen=True, eq=False)
class UpsampleConv(KeepsStatistics):
    """Nearest 2x, then a 3x3 convolution. See `upsample_conv_reference`; weight packed [4 K, 4 C], bias [K] fp32."""

    weight: Tensor
    bias: Tensor
    tiles: Tiles
    name = "upsample_conv"

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, tiles: Tiles) -> UpsampleConv:
        return cls(pack_parities(weight).to(dtype), bias.float(), tiles)

    def run(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> None:
        t, k = self.tiles, len(self.weight) // 4
        x.expect("x", x.images, x.height, x.width, self.weight.shape[1] // 4, bordered=True)
        out.expect("out", x.images, 2 * x.height, 2 * x.width, k, bordered=True)
        self.expect_stats(out, stats)
        launch_conv(
            _upsample_conv_kernel,
            t,
            self.grid(x, stats),
            box(x.rows, t.bm, t.bk, t.tma),
            box(self.weight, t.bo, t.bk, t.tma),
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

    def twin(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None, compute: torch.dtype | None = None) -> None:
        weights, bias = wide(self.weight, compute).chunk(4), wide(self.bias, compute)
        pixels = wide(x.pixels, compute)
        n, _, h, w = pixels.shape
        y = pixels.new_empty(n, len(self.bias), h, 2, w, 2)
        for parity, weight in enumerate(weights):
            py, px = divmod(parity, 2)
            seen = F.pad(pixels, (1 - px, px, 1 - py, py))
            y[:, :, :, py, :, px] = F.conv2d(seen, unpack(weight, 2))
        out.write(y.reshape(n, -1, 2 * h, 2 * w) + bias.to(y.dtype)[:, None, None])
        self.write_stats(out, stats, compute)

    def tiling(self, out: FeatureMap) -> Tiling:
        return Tiling(out.height // 2, out.width // 2, self.tiles.bm, parts=4)

    def grid(self, x: FeatureMap, stats: FeatureMap | None = None, **_: FeatureMap) -> int:
        """Tiles of the four products."""
        return row_tiles(x, self.tiles.bm, stats is not None) * triton.cdiv(len(self.weight) // 4, self.tiles.bo) * 4

    def cost(self, x: FeatureMap, out: FeatureMap, stats: FeatureMap | None = None) -> tuple[int, int]:
        flops, moved = cost_of_conv(self.weight, (x, stats), out)
        return flops // 4, moved  # an output pixel sees one parity's filter
