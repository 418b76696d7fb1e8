"""Lowering of a `UNet` to a program for one image.

Exact algebra, as in `fused.model`: the time embedding's projections are rows of a table, single-head attention is folded, and
3x3 convolutions of stride 1 take Winograd's F(2x2, 3x3) where the map is large enough to pay for its transforms.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import fold
from ...models.unet import Attention, Level, ResBlock, UNet, Upsample
from .program import Map, Place, Program, Segment

FEWEST_TILES = 16  # of 2x2 pixels, below which Winograd's larger weights cost more to read than its products save
TRANSFORMED = 4 * 2**20  # bytes that transformed tiles may take at once: they should stay in the cache
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


class UNetProgram(Program):
    """The program of a forward pass of a `UNet`.

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
        self._time_row = self.take(self.time_row_length, "time_row")
        widest = 2 * max(self.padded(n) for n in unet.config.channels) + self.vector
        names = ("sums", "means", "deviations", "factors", "offsets", "totals")
        self._scratch = {name: self.take(widest, name) for name in names}
        state = self._state(unet, shape)
        y = self._walk(unet, self._begin(unet, shape, state))
        self._end(unet, shape[0], state, y)
        self.finish()
        self.time_column = {}  # the network itself is no longer needed

    def _project(self, blocks: list[ResBlock]) -> tuple[Tensor, Tensor]:
        """(weight [time_row_length, time_dim], bias): from SiLU(embedding) to what the residual blocks add, padded as they read it."""
        weights, biases = [], []
        for m in blocks:
            projected, c = m.time_emb_proj.bias.detach(), m.conv1.out_channels
            if not m.scale_shift:
                projected = projected + cast(Tensor, m.conv1.bias)  # both are added at the same place
            each = [c, c] if m.scale_shift else [c]
            weights.append(self.pad(m.time_emb_proj.weight.detach(), each, 0))
            biases.append(self.pad(projected.detach(), each, 0))
        return torch.cat(weights), torch.cat(biases)

    # ---- from the state and back

    def _state(self, unet: UNet, shape: tuple[int, int, int]) -> dict[str, Place]:
        channels, height, width = shape
        elements, outputs = channels * height * width, unet.config.out_channels * height * width
        # the noise is made four vectors at a time
        state = {name: self.take(elements + 4 * self.vector, name) for name in ("x", "eps", "variance", "z", "old")}
        state["out"] = self.take(outputs, "out")
        self.header = {
            **state,
            "elements": elements,
            "out_elements": outputs,
            "time_row": self._time_row,
            "time_row_length": self.time_row_length,
        }
        return state

    def _begin(self, unet: UNet, shape: tuple[int, int, int], state: dict[str, Place]) -> Map:
        channels, height, width = shape
        x = self.map(height, width, channels, bordered=True, channels=channels)
        where = dict(channels=channels, width=width, out=x.inside, out_y=x.row)
        self.emit("place", x=state["x"], elements=channels * height * width, center=int(unet.config.center_input), **where)
        return x

    def _end(self, unet: UNet, channels: int, state: dict[str, Place], y: Map) -> None:
        of_y, every = dict(x=y.at, x_channels=y.channels, pixels=y.pixels), unet.config.out_channels
        self.emit("take", **of_y, first=0, channels=every, out=state["out"])
        self.emit("take", **of_y, first=0, channels=min(channels, every), out=state["eps"])
        if every == 2 * channels:
            self.emit("take", **of_y, first=channels, channels=channels, out=state["variance"])

    def _walk(self, unet: UNet, x: Map) -> Map:
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

    # ---- blocks; keep: the input is read again later

    def block(self, level: Level, j: int, sources: list[Map], keep: bool = False) -> Map:
        x = self.residual(cast(ResBlock, level.resnets[j]), sources, keep)
        return self.attention(cast(Attention, level.attentions[j]), x) if hasattr(level, "attentions") else x

    def resampled(self, layer: nn.Module, x: Map, keep: bool = False) -> Map:
        if isinstance(layer, ResBlock):
            return self.residual(layer, [x], keep)
        y = self.move(x, "up" if isinstance(layer, Upsample) else None, bordered=True)
        if not keep:
            self.give(x)
        return self.convolve(y, cast(nn.Conv2d, layer.conv))

    def residual(self, m: ResBlock, sources: list[Map], keep: bool = False) -> Map:
        """sources: one map, or two whose channels stand one behind the other."""
        x, time_row = sources[0], self._time_row + self.time_column[m]
        h = self.norm(sources, m.norm1, silu=True, bordered=m.resample is None)
        if m.resample is not None:
            x, dense, h = self.move(x, m.resample), h, self.move(h, m.resample, bordered=True)
            self.give(dense)
        dense = self.convolve(h, m.conv1, None if m.scale_shift else time_row, blocks=[s.real for s in sources])
        h = self.norm([dense], m.norm2, silu=True, time_row=time_row if m.scale_shift else None)
        self.give(dense)
        shortcut = x if m.conv_shortcut is None else self.pointwise(sources, m.conv_shortcut)
        out = self.convolve(h, m.conv2, residual=shortcut, scale=1 / m.scale)
        if shortcut is not sources[0]:
            self.give(shortcut)
        for source in sources[1:] if keep else sources:
            self.give(source)
        return out

    # ---- norms and moving pixels

    def norm(self, sources: list[Map], m: nn.GroupNorm, silu: bool, bordered: bool = True, time_row: Place | None = None) -> Map:
        """time_row: scale and shift after the norm."""
        s, a = self._scratch, sources[0]
        b = sources[1] if len(sources) > 1 else Map(a.at, a.height, a.width, 0, 0)
        real, channels, blocks = a.real + b.real, a.channels + b.channels, [n.real for n in sources]
        per_group = real // m.num_groups
        group = torch.full((channels,), m.num_groups)
        group[: a.real] = torch.arange(a.real) // per_group
        group[a.channels : a.channels + b.real] = torch.arange(a.real, real) // per_group
        two = dict(x=a.at, x_channels=a.channels, y=b.at, y_channels=b.channels)
        groups: dict[str, Any] = dict(channels=channels, group=self.keep(group), groups=m.num_groups, totals=s["totals"])
        groups |= dict(means=s["means"], count=1 / (a.pixels * per_group))
        self.emit("channel_sums", **two, pixels=a.pixels, means=0, sums=s["sums"])
        self.emit("group_means", sums=s["sums"], **groups)
        self.emit("channel_sums", **two, pixels=a.pixels, means=s["means"], sums=s["deviations"])
        affine = dict(gamma=self.vector_of(m.weight, blocks), beta=self.vector_of(m.bias, blocks), eps=float(m.eps))
        factors = dict(factors=s["factors"], offsets=s["offsets"])
        self.emit("norm_factors", sums=s["deviations"], time_row=0 if time_row is None else time_row, **groups, **affine, **factors)
        out = self.map(a.height, a.width, real, bordered, channels)
        where = dict(height=a.height, width=a.width, out=out.inside, out_y=out.row, out_x=channels)
        self.emit("normalise", **two, **factors, silu=int(silu), **where)
        return out

    def move(self, x: Map, resample: str | None, bordered: bool = False) -> Map:
        """x copied, "up" (each pixel as 2x2) or "down" (means of 2x2)."""
        repeat, divide = 1 + (resample == "up"), 1 + (resample == "down")
        height, width = x.height * repeat // divide, x.width * repeat // divide
        out = self.map(height, width, x.real, bordered, x.channels)
        where = dict(height=height, width=width, out=out.inside, out_y=out.row, out_x=out.channels)
        self.emit("resample", x=x.at, channels=x.channels, divide=divide, repeat=repeat, **where)
        return out

    # ---- convolutions

    def convolve(
        self,
        x: Map,
        m: nn.Conv2d,
        time_row: Place | None = None,
        residual: Map | None = None,
        scale: float = 1.0,
        blocks: list[int] | None = None,
    ) -> Map:
        """scale (conv(x) + residual), 3x3, of a bordered map, which is free afterwards.

        time_row: added instead of the bias, which it contains; blocks: the channels of x are concatenated from.
        """
        stride, blocks = m.stride[0], blocks or [x.real]
        weight = m.weight.detach().double() * scale  # [K, C, 3, 3]
        if x.channels != x.real:
            weight = self.pad(weight, blocks, 1)
        out = self.map(x.height // stride, x.width // stride, m.out_channels)
        behind: dict[str, Any] = dict(bias=self.vector_of(cast(Tensor, m.bias) * scale) if time_row is None else time_row)
        behind |= dict(residual=residual.at if residual else 0, residual_scale=float(scale))
        even = x.height % 2 == x.width % 2 == 0 and x.channels % self.vector == 0
        if stride == 1 and even and x.pixels >= 4 * FEWEST_TILES:
            self._winograd(x, weight, out, behind)
        else:
            self._direct(x, weight, out, behind, stride, 1 - int(m.padding[0]))
        self.give(x)
        return out

    def _direct(self, x: Map, weight: Tensor, out: Map, behind: dict[str, Any], stride: int, first: int) -> None:
        """Nine products summed in registers. first: 1 where the window begins inside the border, for want of padding."""
        starts = [x.at + (i + first) * x.row + (j + first) * x.channels for i in range(3) for j in range(3)]
        segments = [Segment(at, x.channels, stride * x.row, stride * x.channels) for at in starts]
        where = dict(height=out.height, width=out.width, out_y=out.row, out_x=out.channels)
        u = self.pack(weight.permute(0, 2, 3, 1).flatten(1))
        self.product(segments, u, out.at, out.channels // self.vector, **where, **behind)

    def _winograd(self, x: Map, weight: Tensor, out: Map, behind: dict[str, Any]) -> None:
        """2x2 outputs from 4x4 inputs by 16 products instead of 36 (Winograd 1980; Lavin & Gray 2016)."""
        transformed = torch.kron(_G, _G) @ weight.permute(2, 3, 0, 1).reshape(9, -1)  # [16, K C]
        u = self.pack(transformed.view(16, *weight.shape[:2]))
        tiles_x, tile_rows = x.width // 2, x.height // 2
        rows = max(1, min(tile_rows, TRANSFORMED // (64 * (x.channels + out.channels) * tiles_x)))
        sizes = [16 * rows * tiles_x * c for c in (x.channels, out.channels)]
        v, m = (self.take(size, "tiles") for size in sizes)
        for first in range(0, tile_rows, rows):
            tiles = min(rows, tile_rows - first) * tiles_x
            where = dict(tiles_x=tiles_x, first=first * tiles_x, tiles=tiles)
            self.emit("winograd_in", x=x.at, width=x.width + 2, channels=x.channels, v=v, **where)
            batch = dict(batch=16, a_batch=tiles * x.channels, u_batch=u[0].numel(), out_batch=tiles * out.channels)
            segment = Segment(v, x.channels, 0, x.channels)
            self.product([segment], u, m, out.channels // self.vector, width=tiles, out_x=out.channels, **batch)
            self.emit("winograd_out", m=m, channels=out.channels, out=out.at, width=out.width, **where, **behind)
        for place, size in zip((v, m), sizes, strict=True):
            self.give_back(place, size, "tiles")

    def pointwise(self, sources: list[Map], m: nn.Conv2d) -> Map:
        """A 1x1 convolution of the sources' channels, one behind the other."""
        out = self.map(sources[0].height, sources[0].width, m.out_channels)
        u = self.pack(self.pad(m.weight.detach().double().flatten(1), [s.real for s in sources], 1))
        segments = [Segment(s.at, s.channels, 0, s.channels) for s in sources]
        where = dict(width=out.pixels, out_x=out.channels, bias=self.vector_of(cast(Tensor, m.bias)))
        self.product(segments, u, out.at, out.channels // self.vector, **where)
        return out

    def linear(self, x: Map, weight: Tensor, bias: Tensor, residual: Map | None = None, scale: float = 1.0) -> Map:
        """weight x + bias + scale residual for every pixel."""
        out = self.map(x.height, x.width, len(weight))
        u = self.pack(F.pad(weight.double(), (0, x.channels - weight.shape[1])))
        behind = dict(bias=self.vector_of(bias), residual=residual.at if residual else 0, residual_scale=scale)
        segment = Segment(x.at, x.channels, 0, x.channels)
        self.product([segment], u, out.at, out.channels // self.vector, width=x.pixels, out_x=out.channels, **behind)
        return out

    # ---- attention

    def attention(self, m: Attention, x: Map) -> Map:
        n = self.norm([x], m.group_norm, silu=False, bordered=False) if m.group_norm is not None else x
        mixed, (weight, bias) = self._folded(m, n) if m.heads == 1 else self._heads(m, n)
        out = self.linear(mixed, weight / m.scale, bias / m.scale, residual=x, scale=1 / m.scale)
        for done in {mixed, n, x}:
            self.give(done)
        return out

    def _folded(self, m: Attention, n: Map) -> tuple[Map, tuple[Tensor, Tensor]]:
        """One head: keys and values are n itself (`kernels.attention.fold`). Returns what was mixed, and its projection."""
        layers = (m.to_q, m.to_k, m.to_v, cast(nn.Linear, m.to_out[0]))
        (weight, bias), out = fold(*((layer.weight.detach(), layer.bias.detach()) for layer in layers))
        q = self.linear(n, weight * n.real**-0.5, bias * n.real**-0.5)
        mixed = self._mix(q.at, n.at, n.at, q.channels, n.channels, 1, n.channels, n)
        self.give(q)
        return mixed, out

    def _heads(self, m: Attention, n: Map) -> tuple[Map, tuple[Tensor, Tensor]]:
        """Several heads, the channels of each padded on their own."""
        d = n.real // m.heads
        each, inner = [d] * m.heads, self.padded(d)
        scaled = ((m.to_q, d**-0.5), (m.to_k, 1.0), (m.to_v, 1.0))
        weight = torch.cat([self.pad(layer.weight.detach().double() * by, each, 0) for layer, by in scaled])
        bias = torch.cat([self.pad(layer.bias.detach().double() * by, each, 0) for layer, by in scaled])
        qkv, columns = self.linear(n, weight, bias), m.heads * inner
        mixed = self._mix(qkv.at, qkv.at + columns, qkv.at + 2 * columns, qkv.channels, qkv.channels, m.heads, inner, n)
        self.give(qkv)
        last = cast(nn.Linear, m.to_out[0])
        return mixed, (self.pad(last.weight.detach().double(), each, 1), last.bias.detach().double())

    def _mix(self, q: Place, k: Place, v: Place, q_stride: int, stride: int, heads: int, inner: int, x: Map) -> Map:
        """softmax(q k^T) v of each head over the pixels of x, q scaled already: [pixel][head][inner]."""
        pixels, padded, block = x.pixels, self.padded(x.pixels), 2 * self.vector
        of_keys = -(-pixels // block) * inner * block
        keys, scores = self.take(heads * of_keys), self.take(heads * pixels * padded)
        self.emit("transpose", x=k, stride=stride, heads=heads, head=inner, pixels=pixels, channels=inner, out=keys)
        batch = dict(batch=heads, a_batch=inner, u_batch=of_keys, out_batch=pixels * padded)
        segment = Segment(q, inner, 0, q_stride)
        self.product([segment], keys, scores, padded // self.vector, width=pixels, out_x=padded, **batch)
        self.emit("softmax", x=scores, rows=heads * pixels, stride=padded, count=pixels)
        out = self.map(x.height, x.width, heads * inner)
        batch = dict(batch=heads, a_batch=pixels * padded, u_batch=inner, out_batch=inner, u_block=block, u_row=stride)
        segment = Segment(scores, pixels, 0, padded)
        self.product([segment], v, out.at, inner // self.vector, width=pixels, out_x=out.channels, **batch)
        self.give_back(keys, heads * of_keys)
        self.give_back(scores, heads * pixels * padded)
        return out
