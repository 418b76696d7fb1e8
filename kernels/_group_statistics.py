"""Group statistics of images too large for the one-pass norm.

They are computed from the map by chunks of pixels, or combined from the statistics of tiles that
the map's writer stored (`_tile_statistics`). Both ways merge in a fixed order (Chan et al. 1983).
"""

from __future__ import annotations

from ._launch import begin
from ._triton import tl, triton


@triton.jit
def load_pixels(x_ptr, x2_ptr, n, p, c, inside, W, IMAGE, C1, C, TWO: tl.constexpr):
    """Loads pixels p, channels c of image n as fp32 [P, L]; TWO: of two maps joined by channels."""
    # a border row, and a border pixel per row; within an image, so 32 bits are enough
    pixel_row = (p + p // W + W + 2)[:, None]
    if TWO:
        x = tl.load(
            x_ptr + n * IMAGE * C1 + (pixel_row * C1 + c[None, :]),
            mask=inside & (c < C1)[None, :],
            other=0.0,
        )
        second = x2_ptr + n * IMAGE * (C - C1) - C1
        x2 = tl.load(
            second + (pixel_row * (C - C1) + c[None, :]),
            mask=inside & (c >= C1)[None, :],
            other=0.0,
        )
        x = tl.where((c < C1)[None, :], x, x2)  # joined before the cast: fewer registers
    else:
        x = tl.load(x_ptr + n * IMAGE * C + (pixel_row * C + c[None, :]), mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def group_sum(s, lane, WIDTH, GROUPS: tl.constexpr):
    """Sums s [L] over each channel's group.

    GROUPS: "each" channel is a group, the block is "one" group, or it holds "some" groups.
    """
    if GROUPS == "each":
        return s
    if GROUPS == "one":
        return tl.sum(s, 0) + tl.zeros_like(s)
    same = (lane // WIDTH)[:, None] == (lane // WIDTH)[None, :]
    return tl.sum(tl.where(same, s[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["H", "W", "S", "WIDTH", "CHUNK", "CHUNKS"])
def _statistics_kernel(
    x_ptr,
    x2_ptr,
    part_ptr,
    table_ptr,
    time_row_ptr,
    H,
    W,
    C1,
    C,
    S,
    WIDTH,
    CHUNK,
    CHUNKS,
    P: tl.constexpr,
    L: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    TIME: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes part [N, CHUNKS, groups, 2]: mean and squared deviations per chunk of pixels."""
    begin(PDL)
    blocks = tl.cdiv(C, USED)
    chunk = tl.program_id(0) // blocks % CHUNKS
    n = (tl.program_id(0) // (blocks * CHUNKS)).to(tl.int64)
    lane = tl.arange(0, L)
    c = tl.program_id(0) % blocks * USED + lane
    used = (lane < USED) & (c < C)
    last = tl.minimum((chunk + 1) * CHUNK, H * W)
    mean = tl.zeros((L,), tl.float32)
    squares = tl.zeros((L,), tl.float32)
    count_before = 0.0
    for first in range(chunk * CHUNK, last, P):
        p = first + tl.arange(0, P)
        inside = (p < last)[:, None] & used[None, :]
        x = load_pixels(x_ptr, x2_ptr, n, p, c, inside, W, (H + 1) * (W + 1), C1, C, TWO)
        if TIME == 1:
            x += tl.load(
                table_ptr + tl.load(time_row_ptr + n).to(tl.int64) * S + c, mask=used, other=0.0
            )[None, :]
        count = (tl.minimum(last - first, P) * WIDTH).to(tl.float32)
        block_mean = group_sum(tl.sum(tl.where(inside, x, 0.0), 0), lane, WIDTH, GROUPS) / count
        d = tl.where(inside, x - block_mean[None, :], 0.0)
        delta = block_mean - mean
        total = count_before + count
        squares += group_sum(tl.sum(d * d, 0), lane, WIDTH, GROUPS) + delta * delta * (
            count_before * count / total
        )
        mean += delta * (count / total)
        count_before = total
    groups = C // WIDTH
    offsets = ((n * CHUNKS + chunk) * groups + c // WIDTH) * 2
    first_of_group = used & (lane % WIDTH == 0)
    tl.store(part_ptr + offsets, mean, mask=first_of_group)
    tl.store(part_ptr + offsets + 1, squares, mask=first_of_group)


@triton.jit
def pixels_before(pixel_row, H, W):
    """Returns the number of pixels among the first `pixel_row` rows of a bordered image."""
    y = pixel_row // (W + 1) - 1
    return tl.where(y < 0, 0, y * W + tl.maximum(pixel_row - (y + 1) * (W + 1) - 1, 0))


@triton.jit
def merge_tiles(stats_ptr, n, c, known, C, H, W, ROWS, PARTS, T: tl.constexpr, L: tl.constexpr):
    """Merges the tiles of image n: mean and sum of squared deviations [L] of channels c.

    H, W, ROWS, PARTS: the map's `Tiling`. Returns 0 for channels that are not `known`.
    """
    entries = tl.cdiv((H + 1) * (W + 1), ROWS) * PARTS
    mean = tl.zeros((L,), tl.float32)
    squares = tl.zeros((L,), tl.float32)
    count_before = 0.0
    for first in range(0, entries, T):
        e = first + tl.arange(0, T)
        offsets = ((n * entries + e) * 2 * C)[:, None] + c[None, :]
        mask = (e < entries)[:, None] & known[None, :]
        means = tl.load(stats_ptr + offsets, mask=mask, other=0.0)
        deviations = tl.load(stats_ptr + offsets + C, mask=mask, other=0.0)
        begin = tl.minimum(e // PARTS * ROWS, (H + 1) * (W + 1))
        end = tl.minimum(begin + ROWS, (H + 1) * (W + 1))
        counts = (pixels_before(end, H, W) - pixels_before(begin, H, W)).to(tl.float32)
        # the first tiles of a wide image may consist of border only
        count = tl.maximum(tl.sum(counts, 0), 1.0)
        block_mean = tl.sum(means * counts[:, None], 0) / count
        dev = means - block_mean[None, :]
        delta = block_mean - mean
        total = count_before + count
        squares += tl.sum(deviations + dev * dev * counts[:, None], 0) + delta * delta * (
            count_before * count / total
        )
        mean += delta * (count / total)
        count_before = total
    return tl.where(known, mean, 0.0), tl.where(known, squares, 0.0)


@triton.jit(
    do_not_specialize=[
        "H",
        "W",
        "S",
        "WIDTH",
        "TILED_H",
        "TILED_W",
        "ROWS",
        "PARTS",
        "TILED_H2",
        "TILED_W2",
        "ROWS2",
        "PARTS2",
    ]
)
def _combine_kernel(
    stats_ptr,
    stats2_ptr,
    part_ptr,
    table_ptr,
    time_row_ptr,
    H,
    W,
    C1,
    C,
    S,
    WIDTH,
    TILED_H,
    TILED_W,
    ROWS,
    PARTS,
    TILED_H2,
    TILED_W2,
    ROWS2,
    PARTS2,
    T: tl.constexpr,
    L: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    TIME: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes part [N, 1, groups, 2] as `_statistics_kernel` does, from tiles of one or two maps."""
    begin(PDL)
    blocks = tl.cdiv(C, USED)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, L)
    c = tl.program_id(0) % blocks * USED + lane
    used = (lane < USED) & (c < C)
    mean, squares = merge_tiles(
        stats_ptr, n, c, used & (c < C1), C1, TILED_H, TILED_W, ROWS, PARTS, T, L
    )
    if TWO:
        from_second = used & (c >= C1)
        mean2, squares2 = merge_tiles(
            stats2_ptr, n, c - C1, from_second, C - C1, TILED_H2, TILED_W2, ROWS2, PARTS2, T, L
        )
        mean += mean2
        squares += squares2
    if TIME == 1:
        mean += tl.load(
            table_ptr + tl.load(time_row_ptr + n).to(tl.int64) * S + c, mask=used, other=0.0
        )
    group_mean = group_sum(mean, lane, WIDTH, GROUPS) / WIDTH
    dev = tl.where(used, mean - group_mean, 0.0)
    squares = group_sum(squares + dev * dev * (H * W).to(tl.float32), lane, WIDTH, GROUPS)
    offsets = (n * (C // WIDTH) + c // WIDTH) * 2
    first_of_group = used & (lane % WIDTH == 0)
    tl.store(part_ptr + offsets, group_mean, mask=first_of_group)
    tl.store(part_ptr + offsets + 1, squares, mask=first_of_group)
