"""Launches of single layers: each method appends the launches of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels._feature_map import FeatureMap
from ...kernels._gemm import E4M3_MAX, Tiles, divisor
from ...kernels._tile_statistics import TileStatisticsMixin, Tiling
from ...kernels.conv1x1 import Conv1x1
from ...kernels.conv3x3 import Conv3x3
from ...kernels.conv_downsample import ConvDownsample
from ...kernels.conv_in import ConvIn
from ...kernels.conv_upsample import ConvUpsample
from ...kernels.group_norm_silu import GroupNormSiLU
from ...kernels.resample import Resample
from ...models.unet import ResBlock
from .packing import DEVIATIONS, E4M3, Inputs, PackedUNet
from .plan import Buffer, Launch, Op


class LayerBuilder:
    """List of launches under construction, for a batch size and an image size.

    Attributes:
        launches: The launches so far.
        x, out: Buffers of the network's input and output.
        external: Memory of external buffers that is allocated before the plan.
        units: Buffer -> the value of a stored 1, for e4m3.
        writers: Buffer -> index of the launch that writes it.
        fixed: Buffer -> tiles of its launch that do not depend on the batch size.
    """

    def __init__(self, net: PackedUNet, inputs: Inputs, batch: int, size: tuple[int, int]) -> None:
        self.net, self.inputs, self.batch = net, inputs, batch
        self.launches: list[Launch] = []
        self.units: dict[Buffer, float] = {}
        self.external: dict[Buffer, FeatureMap] = {}
        self.writers: dict[Buffer, int] = {}
        self.fixed: dict[Buffer, Tiles] = {}
        dense: dict[str, Any] = dict(dtype=torch.float32, bordered=False, external=True)
        self.x = Buffer("x_t", batch, *size, net.config.in_channels, **dense)
        self.out = Buffer("out", batch, *size, net.config.out_channels, **dense)

    def emit(
        self,
        name: str,
        op: Op,
        out: Buffer,
        *,
        scratch: Buffer | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        **reads: Buffer | None,
    ) -> Buffer:
        writes = {"out": out} | ({"scratch": scratch} if scratch is not None else {})
        self.writers[out] = len(self.launches)
        self.launches.append(
            Launch(
                name, op, {k: b for k, b in reads.items() if b is not None}, writes, tensors or {}
            )
        )
        return out

    def like(
        self,
        name: str,
        x: Buffer,
        channels: int,
        dtype: torch.dtype | None = None,
        scale: float = 1,
        bordered: bool = True,
    ) -> Buffer:
        return Buffer(
            name,
            self.batch,
            int(x.height * scale),
            int(x.width * scale),
            channels,
            dtype or self.net.activations,
            bordered,
        )

    def cut(
        self, out: Buffer, kind: str, *args: Any, shrinks: float = 0.2, **options: Any
    ) -> Tiles:
        """Returns tiles that depend on the batch size. Records those that do not, which a launch
        uses if it keeps statistics.
        """
        self.fixed[out] = self.net.cut(kind, *args, **options)
        return self.net.cut(kind, *args, **options, shrinks=shrinks)

    def conv_in(self, conv: nn.Conv2d) -> Buffer:
        net, k = self.net, conv.out_channels
        out = self.like("conv_in.out", self.x, k)
        step = ConvIn.block_k(conv.in_channels)
        tiles = replace(
            net.cut("conv_in", step, k, out.rows, *_size(self.x), tma=False), block_k=step
        )
        make = lambda: ConvIn.of(
            net.weight(conv.weight),
            net.weight(conv.bias),
            net.activations,
            tiles,
            net.config.center_input,
        )
        return self.emit(
            "conv_in", replace(net.cached("conv_in", make), tiles=tiles), out, x=self.x
        )

    def operand_of(self, conv: nn.Conv2d | None) -> torch.dtype:
        """Dtype of a convolution's operands: e4m3 if the convolution uses it and the range of its
        input is known at construction.
        """
        net = self.net
        range_known = net.time_rows is None or not net.config.scale_shift
        return (
            E4M3
            if conv is not None and net.names[conv] in net.e4m3_convolutions and range_known
            else net.activations
        )

    def conv3x3(
        self,
        name: str,
        conv: nn.Conv2d,
        x: Buffer,
        out: Buffer | None,
        residual: Buffer | None = None,
        scale: float = 1.0,
        bias: bool = True,
    ) -> Buffer:
        """conv(x) + residual, both times `scale`."""
        net = self.net
        out = out or self.like(f"{name}.out", x, conv.out_channels)
        tiles = self.cut(
            out,
            "conv3x3",
            x.channels,
            conv.out_channels,
            x.rows,
            *_size(x),
            tma=True,
            dtype=x.dtype,
            warps=8 if x.dtype == E4M3 else 4,
            shrinks=2,
        )

        def make() -> Conv3x3:
            weight = scale * net.weight(conv.weight)
            b = scale * net.weight(conv.bias) if bias else None
            return Conv3x3.of(weight, b, x.dtype, tiles, self.units.get(x, 1.0), scale, net.bounded)

        return self.emit(
            name, replace(net.cached(name, make), tiles=tiles), out, x=x, residual=residual
        )

    def upsample(self, name: str, conv: nn.Conv2d, x: Buffer, bias: bool = True) -> Buffer:
        net, out = self.net, self.like(f"{name}.out", x, conv.out_channels, scale=2)
        tiles = self.cut(
            out, "conv_upsample", x.channels, conv.out_channels, 4 * x.rows, *_size(x), tma=True
        )

        def make() -> ConvUpsample:
            b = net.weight(conv.bias)
            return ConvUpsample.of(
                net.weight(conv.weight), b if bias else torch.zeros_like(b), net.activations, tiles
            )

        return self.emit(name, replace(net.cached(name, make), tiles=tiles), out, x=x)

    def downsample(self, name: str, conv: nn.Conv2d, x: Buffer) -> Buffer:
        net, out = self.net, self.like(f"{name}.out", x, conv.out_channels, scale=0.5)
        tiles = self.cut(
            out, "conv_downsample", x.channels, out.channels, out.rows, *_size(x), tma=False
        )
        padding = net.config.downsample_padding
        make = lambda: ConvDownsample.of(
            net.weight(conv.weight), net.weight(conv.bias), padding, net.activations, tiles
        )
        return self.emit(name, replace(net.cached(name, make), tiles=tiles), out, x=x)

    def conv1x1(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        x: Buffer,
        x2: Buffer | None = None,
        residual: Buffer | None = None,
        scale: float = 1.0,
    ) -> Buffer:
        net, out = self.net, self.like(f"{name}.out", x, len(weight), bordered=x.bordered)
        least = x.channels if x2 is None else min(divisor(x.channels, 64), divisor(x2.channels, 64))
        tiles = net.cut("conv1x1", least, len(weight), x.rows, *_size(x), tma=False)
        make = lambda: Conv1x1.of(
            scale * net.weight(weight), scale * net.weight(bias), net.activations, tiles, scale
        )
        return self.emit(
            name, replace(net.cached(name, make), tiles=tiles), out, x=x, x2=x2, residual=residual
        )

    def resampled(self, name: str, x: Buffer, to: str, bordered: bool = True) -> Buffer:
        scale = {"half": 0.5, "same": 1, "double": 2}[to]
        return self.emit(
            name,
            Resample(to),
            self.like(f"{name}.out", x, x.channels, scale=scale, bordered=bordered),
            x=x,
        )

    def norm(
        self,
        name: str,
        layer: nn.GroupNorm,
        x: Buffer,
        x2: Buffer | None = None,
        conv: nn.Conv2d | None = None,
        block: ResBlock | None = None,
        silu: bool = True,
        bordered: bool = True,
    ) -> Buffer:
        """conv: the 3x3 convolution that reads the output; block: the residual block whose time
        embedding is added.
        """
        net, i = self.net, self.inputs
        dtype = self.operand_of(conv)
        time = None if block is None else "scale_shift" if block.scale_shift else "add"
        column = 0 if block is None else net.time_columns[net.names[block]]

        def make() -> GroupNormSiLU:
            gamma, beta = net.weight(layer.weight).float(), net.weight(layer.bias).float()
            unit = (
                1.0
                if conv is None or dtype != E4M3
                else self._unit(net.names[conv], gamma, beta, time, column)
            )
            return GroupNormSiLU(gamma, beta, layer.num_groups, layer.eps, silu, time, column, unit)

        op = net.cached(name, make)
        out = self.like(f"{name}.out", x, layer.num_channels, dtype, bordered=bordered)
        self.units[out] = op.unit
        stats: list[Buffer] = []
        if op.scratch_elements(x.empty("meta")):
            stats, tilings = self.statistics([x] if x2 is None else [x, x2])
            op = replace(op, tilings=tilings)
        elements = op.scratch_elements(x.empty("meta"))
        scratch = (
            Buffer(f"{name}.scratch", 1, 1, elements, 1, torch.float32, bordered=False)
            if elements
            else None
        )
        tensors = {} if block is None else dict(table=i.table, time_row=i.time_row)
        if conv is not None and dtype == E4M3 and net.count_saturated:
            # [1, 1], since [1] would be one value per image
            index = net.e4m3_convolutions.index(net.names[conv])
            tensors["saturated"] = net.saturated[index].view(1, 1)
        of_stats = dict(zip(("stats", "stats2"), stats, strict=False))
        return self.emit(name, op, out, scratch=scratch, tensors=tensors, x=x, x2=x2, **of_stats)

    def statistics(self, maps: list[Buffer]) -> tuple[list[Buffer], tuple[Tiling, ...]]:
        """Makes the launches that write `maps` keep statistics, and returns those; empty if one of
        the launches cannot.
        """
        writers = [self.launches[self.writers[b]] for b in maps]
        if not all(isinstance(launch.op, TileStatisticsMixin) for launch in writers):
            return [], ()
        stats, tilings = [], []
        for b, launch in zip(maps, writers, strict=True):
            op: Any = replace(
                cast(Any, launch.op), tiles=self.fixed.get(b, cast(Any, launch.op).tiles)
            )
            tiling = op.tiling(b.empty("meta"))
            shape = (self.batch, tiling.entries, 2, b.channels)
            stored = launch.writes.get("stats") or Buffer(
                f"{b.name}.stats", *shape, torch.float32, bordered=False
            )
            self.launches[self.writers[b]] = replace(
                launch, op=op, writes={**launch.writes, "stats": stored}
            )
            stats.append(stored)
            tilings.append(tiling)
        return stats, tuple(tilings)

    def _unit(self, conv: str, gamma: Tensor, beta: Tensor, time: str | None, column: int) -> float:
        """Value of a stored 1 of an e4m3 activation: calibrated, or such that `DEVIATIONS` fit."""
        if conv in self.net.units:
            return self.net.units[conv]
        if gamma.is_meta:
            return 1.0
        if time == "scale_shift":
            scale, shift = self.inputs.table[:, column : column + 2 * len(gamma)].chunk(2, dim=1)
            gamma, beta = gamma * (1 + scale), beta * (1 + scale) + shift
        return float((DEVIATIONS * gamma.abs() + beta.abs()).max()) / E4M3_MAX


def _size(b: Buffer) -> tuple[int, int]:
    return b.height, b.width
