"""Lowering of a `UNet` to a program for one image.

Exact algebra, as in `fused.model`: projections of the time embedding are rows of a table, and
single-head attention is folded.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.attention import fold
from ...models.unet import Attention, Level, ResBlock, UNet, Upsample
from .layers import LayerProgram
from .program import Map, Place, Segment


class UNetProgram(LayerProgram):
    """Program of a forward pass of a `UNet`.

    Args:
        unet: The network. Weights are copied.
        shape: (C, H, W).
        vector: Floats per register.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet, shape: tuple[int, int, int], vector: int) -> None:
        super().__init__(vector)
        blocks = [m for m in unet.modules() if isinstance(m, ResBlock)]
        self.time_column: dict[ResBlock, int] = {}
        self.time_row_length = 0
        for m in blocks:
            self.time_column[m] = self.time_row_length
            self.time_row_length += self.padded(m.conv1.out_channels) * (2 if m.scale_shift else 1)
        self.projection = self._project(blocks)
        self._time_row = self.allocate(self.time_row_length, "time_row")
        widest = 2 * max(self.padded(n) for n in unet.config.channels) + self.vector
        names = ("sums", "means", "deviations", "factors", "offsets", "totals")
        self._scratch = {name: self.allocate(widest, name) for name in names}
        state = self._state(unet, shape)
        y = self._emit_network(unet, self._emit_input(unet, shape, state))
        self._emit_output(unet, shape[0], state, y)
        self.finish()
        self.time_column = {}  # releases the network

    def _project(self, blocks: list[ResBlock]) -> tuple[Tensor, Tensor]:
        """(weight [time_row_length, time_dim], bias): from SiLU(embedding) to the time row, padded
        for the residual blocks.
        """
        weights, biases = [], []
        for m in blocks:
            projected, c = m.time_emb_proj.bias.detach(), m.conv1.out_channels
            if not m.scale_shift:  # the convolution's bias is added together with the row
                projected = projected + cast(Tensor, m.conv1.bias)
            each = [c, c] if m.scale_shift else [c]
            weights.append(self.pad(m.time_emb_proj.weight.detach(), each, 0))
            biases.append(self.pad(projected.detach(), each, 0))
        return torch.cat(weights), torch.cat(biases)

    # ---- state

    def _state(self, unet: UNet, shape: tuple[int, int, int]) -> dict[str, Place]:
        channels, height, width = shape
        elements, outputs = channels * height * width, unet.config.out_channels * height * width
        # the noise is generated four vectors at a time
        state = {
            name: self.allocate(elements + 4 * self.vector, name)
            for name in ("x", "eps", "variance", "z", "old")
        }
        state["out"] = self.allocate(outputs, "out")
        self.header = {
            **state,
            "elements": elements,
            "out_elements": outputs,
            "time_row": self._time_row,
            "time_row_length": self.time_row_length,
        }
        return state

    def _emit_input(self, unet: UNet, shape: tuple[int, int, int], state: dict[str, Place]) -> Map:
        channels, height, width = shape
        x = self.map(height, width, channels, bordered=True, channels=channels)
        where = dict(channels=channels, width=width, out=x.inside, out_y=x.row_stride)
        self.emit(
            "place",
            x=state["x"],
            elements=channels * height * width,
            center=int(unet.config.center_input),
            **where,
        )
        return x

    def _emit_output(self, unet: UNet, channels: int, state: dict[str, Place], y: Map) -> None:
        of_y, outputs = (
            dict(x=y.at, x_channels=y.channels, pixels=y.pixels),
            unet.config.out_channels,
        )
        self.emit("take", **of_y, first=0, channels=outputs, out=state["out"])
        self.emit("take", **of_y, first=0, channels=min(channels, outputs), out=state["eps"])
        if outputs == 2 * channels:
            self.emit("take", **of_y, first=channels, channels=channels, out=state["variance"])

    def _emit_network(self, unet: UNet, x: Map) -> Map:
        x = self.convolve(x, unet.conv_in)
        skips = [x]
        for level in cast("list[Level]", unet.down_blocks):
            for j in range(len(level.resnets)):
                x = self.block(level, j, [x], keep=True)
                skips.append(x)
            if level.downsamplers is not None:
                x = self.resampled(level.downsamplers[0], x, keep=True)
                skips.append(x)
        first, last = cast("list[ResBlock]", unet.mid_block.resnets)
        x = self.residual(first, [x], keep=True)
        for attention in unet.mid_block.attentions:
            x = self.attention(cast(Attention, attention), x)
        x = self.residual(last, [x])
        for level in cast("list[Level]", unet.up_blocks):
            for j in range(len(level.resnets)):
                x = self.block(level, j, [x, skips.pop()])
            if level.upsamplers is not None:
                x = self.resampled(level.upsamplers[0], x)
        h = self.norm([x], unet.conv_norm_out, silu=True)
        return self.convolve(h, unet.conv_out)

    # ---- blocks; keep: the first input is read again later

    def block(self, level: Level, j: int, sources: list[Map], keep: bool = False) -> Map:
        x = self.residual(cast(ResBlock, level.resnets[j]), sources, keep)
        return (
            self.attention(cast(Attention, level.attentions[j]), x)
            if hasattr(level, "attentions")
            else x
        )

    def resampled(self, layer: nn.Module, x: Map, keep: bool = False) -> Map:
        if isinstance(layer, ResBlock):
            return self.residual(layer, [x], keep)
        y = self.move(x, "up" if isinstance(layer, Upsample) else None, bordered=True)
        if not keep:
            self.free_map(x)
        return self.convolve(y, cast(nn.Conv2d, layer.conv))

    def residual(self, m: ResBlock, sources: list[Map], keep: bool = False) -> Map:
        """sources: one map, or two whose channels are concatenated."""
        x, time_row = sources[0], self._time_row + self.time_column[m]
        h = self.norm(sources, m.norm1, silu=True, bordered=m.resample is None)
        if m.resample is not None:
            x, dense, h = self.move(x, m.resample), h, self.move(h, m.resample, bordered=True)
            self.free_map(dense)
        dense = self.convolve(
            h, m.conv1, None if m.scale_shift else time_row, blocks=[s.real for s in sources]
        )
        h = self.norm([dense], m.norm2, silu=True, time_row=time_row if m.scale_shift else None)
        self.free_map(dense)
        shortcut = x if m.conv_shortcut is None else self.conv1x1(sources, m.conv_shortcut)
        out = self.convolve(h, m.conv2, residual=shortcut, scale=1 / m.scale)
        if shortcut is not sources[0]:
            self.free_map(shortcut)
        for source in sources[1:] if keep else sources:
            self.free_map(source)
        return out

    # ---- attention

    def attention(self, m: Attention, x: Map) -> Map:
        n = (
            self.norm([x], m.group_norm, silu=False, bordered=False)
            if m.group_norm is not None
            else x
        )
        mixed, (weight, bias) = self._folded(m, n) if m.heads == 1 else self._heads(m, n)
        out = self.linear(mixed, weight / m.scale, bias / m.scale, residual=x, scale=1 / m.scale)
        for done in {mixed, n, x}:
            self.free_map(done)
        return out

    def _folded(self, m: Attention, n: Map) -> tuple[Map, tuple[Tensor, Tensor]]:
        """One head: n is both keys and values (`kernels.attention.fold`). Returns the mixed map and
        the (weight, bias) of the output projection.
        """
        layers = (m.to_q, m.to_k, m.to_v, cast(nn.Linear, m.to_out[0]))
        (weight, bias), out = fold(
            *((layer.weight.detach(), layer.bias.detach()) for layer in layers)
        )
        q = self.linear(n, weight * n.real**-0.5, bias * n.real**-0.5)
        mixed = self._mix(q.at, n.at, n.at, q.channels, n.channels, 1, n.channels, n)
        self.free_map(q)
        return mixed, out

    def _heads(self, m: Attention, n: Map) -> tuple[Map, tuple[Tensor, Tensor]]:
        """Several heads, the channels of each padded to whole vectors. Returns as `_folded`."""
        d = n.real // m.heads
        each, inner = [d] * m.heads, self.padded(d)
        scaled = ((m.to_q, d**-0.5), (m.to_k, 1.0), (m.to_v, 1.0))
        weight = torch.cat(
            [self.pad(layer.weight.detach().double() * by, each, 0) for layer, by in scaled]
        )
        bias = torch.cat(
            [self.pad(layer.bias.detach().double() * by, each, 0) for layer, by in scaled]
        )
        qkv, columns = self.linear(n, weight, bias), m.heads * inner
        mixed = self._mix(
            qkv.at,
            qkv.at + columns,
            qkv.at + 2 * columns,
            qkv.channels,
            qkv.channels,
            m.heads,
            inner,
            n,
        )
        self.free_map(qkv)
        last = cast(nn.Linear, m.to_out[0])
        return mixed, (
            self.pad(last.weight.detach().double(), each, 1),
            last.bias.detach().double(),
        )

    def _mix(
        self,
        q: Place,
        k: Place,
        v: Place,
        q_stride: int,
        stride: int,
        heads: int,
        inner: int,
        x: Map,
    ) -> Map:
        """softmax(q k^T) v of each head over the pixels of x, q scaled: [pixel][head][inner]."""
        pixels, padded, block = x.pixels, self.padded(x.pixels), 2 * self.vector
        of_keys = -(-pixels // block) * inner * block
        keys, scores = self.allocate(heads * of_keys), self.allocate(heads * pixels * padded)
        self.emit(
            "transpose",
            x=k,
            stride=stride,
            heads=heads,
            head=inner,
            pixels=pixels,
            channels=inner,
            out=keys,
        )
        batch = dict(batch=heads, a_batch=inner, u_batch=of_keys, out_batch=pixels * padded)
        segment = Segment(q, inner, 0, q_stride)
        self.product(
            [segment], keys, scores, padded // self.vector, width=pixels, out_x=padded, **batch
        )
        self.emit("softmax", x=scores, rows=heads * pixels, stride=padded, count=pixels)
        out = self.map(x.height, x.width, heads * inner)
        batch = dict(
            batch=heads,
            a_batch=pixels * padded,
            u_batch=inner,
            out_batch=inner,
            u_block=block,
            u_row=stride,
        )
        segment = Segment(scores, pixels, 0, padded)
        self.product(
            [segment], v, out.at, inner // self.vector, width=pixels, out_x=out.channels, **batch
        )
        self.free(keys, heads * of_keys)
        self.free(scores, heads * pixels * padded)
        return out
