"""GroupNorm fused with SiLU, the time embedding and the concatenation of the skip connection.

The one-pass form reads a feature map once and writes it once. A program holds a block of channels
(whole groups) of one image in registers: it computes the mean, then the squared deviations, then
the output. If an image is too large, the two-pass form first computes the statistics of groups
(`_group_statistics`), from the map or from its writer's statistics by tiles, then normalizes tiles.
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
    """SiLU(norm(x + shift) * (1 + scale) + offset) of x [N, C, H, W]; optional terms are [N, C]."""
    y = F.group_norm(x if shift is None else x + shift[:, :, None, None], groups, weight, bias, eps)
    return _modulated(y, silu, scale, offset)


def _modulated(y: Tensor, silu: bool, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale is not None and offset is not None:
        y = y * (1 + scale[:, :, None, None]) + offset[:, :, None, None]
    return F.silu(y) if silu else y


def norm_from_statistics(
    x: Tensor, mean: Tensor, squares: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """`F.group_norm` of x [N, C, H, W] from each channel's mean and squared deviations [N, C]."""
    size = x.shape[2] * x.shape[3]
    means, squares = (v.unflatten(1, (groups, -1)) for v in (mean, squares))
    center = means.mean(2, keepdim=True)
    variance = (squares + (means - center).square() * size).mean(2, keepdim=True) / size
    rstd = (variance + eps).rsqrt()[..., None, None]
    y = (x.to(mean.dtype).unflatten(1, (groups, -1)) - center[..., None, None]) * rstd
    return (y.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]).to(x.dtype)


# ---- the operation


@dataclass(frozen=True, eq=False)
class GroupNormSiLU:
    """GroupNorm with optional time embedding and SiLU. See `group_norm_silu_reference`.

    Args:
        gamma, beta: [C] fp32.
        groups: Number of groups; divides C.
        eps: Added to the variance.
        silu: Applies SiLU after the norm.
        time: Use of the time embedding. "add": adds C entries before the norm (they include the
            first convolution's bias). "scale_shift": 2 C entries scale and shift the normalized
            values. None: unused.
        column: First column of this layer's entries in the table of time embeddings.
        unit: Scale of an e4m3 output: the value that a stored 1 represents.
        tilings: Partition of the statistics that the writer of each input map stored. Empty:
            statistics are computed from the maps.
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
        # scale and shift occupy registers too
        limit = MAX_ONE_PASS_ELEMENTS // (2 if self.time == "scale_shift" else 1)
        return Blocks.of(x.height * x.width, len(self.gamma), self.width, limit)

    def scratch_elements(self, x: FeatureMap) -> int:
        """Returns the fp32 elements of scratch memory: statistics of the two-pass form, or 0."""
        if self.blocks(x).one_pass:
            return 0
        return x.images * (1 if self.tilings else MAX_CHUNKS) * self.groups * 2

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

        Args:
            x: Bordered map [N, H, W, C], or its first channels.
            out: Map [N, H, W, C], bordered or dense.
            x2: Bordered map of the remaining channels.
            table: Time embeddings [R, columns] fp32.
            time_row: [N] integer, each image's row of the table.
            scratch: At least `scratch_elements(x)` elements of fp32.
            stats, stats2: Statistics that the writers of x and x2 stored (`TileStatisticsMixin`).
            saturated: [1, 1] int64, for an e4m3 output: incremented by the number of clamped and
                NaN values. None: they are not counted.

        Raises:
            ValueError: The shapes of the maps, the scratch or the statistics do not match.
        """
        b, c = self.blocks(x), len(self.gamma)
        self._expect(x, out, x2, scratch, stats, stats2)
        sources = (x.rows, x.rows if x2 is None else x2.rows)
        time_args: tuple[Tensor | None, ...] = (self.gamma, self.gamma)
        row_stride = 0
        if table is not None:
            time_args, row_stride = (table[:, self.column :], time_row), table.stride(0)
        sizes = (x.height, x.width, x.channels, c, row_stride, self.width)
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
        """Combines statistics by tiles into those of groups; few channels per program."""
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
        """Returns the argument GROUPS of `group_sum` for a block of `used` channels."""
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
            size = None if scratch is None else scratch.rows.numel()
            raise ValueError(
                f"scratch has {size} elements; expected at least {self.scratch_elements(x)} for a "
                f"two-pass norm of {x.height}x{x.width} pixels; allocate scratch_elements(x)"
            )
        maps = [fm for fm in (x, x2) if fm is not None]
        statistics = [fm for fm in (stats, stats2) if fm is not None]
        if len(statistics) != len(self.tilings) or len(statistics) not in (0, len(maps)):
            raise ValueError(
                f"statistics and tilings are {len(statistics)} and {len(self.tilings)} for "
                f"{len(maps)} maps; expected one of each per map, or none"
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
        # channels-first: for channels-last on a CPU torch subtracts squares, which loses precision
        pixels = x.pixels if x2 is None else torch.cat([x.pixels, x2.pixels], dim=1)
        pixels = cast(pixels, compute).contiguous()
        c, time_terms = len(self.gamma), {}
        if table is not None and time_row is not None:
            names = ("scale", "offset") if self.time == "scale_shift" else ("shift",)
            entries = table[time_row.long(), self.column : self.column + len(names) * c]
            entries = entries.to(pixels.dtype).split(c, dim=1)
            time_terms = dict(zip(names, entries, strict=True))
        gamma, beta = self.gamma.to(pixels.dtype), self.beta.to(pixels.dtype)
        if stats is None:
            y = group_norm_silu_reference(
                pixels, gamma, beta, self.groups, self.eps, self.silu, **time_terms
            )
        else:
            shift = time_terms.get("shift")
            statistics = [stats] if stats2 is None else [stats, stats2]
            mean, squares = self._channels(statistics, pixels.dtype)
            if shift is not None:
                pixels, mean = pixels + shift[:, :, None, None], mean + shift
            y = norm_from_statistics(pixels, mean, squares, gamma, beta, self.groups, self.eps)
            y = _modulated(y, self.silu, time_terms.get("scale"), time_terms.get("offset"))
        y = y / self.unit  # also if `out` has a wider type than the kernel's
        if saturated is not None:
            saturated += (~(y.abs() <= E4M3_MAX)).sum()
        if out.rows.dtype == torch.float8_e4m3fn:
            y = y.clamp(-E4M3_MAX, E4M3_MAX)
        out.write(y)

    def _channels(self, statistics: list[FeatureMap], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and squared deviations per channel, [N, C] each, in fp32 or fp64."""
        dtype = torch.promote_types(dtype, torch.float32)
        per_map = [
            channel_statistics(s.grid.to(dtype), tiling)
            for s, tiling in zip(statistics, self.tilings, strict=True)
        ]
        mean, squares = (torch.cat(values, dim=1) for values in zip(*per_map, strict=True))
        return mean, squares

    def cost(
        self,
        x: FeatureMap,
        out: FeatureMap,
        x2: FeatureMap | None = None,
        stats: FeatureMap | None = None,
        stats2: FeatureMap | None = None,
        **_: object,
    ) -> tuple[int, int]:
        """No FLOP, and the bytes moved; two passes without stored statistics read x, x2 twice."""
        maps = [fm for fm in (x, x2) if fm is not None]
        statistics = [fm for fm in (stats, stats2) if fm is not None]
        second_pass = [] if self.blocks(x).one_pass or statistics else maps
        moved = (*maps, *second_pass, *statistics, out)
        return 0, sum(fm.rows.numel() * fm.rows.element_size() for fm in moved)
