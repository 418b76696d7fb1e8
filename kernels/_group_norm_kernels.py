"""Kernels of `group_norm_silu`: one pass over an image, or normalization of tiles by statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._gemm import next_power_of_two
from ._group_statistics import group_sum, load_pixels
from ._launch import begin
from ._triton import tl, triton

# Elements of a one-pass block: 64 registers per thread of 512 (4096 pixels of 16 channels spill)
MAX_ONE_PASS_ELEMENTS = 32768
MAX_LANES = 64  # channels of a block: 128 bytes of a 2-byte type, one line of the cache
TILE_ELEMENTS = 16384  # elements of a tile of the two-pass form


@dataclass(frozen=True)
class Blocks:
    """Shape of a program's block.

    Args:
        pixels: Pixels of a tile, rounded up to a power of two.
        lanes: Channels of a tile, rounded up to a power of two.
        used: Lanes that hold channels: whole groups.
        warps: Warps per program.
        one_pass: Whether a tile is a whole image.
    """

    pixels: int
    lanes: int
    used: int
    warps: int
    one_pass: bool

    @classmethod
    def of(
        cls, size: int, channels: int, width: int, max_elements: int = MAX_ONE_PASS_ELEMENTS
    ) -> Blocks:
        """Returns the block for images of `size` pixels and groups of `width` channels.

        `used` is a multiple of 8 if possible, so that each load has 16 bytes.
        """
        pixels, least = next_power_of_two(size), next_power_of_two(width)
        lanes = min(MAX_LANES, max_elements // pixels, next_power_of_two(channels))
        one_pass = max(least, min(16, next_power_of_two(channels))) * pixels <= max_elements
        if one_pass:
            lanes = max(lanes, least)
        else:
            lanes = max(min(MAX_LANES, next_power_of_two(channels)), least)
            pixels = min(pixels, max(1, TILE_ELEMENTS // lanes))
        elements = pixels * lanes if width <= 32 else pixels * least
        # 64 elements per thread; 32 in the two-pass form, whose loop needs registers too
        warps = min(16, max(4, elements // (2048 if one_pass else 1024)))
        if width > 32:
            return cls(pixels, least, width, warps, one_pass)
        multiple = math.lcm(width, 8)
        used = lanes // multiple * multiple or lanes // width * width
        return cls(pixels, lanes, used, warps, one_pass)


@triton.jit
def clamp_e4m3(y, inside, saturated_ptr, COUNT: tl.constexpr):
    """Clamps y to the range of e4m3; NaN stays NaN. COUNT: counts the clamped and NaN values.

    The count is an atomic sum: its order varies, but no image depends on it.
    """
    if COUNT:
        saturated = tl.sum(tl.where(inside & ~(tl.abs(y) <= 448.0), 1, 0))
        tl.atomic_add(saturated_ptr, saturated.to(tl.int64), mask=saturated > 0, sem="relaxed")
    return tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apply_norm(
    d,
    rstd,
    gamma_ptr,
    beta_ptr,
    time_ptr,
    c,
    used,
    C,
    unit,
    inside,
    saturated_ptr,
    TIME: tl.constexpr,
    SILU: tl.constexpr,
    OUT: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Computes the output from deviations d [P, L] from the mean."""
    gain = rstd * tl.load(gamma_ptr + c, mask=used, other=0.0)
    shift = tl.load(beta_ptr + c, mask=used, other=0.0)
    if TIME == 2:
        scale = 1 + tl.load(time_ptr + c, mask=used, other=0.0)
        gain *= scale
        shift = shift * scale + tl.load(time_ptr + C + c, mask=used, other=0.0)
    y = d * gain[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    if OUT.primitive_bitwidth == 8:
        y = clamp_e4m3(y * unit, inside, saturated_ptr, COUNT)
    return y.to(OUT)


@triton.jit
def zero_border(out_ptr, n, c, used, H, W, C, L: tl.constexpr, OUT: tl.constexpr):
    """Writes zeros to the top row and the left column of image n."""
    edge = tl.arange(0, 64)
    zero = tl.zeros((64, L), tl.float32).to(OUT)
    out_ptr += n * (H + 1) * (W + 1) * C
    for e in range(0, W + 1, 64):
        offsets = (e + edge)[:, None] * C + c[None, :]
        tl.store(out_ptr + offsets, zero, mask=(e + edge <= W)[:, None] & used[None, :])
    for e in range(0, H + 1, 64):
        offsets = ((e + edge) * (W + 1))[:, None] * C + c[None, :]
        tl.store(out_ptr + offsets, zero, mask=(e + edge <= H)[:, None] & used[None, :])


@triton.jit
def store_pixels(out_ptr, y, n, p, c, inside, H, W, C, BORDER: tl.constexpr):
    pixel_row = p + BORDER * (p // W + W + 2)
    tl.store(
        out_ptr + n * (H + BORDER) * (W + BORDER) * C + (pixel_row[:, None] * C + c[None, :]),
        y,
        mask=inside,
    )


@triton.jit(do_not_specialize=["H", "W", "S", "WIDTH"])
def _one_pass_kernel(
    x_ptr,
    x2_ptr,
    out_ptr,
    gamma_ptr,
    beta_ptr,
    table_ptr,
    time_row_ptr,
    H,
    W,
    C1,
    C,
    S,
    WIDTH,
    eps,
    unit,
    saturated_ptr,
    P: tl.constexpr,
    L: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    TIME: tl.constexpr,
    SILU: tl.constexpr,
    BORDER: tl.constexpr,
    OUT: tl.constexpr,
    COUNT: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    blocks = tl.cdiv(C, USED)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, L)
    c = tl.program_id(0) % blocks * USED + lane
    used = (lane < USED) & (c < C)
    p = tl.arange(0, P)
    inside = (p < H * W)[:, None] & used[None, :]
    if TIME > 0:
        table_ptr += tl.load(time_row_ptr + n).to(tl.int64) * S
    x = load_pixels(x_ptr, x2_ptr, n, p, c, inside, W, (H + 1) * (W + 1), C1, C, TWO)
    if TIME == 1:
        x += tl.load(table_ptr + c, mask=used, other=0.0)[None, :]
    count = (H * W * WIDTH).to(tl.float32)
    mean = group_sum(tl.sum(tl.where(inside, x, 0.0), 0), lane, WIDTH, GROUPS) / count
    d = tl.where(inside, x - mean[None, :], 0.0)
    rstd = tl.rsqrt(group_sum(tl.sum(d * d, 0), lane, WIDTH, GROUPS) / count + eps)
    y = apply_norm(
        d,
        rstd,
        gamma_ptr,
        beta_ptr,
        table_ptr,
        c,
        used,
        C,
        unit,
        inside,
        saturated_ptr,
        TIME,
        SILU,
        OUT,
        COUNT,
    )
    store_pixels(out_ptr, y, n, p, c, inside, H, W, C, BORDER)
    if BORDER:
        zero_border(out_ptr, n, c, used, H, W, C, L, OUT)


@triton.jit(do_not_specialize=["H", "W", "S", "WIDTH", "CHUNK", "CHUNKS"])
def _apply_kernel(
    x_ptr,
    x2_ptr,
    out_ptr,
    part_ptr,
    gamma_ptr,
    beta_ptr,
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
    eps,
    unit,
    saturated_ptr,
    MOST: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    TIME: tl.constexpr,
    SILU: tl.constexpr,
    BORDER: tl.constexpr,
    OUT: tl.constexpr,
    COUNT: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    blocks = tl.cdiv(C, USED)
    tiles = tl.cdiv(H * W, P)
    tile = tl.program_id(0) // blocks % tiles
    n = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    lane = tl.arange(0, L)
    c = tl.program_id(0) % blocks * USED + lane
    used = (lane < USED) & (c < C)

    chunk = tl.arange(0, MOST)
    offsets = ((n * CHUNKS + chunk)[:, None] * (C // WIDTH) + (c // WIDTH)[None, :]) * 2
    mask = (chunk < CHUNKS)[:, None] & used[None, :]
    means = tl.load(part_ptr + offsets, mask=mask, other=0.0)
    squares = tl.load(part_ptr + offsets + 1, mask=mask, other=0.0)
    counts = tl.maximum(tl.minimum(CHUNK, H * W - chunk * CHUNK), 0)
    counts = (counts * WIDTH).to(tl.float32)[:, None]
    count = (H * W * WIDTH).to(tl.float32)
    mean = tl.sum(means * counts, 0) / count
    dev = tl.where(mask, means - mean[None, :], 0.0)
    rstd = tl.rsqrt(tl.sum(squares + dev * dev * counts, 0) / count + eps)

    p = tile * P + tl.arange(0, P)
    inside = (p < H * W)[:, None] & used[None, :]
    x = load_pixels(x_ptr, x2_ptr, n, p, c, inside, W, (H + 1) * (W + 1), C1, C, TWO)
    if TIME > 0:
        table_ptr += tl.load(time_row_ptr + n).to(tl.int64) * S
    if TIME == 1:
        x += tl.load(table_ptr + c, mask=used, other=0.0)[None, :]
    y = apply_norm(
        x - mean[None, :],
        rstd,
        gamma_ptr,
        beta_ptr,
        table_ptr,
        c,
        used,
        C,
        unit,
        inside,
        saturated_ptr,
        TIME,
        SILU,
        OUT,
        COUNT,
    )
    store_pixels(out_ptr, y, n, p, c, inside, H, W, C, BORDER)
    if BORDER and tile == 0:
        zero_border(out_ptr, n, c, used, H, W, C, L, OUT)
