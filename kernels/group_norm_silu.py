"""GroupNorm with what surrounds it in the network: the time embedding before it, SiLU after it, the skip's concatenation.

One pass reads a feature map once and writes it once: a program holds one image's block of channels (whole groups) in registers,
takes the mean, then the squared deviations from it, then writes what the next layer reads. Where a block is too large for that,
two launches: statistics of groups (`_group_statistics`), from the map or from what its writer stored by tiles, then the same
arithmetic on tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import E4M3_MAX, TRITON_TYPE, cast, next_power_of_two
from ._group_norm_kernels import MAX_ONE_PASS_ELEMENTS, Blocks, _apply_kernel, _one_pass_kernel
from ._group_statistics import _combine_kernel, _statistics_kernel
from ._launch import launch_options
from ._tile_statistics import Tiling, channel_statistics
from ._triton import triton

MAX_CHUNKS = 16
COMBINE_ELEMENTS = 4096  # tiles x channels of statistics that a program combines at once


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


def norm_from_statistics(
    x: Tensor, mean: Tensor, squares: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """`F.group_norm` of x [N, C, H, W]; mean, squares [N, C]: of each channel, and the sum of squared deviations from it."""
    size = x.shape[2] * x.shape[3]
    means, squares = (v.unflatten(1, (groups, -1)) for v in (mean, squares))
    center = means.mean(2, keepdim=True)
    variance = (squares + (means - center).square() * size).mean(2, keepdim=True) / size
    y = (x.to(mean.dtype).unflatten(1, (groups, -1)) - center[..., None, None]) * (
        variance + eps
    ).rsqrt()[..., None, None]
    return (y.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]).to(x.dtype)


# ---- the operation


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
        # scale and shift take registers too
        return Blocks.of(
            x.height * x.width,
            len(self.gamma),
            self.width,
            MAX_ONE_PASS_ELEMENTS // 2 if self.time == "scale_shift" else MAX_ONE_PASS_ELEMENTS,
        )

    def scratch_elements(self, x: FeatureMap) -> int:
        """fp32 elements that the two-pass form needs for its statistics; 0 in one pass."""
        return (
            0
            if self.blocks(x).one_pass
            else x.images * (1 if self.tilings else MAX_CHUNKS) * self.groups * 2
        )

    def run(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        table: Tensor | None = None,
        time_row: Tensor | None = None,
        scratch: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        stats2: FeatureMap | None = None,
        saturated: Tensor | None = None,
    ) -> None:
        """Launches the kernels.

        table       [R, columns] fp32, time_row [N] integer: the row of each image
        scratch     fp32, `scratch_elements(x)` of them
        stats       and stats2, where there are `tilings`: what the writers of x and x2 stored (`KeepsStatistics`)
        saturated   [1, 1] int64, of an e4m3 output: incremented by the number of values that were clamped or are NaN; None: no
                    count, and no cost

        ValueError where a map, the scratch or the statistics are not of the shapes that belong together.
        """
        b, c = self.blocks(x), len(self.gamma)
        self._expect(x, out, x2, scratch, stats, stats2)
        second = x if x2 is None else x2
        sources, time_args = (
            (x.rows, second.rows),
            (self.gamma, self.gamma) if table is None else (table[:, self.column :], time_row),
        )
        sizes = (
            x.height,
            x.width,
            x.channels,
            c,
            0 if table is None else table.stride(0),
            self.width,
        )
        block_args = dict(
            P=b.pixels, L=b.lanes, USED=b.used, GROUPS=self._groups(b.used), TWO=x2 is not None
        )
        block_args |= launch_options(b.warps)
        mode = 0 if self.time is None else 1 if self.time == "add" else 2
        output_args = dict(
            TIME=mode,
            SILU=self.silu,
            BORDER=int(out.bordered),
            OUT=TRITON_TYPE[out.rows.dtype],
            COUNT=saturated is not None,
        )
        scale = (1 / self.unit, self.gamma if saturated is None else saturated)
        blocks = triton.cdiv(c, b.used)
        with torch.cuda.device_of(x.rows):
            if b.one_pass:
                _one_pass_kernel[(x.images * blocks,)](
                    *sources,
                    out.rows,
                    self.gamma,
                    self.beta,
                    *time_args,
                    *sizes,
                    self.eps,
                    *scale,
                    **block_args,
                    **output_args,
                )
                return
            assert scratch is not None
            size, part = x.height * x.width, scratch.rows
            chunk = triton.cdiv(triton.cdiv(size, MAX_CHUNKS), b.pixels) * b.pixels
            if stats is not None:
                chunk = size
                self._combine(stats, stats2, part, x.images, time_args, sizes, mode)
            chunks = triton.cdiv(size, chunk)
            if stats is None:
                _statistics_kernel[(x.images * chunks * blocks,)](
                    *sources, part, *time_args, *sizes, chunk, chunks, TIME=mode, **block_args
                )
            _apply_kernel[(x.images * triton.cdiv(size, b.pixels) * blocks,)](
                *sources,
                out.rows,
                part,
                self.gamma,
                self.beta,
                *time_args,
                *sizes,
                chunk,
                chunks,
                self.eps,
                *scale,
                MOST=MAX_CHUNKS,
                **block_args,
                **output_args,
            )

    def _combine(
        self,
        stats: FeatureMap,
        stats2: FeatureMap | None,
        part: Tensor,
        images: int,
        time_args: tuple[Tensor | None, ...],
        sizes: tuple[int, ...],
        mode: int,
    ) -> None:
        """Few channels a program, so that one image occupies several."""
        lanes = max(16, next_power_of_two(self.width))
        used = lanes // self.width * self.width
        first, second = self.tilings[0], self.tilings[-1]
        _combine_kernel[(images * triton.cdiv(len(self.gamma), used),)](
            stats.rows,
            stats.rows if stats2 is None else stats2.rows,
            part,
            *time_args,
            *sizes,
            *(v for t in (first, second) for v in (t.height, t.width, t.rows, t.parts)),
            T=max(1, COMBINE_ELEMENTS // lanes),
            L=lanes,
            USED=used,
            GROUPS=self._groups(used),
            TWO=stats2 is not None,
            TIME=mode,
            **launch_options(8),
        )

    def _groups(self, used: int) -> str:
        """What a block of `used` channels holds, in the words of `of_group`."""
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
        x.expect(
            "x", x.images, x.height, x.width, c if x2 is None else c - x2.channels, bordered=True
        )
        out.expect("out", x.images, x.height, x.width, c)
        if x2 is not None:
            x2.expect("x2", x.images, x.height, x.width, x2.channels, bordered=True)
        if not self.blocks(x).one_pass and (
            scratch is None or scratch.rows.numel() < self.scratch_elements(x)
        ):
            raise ValueError(
                f"norms of {x.height}x{x.width} pixels take two passes and need scratch of {self.scratch_elements(x)} elements"
            )
        maps = [fm for fm in (x, x2) if fm is not None]
        statistics = [fm for fm in (stats, stats2) if fm is not None]
        if len(statistics) != len(self.tilings) or len(statistics) not in (0, len(maps)):
            raise ValueError(
                f"{len(statistics)} maps of statistics and {len(self.tilings)} tilings for {len(maps)} maps; one each or none"
            )
        for fm, s, tiling in zip(maps, statistics, self.tilings, strict=False):
            s.expect("stats", fm.images, tiling.entries, 2, fm.channels, bordered=False)

    def fallback(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        table: Tensor | None = None,
        time_row: Tensor | None = None,
        scratch: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        stats2: FeatureMap | None = None,
        saturated: Tensor | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        # channels-first, where torch takes the mean before the squared deviations; channels-last it subtracts squares on a CPU
        pixels = cast(
            x.pixels if x2 is None else torch.cat([x.pixels, x2.pixels], dim=1), compute
        ).contiguous()
        c, more = len(self.gamma), {}
        if table is not None and time_row is not None:
            entries = table[
                time_row.long(),
                self.column : self.column + (2 * c if self.time == "scale_shift" else c),
            ].to(pixels.dtype)
            names = ("scale", "offset") if self.time == "scale_shift" else ("shift",)
            more = dict(zip(names, entries.split(c, dim=1), strict=True))
        gamma, beta = self.gamma.to(pixels.dtype), self.beta.to(pixels.dtype)
        if stats is None:
            y = group_norm_silu_reference(
                pixels, gamma, beta, self.groups, self.eps, self.silu, **more
            )
        else:
            shift = more.pop("shift", None)
            mean, squares = self._channels(
                [stats] if stats2 is None else [stats, stats2], pixels.dtype
            )
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

    def _channels(self, statistics: list[FeatureMap], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and squared deviations of every channel, [N, C] each, in fp32 at least."""
        dtype = torch.promote_types(dtype, torch.float32)
        per_map = [
            channel_statistics(s.grid.to(dtype), tiling)
            for s, tiling in zip(statistics, self.tilings, strict=True)
        ]
        return torch.cat([mean for mean, _ in per_map], dim=1), torch.cat(
            [squares for _, squares in per_map], dim=1
        )

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
        maps, more = (
            [fm for fm in (x, x2) if fm is not None],
            [fm for fm in (stats, stats2) if fm is not None],
        )
        second_pass = [] if self.blocks(x).one_pass or more else maps
        return 0, sum(
            fm.rows.numel() * fm.rows.element_size() for fm in (*maps, *second_pass, *more, out)
        )
