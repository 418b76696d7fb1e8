"""Statistics of a map by tiles, computed by the launch that writes it, so that a norm need not read the map for them.

A tile of a product restarts at every image (elsewhere tiles run over the whole batch), and its height is fixed, so the pixels
whose sums meet do not depend on the batch. The last tile of an image runs over into the next one. Those rows it computes and stores
as their own tile does: a row of a product sees its operands' rows, its output's scale, bias and residual, its place on the border,
and neither its place in the tile nor the tile's other rows. So both tiles store the same bits and it does not matter which comes
last; only the statistics leave such rows out.

What is summed up is what is stored: values after bias and residual, rounded to the map's type, as the norm will read them.
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
    """Tiles of an image: [height, width] pixels with their border, in tiles of `rows` rows.

    parts: 4 where a map was made by parities from a small one, which height, width and rows then speak of; one entry for each
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
        """Of one image, (tile, part) in this order."""
        return self.tiles * self.parts

    def by_tile(self, pixels: Tensor) -> Tensor:
        """[N, C, height, width] -> [N, tiles, rows, C], zero on the border and behind the image."""
        rows = F.pad(pixels, (1, 0, 1, 0)).permute(0, 2, 3, 1).flatten(1, 2)
        return F.pad(rows, (0, 0, 0, self.tiles * self.rows - rows.shape[1])).unflatten(
            1, (self.tiles, self.rows)
        )

    def counts(self, like: Tensor) -> Tensor:
        """[entries]: pixels of each, in the type of `like`."""
        ones = like.new_ones(1, 1, self.height, self.width)
        return self.by_tile(ones).sum((0, 2, 3)).repeat_interleave(self.parts)


def tile_statistics(pixels: Tensor, tiling: Tiling) -> Tensor:
    """pixels [N, C, H, W] -> [N, entries, 2, C]: mean, and sum of squared deviations from it; zeros where a tile has no pixel."""
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
    """[N, entries, 2, C] -> mean of each channel over its image and sum of squared deviations from it, [N, C] each."""
    counts = tiling.counts(stats)[:, None]
    means, squares = stats.unbind(2)
    mean = (means * counts).sum(1) / counts.sum()
    return mean, (squares + (means - mean[:, None]).square() * counts).sum(1)


class TileStatisticsMixin:
    """An operation that writes the statistics of its output too, by the tiles of its product, where it is given `stats`:
    fp32 [images, entries, 2, C] as a map of [entries, 2] pixels.
    """

    tiles: Tiles

    def tiling(self, out: FeatureMap) -> Tiling:
        """How the statistics of `out` are cut."""
        return Tiling(out.height, out.width, self.tiles.block_m)

    def expect_stats(self, out: FeatureMap, stats: FeatureMap | None) -> None:
        if stats is not None:
            stats.expect(
                "stats", out.images, self.tiling(out).entries, 2, out.channels, bordered=False
            )

    def write_stats(
        self, out: FeatureMap, stats: FeatureMap | None, compute: torch.dtype | None
    ) -> None:
        """Statistics of what `out` holds, in fp32 at least; for the fallback."""
        if stats is not None:
            pixels = out.pixels.to(torch.float64 if compute == torch.float64 else torch.float32)
            stats.rows.copy_(tile_statistics(pixels, self.tiling(out)).flatten(0, 2))


def row_tiles(x: FeatureMap, block_m: int, by_image: bool) -> int:
    """Tiles of block_m rows; by_image: restarting at every image."""
    return (
        x.images * triton.cdiv(x.image_rows, block_m)
        if by_image
        else triton.cdiv(len(x.rows), block_m)
    )


@triton.jit
def count_tiles(ROWS, IMAGE, BLOCK_M: tl.constexpr, STATS: tl.constexpr):
    """`row_tiles` in a kernel."""
    if STATS:
        return ROWS // IMAGE * tl.cdiv(IMAGE, BLOCK_M)
    return tl.cdiv(ROWS, BLOCK_M)


@triton.jit
def first_row(tile, IMAGE, BLOCK_M: tl.constexpr, STATS: tl.constexpr):
    """First row of a tile."""
    if STATS:
        per_image = tl.cdiv(IMAGE, BLOCK_M)
        return tile // per_image * IMAGE + tile % per_image * BLOCK_M
    return tile * BLOCK_M


@triton.jit
def split_columns(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] as its left and its right columns; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def counted_rows(m0, rows, inside, IMAGE):
    """Rows that count in a tile's statistics: pixels of the image in which the tile of rows m0 ... begins."""
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
    """Stores the statistics of the rows `counted` of outputs o0 ... as they are stored, out [BLOCK_M, BLOCK_N].

    AT_ONCE: outputs; few, for the sake of registers: on sm_90 a second program fits beside a first or strided convolution then.
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
