"""List of the launches of a `PackedUNet` for a batch size and an image size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels._feature_map import FeatureMap
from ...kernels._gemm import E4M3_MAX, Tiles, divisor
from ...kernels._tile_statistics import KeepsStatistics, Tiling
from ...kernels.attention import Attention, FoldedAttention, fold
from ...kernels.conv1x1 import Pointwise
from ...kernels.conv2d_pointers import DownsampleConv, FirstConv
from ...kernels.conv3x3 import Conv3x3
from ...kernels.conv_upsample import UpsampleConv
from ...kernels.group_norm_silu import GroupNormSiLU
from ...kernels.resample import Resample
from ...models.unet import Attention as AttentionLayer
from ...models.unet import Downsample, Level, ResBlock, UNet, Upsample
from .packing import DEVIATIONS, E4M3, Inputs, PackedUNet
from .plan import Buffer, Launch, Op


class PlanBuilder:
    """Lists the launches of one forward pass, in the order of the reference."""

    def __init__(self, net: PackedUNet, inputs: Inputs, batch: int, size: tuple[int, int]) -> None:
        self.net, self.inputs, self.batch = net, inputs, batch
        self.launches: list[Launch] = []
        self.units: dict[Buffer, float] = {}  # the value of a stored 1 of an e4m3 map
        self.external: dict[Buffer, FeatureMap] = {}  # buffers with memory that is allocated before the plan
        self.writers: dict[Buffer, int] = {}  # the launch that writes a map
        self.fixed: dict[Buffer, Tiles] = {}  # tiles that do not depend on the batch, for launches whose tiles do
        c = net.config
        self.x = Buffer("x_t", batch, *size, c.in_channels, torch.float32, bordered=False, external=True)
        self.out = Buffer("out", batch, *size, c.out_channels, torch.float32, bordered=False, external=True)
        self._build(net.unet)

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
        self.launches.append(Launch(name, op, {k: b for k, b in reads.items() if b is not None}, writes, tensors or {}))
        return out

    def like(
        self, name: str, x: Buffer, channels: int, dtype: torch.dtype | None = None, scale: float = 1, bordered: bool = True
    ) -> Buffer:
        return Buffer(
            name, self.batch, int(x.height * scale), int(x.width * scale), channels, dtype or self.net.activations, bordered
        )

    # ---- the network, in the reference's order

    def _build(self, unet: UNet) -> None:
        net, i = self.net, self.inputs
        if i.time_rows is not None:
            time_rows = Buffer("time_rows", self.batch, 1, 1, net.time_row_width, torch.float32, bordered=False, external=True)
            self.external[time_rows] = FeatureMap(i.table, self.batch, 1, 1, bordered=False)
            self.emit("time_rows", i.time_rows, time_rows, tensors=dict(t=i.t, label=i.label))
        x = self.first_conv(unet.conv_in)
        skips = [x]
        for level in cast("list[Level]", unet.down_blocks):
            for j in range(len(level.resnets)):
                x = self.attend(level, j, self.residual(level.resnets[j], x))
                skips.append(x)
            if level.downsamplers is not None:
                x = self.resample(level.downsamplers[0], x)
                skips.append(x)
        x = self.residual(unet.mid_block.resnets[0], x)
        for attention in unet.mid_block.attentions:
            x = self.attention(cast(AttentionLayer, attention), x)
        x = self.residual(unet.mid_block.resnets[1], x)
        for level in cast("list[Level]", unet.up_blocks):
            for j in range(len(level.resnets)):
                x = self.attend(level, j, self.residual(level.resnets[j], x, skips.pop()))
            if level.upsamplers is not None:
                x = self.resample(level.upsamplers[0], x)
        a = self.norm("conv_norm_out", unet.conv_norm_out, x)
        self.conv3x3("conv_out", unet.conv_out, a, self.out)

    def attend(self, level: Level, j: int, x: Buffer) -> Buffer:
        return self.attention(cast(AttentionLayer, level.attentions[j]), x) if hasattr(level, "attentions") else x

    def resample(self, layer: nn.Module, x: Buffer) -> Buffer:
        name = self.net.names[layer]
        if isinstance(layer, ResBlock):
            return self.residual(layer, x)
        if isinstance(layer, Downsample):
            return self.downsample(f"{name}.conv", layer.conv, x)
        return self.upsample(f"{name}.conv", cast(Upsample, layer).conv, x)

    # ---- blocks

    def residual(self, block: nn.Module, x: Buffer, skip: Buffer | None = None) -> Buffer:
        block = cast(ResBlock, block)
        name, scale = self.net.names[block], 1 / block.scale
        plain = block.resample is None
        a = self.norm(f"{name}.norm1", block.norm1, x, skip, block.conv1 if plain else None)
        if block.resample == "down":
            a, x = (self.resampled(f"{name}.{what}.pool", b, "half") for what, b in (("norm1", a), ("x", x)))
        elif block.resample == "up":
            x = self.resampled(f"{name}.x.double", x, "double")
        if block.conv_shortcut is not None:
            x = self.pointwise(
                f"{name}.conv_shortcut", block.conv_shortcut.weight[:, :, 0, 0], block.conv_shortcut.bias, x, x2=skip
            )
        bias = block.scale_shift
        if block.resample == "up":
            h = self.upsample(f"{name}.conv1", block.conv1, a, bias)
        else:
            h = self.conv3x3(f"{name}.conv1", block.conv1, a, None, bias=bias)
        a = self.norm(f"{name}.norm2", block.norm2, h, None, block.conv2, block)
        return self.conv3x3(f"{name}.conv2", block.conv2, a, None, residual=x, scale=scale)

    def attention(self, layer: AttentionLayer, x: Buffer) -> Buffer:
        net, name, scale = self.net, self.net.names[layer], 1 / layer.scale
        if layer.group_norm is None:
            a = self.resampled(f"{name}.copy", x, "same", bordered=False)
        else:
            a = self.norm(f"{name}.group_norm", layer.group_norm, x, silu=False, bordered=False)
        out = self.like(f"{name}.out", x, x.channels)
        if layer.heads == 1:
            folded = lambda: fold(
                *(
                    (net.weight(p.weight), net.weight(p.bias))
                    for p in (layer.to_q, layer.to_k, layer.to_v, cast(nn.Linear, layer.to_out[0]))
                )
            )
            pairs = net.cached(f"{name}.fold", folded)
            q = self.pointwise(f"{name}.q", *pairs[0], a)
            weight, bias = (scale * v for v in pairs[1])
            op = net.cached(name, lambda: FoldedAttention.of(weight, bias, net.activations, net.target, scale))
            return self.emit(f"{name}.attention", op, out, q=q, x=a, residual=x)
        projections = (layer.to_q, layer.to_k, layer.to_v)
        weight, bias = (torch.cat([getattr(p, which) for p in projections]) for which in ("weight", "bias"))
        qkv = self.pointwise(f"{name}.qkv", weight, bias, a)
        mixed = self.emit(
            f"{name}.attention", Attention(layer.heads, net.target), self.like(f"{name}.mixed", x, x.channels), qkv=qkv
        )
        last = cast(nn.Linear, layer.to_out[0])
        return self.pointwise(f"{name}.to_out", last.weight, last.bias, mixed, residual=x, scale=scale)

    # ---- layers

    def cut(self, out: Buffer, kind: str, *args: Any, **options: Any) -> Tiles:
        """Tiles that depend on the batch; those that do not are recorded, for a launch that keeps statistics uses them."""
        self.fixed[out] = self.net.cut(kind, *args, **options)
        return self.net.cut(kind, *args, **options, shrinks=2 if kind == "conv3x3" else 0.2)

    def first_conv(self, conv: nn.Conv2d) -> Buffer:
        net, k = self.net, conv.out_channels
        out = self.like("conv_in.out", self.x, k)
        step = FirstConv.step(conv.in_channels)
        tiles = replace(net.cut("first_conv", step, k, out.rows, *_size(self.x), tma=False), bk=step)
        make = lambda: FirstConv.of(net.weight(conv.weight), net.weight(conv.bias), net.activations, tiles, net.config.center_input)
        return self.emit("conv_in", replace(net.cached("conv_in", make), tiles=tiles), out, x=self.x)

    def operand_of(self, conv: nn.Conv2d | None) -> torch.dtype:
        """The type of a convolution's operands: e4m3 if it takes that, and its range is known beforehand."""
        net = self.net
        range_known = net.time_rows is None or not net.config.scale_shift
        return E4M3 if conv is not None and net.names[conv] in net.e4m3_convolutions and range_known else net.activations

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
        tiles = self.cut(out, "conv3x3", x.channels, conv.out_channels, x.rows, *_size(x), tma=True, dtype=x.dtype)

        def make() -> Conv3x3:
            weight, b = scale * net.weight(conv.weight), scale * net.weight(conv.bias) if bias else None
            return Conv3x3.of(weight, b, x.dtype, tiles, self.units.get(x, 1.0), scale, net.bounded)

        return self.emit(name, replace(net.cached(name, make), tiles=tiles), out, x=x, residual=residual)

    def upsample(self, name: str, conv: nn.Conv2d, x: Buffer, bias: bool = True) -> Buffer:
        net, out = self.net, self.like(f"{name}.out", x, conv.out_channels, scale=2)
        tiles = self.cut(out, "upsample_conv", x.channels, conv.out_channels, 4 * x.rows, *_size(x), tma=True)

        def make() -> UpsampleConv:
            b = net.weight(conv.bias)
            return UpsampleConv.of(net.weight(conv.weight), b if bias else torch.zeros_like(b), net.activations, tiles)

        return self.emit(name, replace(net.cached(name, make), tiles=tiles), out, x=x)

    def downsample(self, name: str, conv: nn.Conv2d, x: Buffer) -> Buffer:
        net, out = self.net, self.like(f"{name}.out", x, conv.out_channels, scale=0.5)
        tiles = self.cut(out, "downsample_conv", x.channels, out.channels, out.rows, *_size(x), tma=False)
        padding = net.config.downsample_padding
        make = lambda: DownsampleConv.of(net.weight(conv.weight), net.weight(conv.bias), padding, net.activations, tiles)
        return self.emit(name, replace(net.cached(name, make), tiles=tiles), out, x=x)

    def pointwise(
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
        tiles = net.cut("pointwise", least, len(weight), x.rows, *_size(x), tma=False)
        make = lambda: Pointwise.of(scale * net.weight(weight), scale * net.weight(bias), net.activations, tiles, scale)
        return self.emit(name, replace(net.cached(name, make), tiles=tiles), out, x=x, x2=x2, residual=residual)

    def resampled(self, name: str, x: Buffer, to: str, bordered: bool = True) -> Buffer:
        scale = {"half": 0.5, "same": 1, "double": 2}[to]
        return self.emit(name, Resample(to), self.like(f"{name}.out", x, x.channels, scale=scale, bordered=bordered), x=x)

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
        """conv: the 3x3 convolution that reads this; block: the residual block whose time embedding joins here."""
        net, i = self.net, self.inputs
        dtype = self.operand_of(conv)
        time = None if block is None else "scale_shift" if block.scale_shift else "add"
        column = 0 if block is None else net.time_columns[net.names[block]]

        def make() -> GroupNormSiLU:
            gamma, beta = net.weight(layer.weight).float(), net.weight(layer.bias).float()
            unit = 1.0 if conv is None or dtype != E4M3 else self._unit(net.names[conv], gamma, beta, time, column)
            return GroupNormSiLU(gamma, beta, layer.num_groups, layer.eps, silu, time, column, unit)

        op = net.cached(name, make)
        out = self.like(f"{name}.out", x, layer.num_channels, dtype, bordered=bordered)
        self.units[out] = op.unit
        stats: list[Buffer] = []
        if op.scratch_elements(x.empty("meta")):
            stats, tilings = self.statistics([x] if x2 is None else [x, x2])
            op = replace(op, tilings=tilings)
        elements = op.scratch_elements(x.empty("meta"))
        scratch = Buffer(f"{name}.scratch", 1, 1, elements, 1, torch.float32, bordered=False) if elements else None
        tensors = {} if block is None else dict(table=i.table, row=i.time_row)
        if conv is not None and dtype == E4M3 and net.count_saturated:
            tensors["saturated"] = net.saturated[net.e4m3_convolutions.index(net.names[conv])].view(
                1, 1
            )  # not [1], which would be one value per image
        of_stats = dict(zip(("stats", "stats2"), stats, strict=False))
        return self.emit(name, op, out, scratch=scratch, tensors=tensors, x=x, x2=x2, **of_stats)

    def statistics(self, maps: list[Buffer]) -> tuple[list[Buffer], tuple[Tiling, ...]]:
        """The statistics of `maps`, which the launches that write them keep from now on; empty if one of them cannot."""
        writers = [self.launches[self.writers[b]] for b in maps]
        if not all(isinstance(launch.op, KeepsStatistics) for launch in writers):
            return [], ()
        stats, tilings = [], []
        for b, launch in zip(maps, writers, strict=True):
            op: Any = replace(cast(Any, launch.op), tiles=self.fixed.get(b, cast(Any, launch.op).tiles))
            tiling = op.tiling(b.empty("meta"))
            stored = launch.writes.get("stats") or Buffer(
                f"{b.name}.stats", self.batch, tiling.entries, 2, b.channels, torch.float32, bordered=False
            )
            self.launches[self.writers[b]] = replace(launch, op=op, writes={**launch.writes, "stats": stored})
            stats.append(stored)
            tilings.append(tiling)
        return stats, tuple(tilings)

    def _unit(self, conv: str, gamma: Tensor, beta: Tensor, time: str | None, column: int) -> float:
        """The value of a stored 1 of an e4m3 activation: as calibrated, or so that values some deviations from the mean fit."""
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
