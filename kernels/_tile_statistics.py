"""Statistics of a map by tiles, computed by the kernel that writes the map.

The norm then does not read the map for its statistics. Tiles restart at every image (without
statistics they cover the whole batch), and their height is fixed. So the pixels that are summed
together do not depend on the batch size.

The last tile of an image overlaps the next image. It computes and stores those rows bit-exactly as
the next image's own tile does: a row's result depends on its operands, scale, bias, residual and
border position, not on its position in the tile or on other rows. So the order of the two stores
does not matter. The statistics exclude those rows.

The statistics are those of the stored values: after bias and residual, rounded to the map's type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import Tiles
from ._triton import tl, triton


@dataclass(frozen=True)
class Tiling:
    """Partition of a bordered image into tiles, each with an entry of statistics per part.

    Args:
        height, width: Size in pixels; of the small map if parts is 4.
        rows: Rows per tile.
        parts: 4 for a map that `conv_upsample` writes by parities from a small map, otherwise 1.
    """

    height: int
    width: int
    rows: int
    parts: int = 1

    @property
    def tiles(self) -> int:
        return -(-(self.height + 1) * (self.width + 1) // self.rows)

    @property
    def entries(self) -> int:
        """Entries per image, ordered by tile, then part."""
        return self.tiles * self.parts

    def by_tile(self, pixels: Tensor) -> Tensor:
        """[N, C, height, width] -> [N, tiles, rows, C], zero on the border and after the image."""
        rows = F.pad(pixels, (1, 0, 1, 0)).permute(0, 2, 3, 1).flatten(1, 2)
        rows = F.pad(rows, (0, 0, 0, self.tiles * self.rows - rows.shape[1]))
        return rows.unflatten(1, (self.tiles, self.rows))

    def counts(self, like: Tensor) -> Tensor:
        """Returns the number of pixels [entries] of each entry, in the type of `like`."""
        ones = like.new_ones(1, 1, self.height, self.width)
        return self.by_tile(ones).sum((0, 2, 3)).repeat_interleave(self.parts)


def tile_statistics(pixels: Tensor, tiling: Tiling) -> Tensor:
    """pixels [N, C, H, W] -> mean and sum of squared deviations per entry, [N, entries, 2, C].

    Both are 0 for a tile without pixels.
    """
    side = 2 if tiling.parts == 4 else 1
    inside = tiling.by_tile(torch.ones_like(pixels[:1, :1, ::side, ::side]))
    counts = inside.sum(2).clamp(min=1)
    per_part = []
    for part in range(tiling.parts):
        x = tiling.by_tile(pixels[:, :, part // 2 :: side, part % 2 :: side])
        mean = x.sum(2) / counts
        deviations = (x - mean[:, :, None]) * inside
        per_part.append(torch.stack([mean, deviations.square().sum(2)], 2))
    return torch.stack(per_part, 2).flatten(1, 2)


def channel_statistics(stats: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """stats [N, entries, 2, C] -> mean and sum of squared deviations per channel, [N, C] each."""
    counts = tiling.counts(stats)[:, None]
    means, squares = stats.unbind(2)
    mean = (means * counts).sum(1) / counts.sum()
    return mean, (squares + (means - mean[:, None]).square() * counts).sum(1)


class TileStatisticsMixin:
    """Mixin of operations that optionally write the statistics of their output by tiles.

    `stats` is fp32 [images, entries, 2, C], stored as a dense map of [entries, 2] pixels.
    """

    tiles: Tiles

    def tiling(self, out: FeatureMap) -> Tiling:
        """Returns the partition of the statistics of `out`."""
        return Tiling(out.height, out.width, self.tiles.block_m)

    def expect_stats(self, out: FeatureMap, stats: FeatureMap | None) -> None:
        if stats is not None:
            entries = self.tiling(out).entries
            stats.expect("stats", out.images, entries, 2, out.channels, bordered=False)

    def write_stats(
        self, out: FeatureMap, stats: FeatureMap | None, compute: torch.dtype | None
    ) -> None:
        """Computes the statistics of `out` in fp32 or fp64; used by fallbacks."""
        if stats is not None:
            pixels = out.pixels.to(torch.float64 if compute == torch.float64 else torch.float32)
            stats.rows.copy_(tile_statistics(pixels, self.tiling(out)).flatten(0, 2))


def row_tiles(x: FeatureMap, block_m: int, by_image: bool) -> int:
    """Returns the number of tiles of block_m rows; by_image: tiles restart at every image."""
    if by_image:
        return x.images * triton.cdiv(x.image_rows, block_m)
    return triton.cdiv(len(x.rows), block_m)


@triton.jit
def count_tiles(ROWS, IMAGE, BLOCK_M: tl.constexpr, STATS: tl.constexpr):
    """Device version of `row_tiles`."""
    if STATS:
        return ROWS // IMAGE * tl.cdiv(IMAGE, BLOCK_M)
    return tl.cdiv(ROWS, BLOCK_M)


@triton.jit
def first_row(tile, IMAGE, BLOCK_M: tl.constexpr, STATS: tl.constexpr):
    """Returns the first row of a tile."""
    if STATS:
        per_image = tl.cdiv(IMAGE, BLOCK_M)
        return tile // per_image * IMAGE + tile % per_image * BLOCK_M
    return tile * BLOCK_M


@triton.jit
def split_columns(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Splits acc [BLOCK_M, BLOCK_N] into left and right columns, within each thread."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def counted_rows(m0, rows, inside, IMAGE):
    """Mask of the rows in a tile's statistics: pixels of the image that contains row m0."""
    return inside & (rows < m0 - m0 % IMAGE + IMAGE)


@triton.jit
def store_statistics(
    stats_ptr,
    entry,
    out,
    counted,
    o0,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr = 32,
):
    """Stores mean and squared deviations of `counted` rows of out [BLOCK_M, BLOCK_N] at column o0.

    AT_ONCE: columns per pass. Few columns need few registers: with 16, two programs of `conv_in` or
    `conv_downsample` fit on a multiprocessor of sm_90.
    """
    if BLOCK_N > AT_ONCE:
        left, right = split_columns(out, BLOCK_M, BLOCK_N)
        store_statistics(stats_ptr, entry, left, counted, o0, K, BLOCK_M, BLOCK_N // 2, AT_ONCE)
        store_statistics(
            stats_ptr, entry, right, counted, o0 + BLOCK_N // 2, K, BLOCK_M, BLOCK_N // 2, AT_ONCE
        )
    else:
        cols = o0 + tl.arange(0, BLOCK_N)
        count = tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)
        x = tl.where(counted[:, None], out.to(tl.float32), 0.0)
        mean = tl.sum(x, 0) / count
        d = tl.where(counted[:, None], x - mean[None, :], 0.0)
        offsets = stats_ptr + tl.cast(entry, tl.int64) * (2 * K) + cols
        tl.store(offsets, mean, mask=cols < K)
        tl.store(offsets + K, tl.sum(d * d, 0), mask=cols < K)
