"""GroupNorm, with what stands around it in the network: time embedding before it, SiLU behind it, the skip's concatenation.

One pass reads a feature map once and writes it once: a program holds one image's block of channels (whole groups) in registers,
takes the mean, then the squared deviations from it, then writes what the next layer reads. Where a block is too large for that,
two launches: statistics of groups (`_group_statistics`), from the map or from what its writer kept by tiles, then the same
arithmetic on tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import E4M3_MAX, TRITON_TYPE, power_of_two, wide
from ._group_statistics import _combine_kernel, _statistics_kernel, load_pixels, of_group
from ._launch import begin, launch_options
from ._tile_statistics import Tiling, channel_statistics
from ._triton import tl, triton

# Elements of a block that one program may hold: 64 registers for each of 512 threads (4096 pixels of 16 channels spill)
HELD = 32768
WIDEST = 64  # channels of a block: 128 bytes of a 2-byte type, one line of the cache
TILE = 16384  # elements of a tile of the two-pass form
MOST_CHUNKS = 16
COMBINED = 4096  # tiles x channels of statistics that a program combines at once


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """SiLU(norm(x + shift) * (1 + scale) + offset) of x [N, C, H, W]; shift, scale, offset [N, C] or absent."""
    y = F.group_norm(x if shift is None else x + shift[:, :, None, None], groups, weight, bias, eps)
    return _modulated(y, silu, scale, offset)


def _modulated(y: Tensor, silu: bool, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale is not None and offset is not None:
        y = y * (1 + scale[:, :, None, None]) + offset[:, :, None, None]
    return F.silu(y) if silu else y


def norm_from_statistics(x: Tensor, mean: Tensor, squares: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`F.group_norm` of x [N, C, H, W]; mean, squares [N, C]: of each channel, and the sum of squared deviations from it."""
    size = x.shape[2] * x.shape[3]
    means, squares = (v.unflatten(1, (groups, -1)) for v in (mean, squares))
    center = means.mean(2, keepdim=True)
    variance = (squares + (means - center).square() * size).mean(2, keepdim=True) / size
    y = (x.to(mean.dtype).unflatten(1, (groups, -1)) - center[..., None, None]) * (variance + eps).rsqrt()[..., None, None]
    return (y.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]).to(x.dtype)


@triton.jit
def fit_e4m3(y, inside, saturated_ptr, COUNT: tl.constexpr):
    """y clamped to what e4m3 holds; a NaN stays one, so that it is seen. An int64 grows by how many were beyond or are NaN: by
    programs in whatever order they arrive, for no image depends on it.
    """
    if COUNT:
        saturated = tl.sum(tl.where(inside & ~(tl.abs(y) <= 448.0), 1, 0))
        tl.atomic_add(saturated_ptr, saturated.to(tl.int64), mask=saturated > 0, sem="relaxed")
    return tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finish(
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
    """Deviations d [P, L] from the mean -> what is stored."""
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
        y = fit_e4m3(y * unit, inside, saturated_ptr, COUNT)
    return y.to(OUT)


@triton.jit
def zero_border(out_ptr, n, c, used, H, W, C, L: tl.constexpr, OUT: tl.constexpr):
    """Zeros into the top row and the left column of image n."""
    edge = tl.arange(0, 64)
    zero = tl.zeros((64, L), tl.float32).to(OUT)
    out_ptr += n * (H + 1) * (W + 1) * C
    for e in range(0, W + 1, 64):
        at = (e + edge)[:, None] * C + c[None, :]
        tl.store(out_ptr + at, zero, mask=(e + edge <= W)[:, None] & used[None, :])
    for e in range(0, H + 1, 64):
        at = ((e + edge) * (W + 1))[:, None] * C + c[None, :]
        tl.store(out_ptr + at, zero, mask=(e + edge <= H)[:, None] & used[None, :])


@triton.jit
def store_pixels(out_ptr, y, n, p, c, inside, H, W, C, BORDER: tl.constexpr):
    row = p + BORDER * (p // W + W + 2)
    tl.store(out_ptr + n * (H + BORDER) * (W + BORDER) * C + (row[:, None] * C + c[None, :]), y, mask=inside)


@triton.jit(do_not_specialize=["H", "W", "S", "WIDTH"])
def _one_pass_kernel(
    x_ptr,
    x2_ptr,
    out_ptr,
    gamma_ptr,
    beta_ptr,
    table_ptr,
    row_ptr,
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
        table_ptr += tl.load(row_ptr + n).to(tl.int64) * S
    x = load_pixels(x_ptr, x2_ptr, n, p, c, inside, W, (H + 1) * (W + 1), C1, C, TWO)
    if TIME == 1:
        x += tl.load(table_ptr + c, mask=used, other=0.0)[None, :]
    count = (H * W * WIDTH).to(tl.float32)
    mean = of_group(tl.sum(tl.where(inside, x, 0.0), 0), lane, WIDTH, GROUPS) / count
    d = tl.where(inside, x - mean[None, :], 0.0)
    rstd = tl.rsqrt(of_group(tl.sum(d * d, 0), lane, WIDTH, GROUPS) / count + eps)
    y = finish(d, rstd, gamma_ptr, beta_ptr, table_ptr, c, used, C, unit, inside, saturated_ptr, TIME, SILU, OUT, COUNT)
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
    row_ptr,
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
    at = ((n * CHUNKS + chunk)[:, None] * (C // WIDTH) + (c // WIDTH)[None, :]) * 2
    known = (chunk < CHUNKS)[:, None] & used[None, :]
    means = tl.load(part_ptr + at, mask=known, other=0.0)
    squares = tl.load(part_ptr + at + 1, mask=known, other=0.0)
    counts = (tl.maximum(tl.minimum(CHUNK, H * W - chunk * CHUNK), 0) * WIDTH).to(tl.float32)[:, None]
    count = (H * W * WIDTH).to(tl.float32)
    mean = tl.sum(means * counts, 0) / count
    off = tl.where(known, means - mean[None, :], 0.0)
    rstd = tl.rsqrt(tl.sum(squares + off * off * counts, 0) / count + eps)

    p = tile * P + tl.arange(0, P)
    inside = (p < H * W)[:, None] & used[None, :]
    x = load_pixels(x_ptr, x2_ptr, n, p, c, inside, W, (H + 1) * (W + 1), C1, C, TWO)
    if TIME > 0:
        table_ptr += tl.load(row_ptr + n).to(tl.int64) * S
    if TIME == 1:
        x += tl.load(table_ptr + c, mask=used, other=0.0)[None, :]
    y = finish(
        x - mean[None, :], rstd, gamma_ptr, beta_ptr, table_ptr, c, used, C, unit, inside, saturated_ptr, TIME, SILU, OUT, COUNT
    )
    store_pixels(out_ptr, y, n, p, c, inside, H, W, C, BORDER)
    if BORDER and tile == 0:
        zero_border(out_ptr, n, c, used, H, W, C, L, OUT)


# ---- the operation


@dataclass(frozen=True)
class Blocks:
    """How a map is cut: blocks of `used` channels (whole groups) in `lanes` lanes, tiles of `pixels` pixels; one_pass: a tile is
    a whole image.
    """

    pixels: int
    lanes: int
    used: int
    warps: int
    one_pass: bool

    @classmethod
    def of(cls, size: int, channels: int, width: int, held: int = HELD) -> Blocks:
        """For images of `size` pixels: whole groups of `width` channels, by eights where that is possible (16 bytes a load)."""
        pixels, least = power_of_two(size), power_of_two(width)
        lanes = min(WIDEST, held // pixels, power_of_two(channels))
        one_pass = max(least, min(16, power_of_two(channels))) * pixels <= held
        if one_pass:
            lanes = max(lanes, least)
        else:
            lanes = max(min(WIDEST, power_of_two(channels)), least)
            pixels = min(pixels, max(1, TILE // lanes))
        elements = pixels * lanes if width <= 32 else pixels * least
        warps = min(
            16, max(4, elements // (2048 if one_pass else 1024))
        )  # 64 elements a thread, or 32 beside a loop's or two maps'
        if width > 32:
            return cls(pixels, least, width, warps, one_pass)
        by = math.lcm(width, 8)
        used = lanes // by * by or lanes // width * width
        return cls(pixels, lanes, used, warps, one_pass)


@dataclass(frozen=True, eq=False)
class GroupNormSiLU:
    """norm(x), or SiLU(norm(x)), or with the time embedding. See `group_norm_silu_reference`.

    gamma, beta [C] fp32
    time     None; "add": the row's C entries are added before the norm (the first convolution's bias is in them);
             "scale_shift": its 2 C entries scale and shift the normed values
    column   where this layer's entries begin in a row of the table
    unit     of an e4m3 output: what a stored 1 is worth
    tilings  of each map that it reads, where their writers kept statistics; empty: statistics are taken from the maps
    """

    gamma: Tensor
    beta: Tensor
    groups: int
    eps: float
    silu: bool = True
    time: str | None = None
    column: int = 0
    unit: float = 1.0
    tilings: tuple[Tiling, ...] = ()
    name = "group_norm_silu"

    @property
    def width(self) -> int:
        return len(self.gamma) // self.groups

    def blocks(self, x: FeatureMap) -> Blocks:
        # scale and shift take registers of their own
        return Blocks.of(x.height * x.width, len(self.gamma), self.width, HELD // 2 if self.time == "scale_shift" else HELD)

    def scratch_elements(self, x: FeatureMap) -> int:
        """fp32 elements that the two-pass form needs for its statistics; 0 in one pass."""
        return 0 if self.blocks(x).one_pass else x.images * (1 if self.tilings else MOST_CHUNKS) * self.groups * 2

    def run(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        table: Tensor | None = None,
        row: Tensor | None = None,
        scratch: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        stats2: FeatureMap | None = None,
        saturated: Tensor | None = None,
    ) -> None:
        """table [R, columns] fp32, row [N] integer: each image's row; scratch: fp32, `scratch_elements(x)` of them; stats, stats2:
        what the writers of x and x2 kept (`KeepsStatistics`), where there are `tilings`; saturated [1, 1] int64, of an e4m3 output:
        grows by how many of its values were clamped or are NaN; None: uncounted, and no cost.

        ValueError where a map, the scratch or the statistics are not of the shapes that belong together.
        """
        b, c = self.blocks(x), len(self.gamma)
        self._expect(x, out, x2, scratch, stats, stats2)
        second = x if x2 is None else x2
        sources, times = (x.rows, second.rows), (self.gamma, self.gamma) if table is None else (table[:, self.column :], row)
        numbers = (x.height, x.width, x.channels, c, 0 if table is None else table.stride(0), self.width)
        cut = dict(P=b.pixels, L=b.lanes, USED=b.used, GROUPS=self._groups(b.used), TWO=x2 is not None)
        cut |= launch_options(b.warps)
        mode = 0 if self.time is None else 1 if self.time == "add" else 2
        write = dict(
            TIME=mode, SILU=self.silu, BORDER=int(out.bordered), OUT=TRITON_TYPE[out.rows.dtype], COUNT=saturated is not None
        )
        scale = (1 / self.unit, self.gamma if saturated is None else saturated)
        blocks = triton.cdiv(c, b.used)
        with torch.cuda.device_of(x.rows):
            if b.one_pass:
                _one_pass_kernel[(x.images * blocks,)](
                    *sources, out.rows, self.gamma, self.beta, *times, *numbers, self.eps, *scale, **cut, **write
                )
                return
            assert scratch is not None
            size, part = x.height * x.width, scratch.rows
            chunk = triton.cdiv(triton.cdiv(size, MOST_CHUNKS), b.pixels) * b.pixels
            if stats is not None:
                chunk = size
                self._combine(stats, stats2, part, x.images, times, numbers, mode)
            chunks = triton.cdiv(size, chunk)
            if stats is None:
                _statistics_kernel[(x.images * chunks * blocks,)](*sources, part, *times, *numbers, chunk, chunks, TIME=mode, **cut)
            _apply_kernel[(x.images * triton.cdiv(size, b.pixels) * blocks,)](
                *sources,
                out.rows,
                part,
                self.gamma,
                self.beta,
                *times,
                *numbers,
                chunk,
                chunks,
                self.eps,
                *scale,
                MOST=MOST_CHUNKS,
                **cut,
                **write,
            )

    def _combine(
        self,
        stats: FeatureMap,
        stats2: FeatureMap | None,
        part: Tensor,
        images: int,
        times: tuple[Tensor | None, ...],
        numbers: tuple[int, ...],
        mode: int,
    ) -> None:
        """Few channels a program, so that one image occupies several."""
        lanes = max(16, power_of_two(self.width))
        used = lanes // self.width * self.width
        first, second = self.tilings[0], self.tilings[-1]
        _combine_kernel[(images * triton.cdiv(len(self.gamma), used),)](
            stats.rows,
            stats.rows if stats2 is None else stats2.rows,
            part,
            *times,
            *numbers,
            *(v for t in (first, second) for v in (t.height, t.width, t.rows, t.parts)),
            T=max(1, COMBINED // lanes),
            L=lanes,
            USED=used,
            GROUPS=self._groups(used),
            TWO=stats2 is not None,
            TIME=mode,
            **launch_options(8),
        )

    def _groups(self, used: int) -> str:
        """What a block of `used` channels holds, as `of_group` is told."""
        return "each" if self.width == 1 else "one" if self.width == used else "some"

    def _expect(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None,
        scratch: FeatureMap | None,
        stats: FeatureMap | None,
        stats2: FeatureMap | None,
    ) -> None:
        c = len(self.gamma)
        x.expect("x", x.images, x.height, x.width, c if x2 is None else c - x2.channels, bordered=True)
        out.expect("out", x.images, x.height, x.width, c)
        if x2 is not None:
            x2.expect("x2", x.images, x.height, x.width, x2.channels, bordered=True)
        if not self.blocks(x).one_pass and (scratch is None or scratch.rows.numel() < self.scratch_elements(x)):
            raise ValueError(
                f"norms of {x.height}x{x.width} pixels take two passes and need scratch of {self.scratch_elements(x)} elements"
            )
        maps = [fm for fm in (x, x2) if fm is not None]
        kept = [fm for fm in (stats, stats2) if fm is not None]
        if len(kept) != len(self.tilings) or len(kept) not in (0, len(maps)):
            raise ValueError(
                f"{len(kept)} maps of statistics and {len(self.tilings)} tilings for {len(maps)} maps; one each or none"
            )
        for fm, s, tiling in zip(maps, kept, self.tilings, strict=False):
            s.expect("stats", fm.images, tiling.entries, 2, fm.channels, bordered=False)

    def fallback(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        table: Tensor | None = None,
        row: Tensor | None = None,
        scratch: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        stats2: FeatureMap | None = None,
        saturated: Tensor | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        # channels-first, where torch takes the mean before the squared deviations; channels-last it subtracts squares on a CPU
        pixels = wide(x.pixels if x2 is None else torch.cat([x.pixels, x2.pixels], dim=1), compute).contiguous()
        c, more = len(self.gamma), {}
        if table is not None and row is not None:
            entries = table[row.long(), self.column : self.column + (2 * c if self.time == "scale_shift" else c)].to(pixels.dtype)
            names = ("scale", "offset") if self.time == "scale_shift" else ("shift",)
            more = dict(zip(names, entries.split(c, dim=1), strict=True))
        gamma, beta = self.gamma.to(pixels.dtype), self.beta.to(pixels.dtype)
        if stats is None:
            y = group_norm_silu_reference(pixels, gamma, beta, self.groups, self.eps, self.silu, **more)
        else:
            shift = more.pop("shift", None)
            mean, squares = self._channels([stats] if stats2 is None else [stats, stats2], pixels.dtype)
            if shift is not None:
                pixels, mean = pixels + shift[:, :, None, None], mean + shift
            y = norm_from_statistics(pixels, mean, squares, gamma, beta, self.groups, self.eps)
            y = _modulated(y, self.silu, more.get("scale"), more.get("offset"))
        y = y / self.unit  # also into a map that is wider than the kernel's
        if saturated is not None:
            saturated += (~(y.abs() <= E4M3_MAX)).sum()
        if out.rows.dtype == torch.float8_e4m3fn:
            y = y.clamp(-E4M3_MAX, E4M3_MAX)
        out.write(y)

    def _channels(self, kept: list[FeatureMap], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and squared deviations of every channel, [N, C] each, in fp32 at least."""
        wider = torch.promote_types(dtype, torch.float32)
        found = [channel_statistics(s.grid.to(wider), tiling) for s, tiling in zip(kept, self.tilings, strict=True)]
        return torch.cat([mean for mean, _ in found], dim=1), torch.cat([squares for _, squares in found], dim=1)

    def cost(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        stats2: FeatureMap | None = None,
        **_: object,
    ) -> tuple[int, int]:
        """No FLOP worth counting, and the bytes that must move: twice the input's where one pass does not hold it and its writer
        kept no statistics.
        """
        once, more = [fm for fm in (x, x2) if fm is not None], [fm for fm in (stats, stats2) if fm is not None]
        twice = [] if self.blocks(x).one_pass or more else once
        return 0, sum(fm.rows.numel() * fm.rows.element_size() for fm in (*once, *twice, *more, out))
