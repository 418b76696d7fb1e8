"""Builder of a plan: the launches of a `PackedUNet` for a batch size and an image size."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ...kernels._feature_map import FeatureMap
from ...kernels.attention import FoldedAttention, MultiHeadAttention, fold
from ...models.unet import Attention, Downsample, Level, ResBlock, UNet, Upsample
from .layers import LayerBuilder
from .packing import Inputs, PackedUNet
from .plan import Buffer


class PlanBuilder(LayerBuilder):
    """Lists the launches of one forward pass, in the order of the reference."""

    def __init__(self, net: PackedUNet, inputs: Inputs, batch: int, size: tuple[int, int]) -> None:
        super().__init__(net, inputs, batch, size)
        self._build(net.unet)

    def _build(self, unet: UNet) -> None:
        net, i = self.net, self.inputs
        if i.time_rows is not None:
            shape = (self.batch, 1, 1, net.time_row_width)
            time_rows = Buffer("time_rows", *shape, torch.float32, bordered=False, external=True)
            self.external[time_rows] = FeatureMap(i.table, self.batch, 1, 1, bordered=False)
            self.emit("time_rows", i.time_rows, time_rows, tensors=dict(t=i.t, label=i.label))
        x = self.conv_in(unet.conv_in)
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
            x = self.attention(cast(Attention, attention), x)
        x = self.residual(unet.mid_block.resnets[1], x)
        for level in cast("list[Level]", unet.up_blocks):
            for j in range(len(level.resnets)):
                x = self.attend(level, j, self.residual(level.resnets[j], x, skips.pop()))
            if level.upsamplers is not None:
                x = self.resample(level.upsamplers[0], x)
        a = self.norm("conv_norm_out", unet.conv_norm_out, x)
        self.conv3x3("conv_out", unet.conv_out, a, self.out)

    def attend(self, level: Level, j: int, x: Buffer) -> Buffer:
        return (
            self.attention(cast(Attention, level.attentions[j]), x)
            if hasattr(level, "attentions")
            else x
        )

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
            a = self.resampled(f"{name}.norm1.pool", a, "half")
            x = self.resampled(f"{name}.x.pool", x, "half")
        elif block.resample == "up":
            x = self.resampled(f"{name}.x.double", x, "double")
        if block.conv_shortcut is not None:
            conv = block.conv_shortcut
            x = self.conv1x1(
                f"{name}.conv_shortcut", conv.weight[:, :, 0, 0], conv.bias, x, x2=skip
            )
        bias = block.scale_shift
        if block.resample == "up":
            h = self.upsample(f"{name}.conv1", block.conv1, a, bias)
        else:
            h = self.conv3x3(f"{name}.conv1", block.conv1, a, None, bias=bias)
        a = self.norm(f"{name}.norm2", block.norm2, h, None, block.conv2, block)
        return self.conv3x3(f"{name}.conv2", block.conv2, a, None, residual=x, scale=scale)

    def attention(self, layer: Attention, x: Buffer) -> Buffer:
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
            q = self.conv1x1(f"{name}.q", *pairs[0], a)
            weight, bias = (scale * v for v in pairs[1])
            op = net.cached(
                name, lambda: FoldedAttention.of(weight, bias, net.activations, net.target, scale)
            )
            return self.emit(f"{name}.attention", op, out, q=q, x=a, residual=x)
        projections = (layer.to_q, layer.to_k, layer.to_v)
        weight, bias = (
            torch.cat([getattr(p, which) for p in projections]) for which in ("weight", "bias")
        )
        qkv = self.conv1x1(f"{name}.qkv", weight, bias, a)
        mixed = self.emit(
            f"{name}.attention",
            MultiHeadAttention(layer.heads, net.target),
            self.like(f"{name}.mixed", x, x.channels),
            qkv=qkv,
        )
        last = cast(nn.Linear, layer.to_out[0])
        return self.conv1x1(
            f"{name}.to_out", last.weight, last.bias, mixed, residual=x, scale=scale
        )
