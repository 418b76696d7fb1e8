"""Layers of a network as instructions: norms, resampling and convolutions.

3x3 convolutions of stride 1 use Winograd's F(2x2, 3x3) if the map is large enough.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .program import Map, Place, Program, Segment

# tiles of 2x2 pixels; for fewer, reading Winograd's larger weights costs more than it saves
FEWEST_TILES = 16
TRANSFORMED = 4 * 2**20  # bytes of transformed tiles at once, so that they stay in the cache
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


class LayerProgram(Program):
    """Program under construction that is extended layer by layer."""

    _scratch: dict[str, Place]  # memory for the statistics of norms

    # ---- norms and resampling

    def norm(
        self,
        sources: list[Map],
        m: nn.GroupNorm,
        silu: bool,
        bordered: bool = True,
        time_row: Place | None = None,
    ) -> Map:
        """GroupNorm of the concatenated sources; time_row: scale and shift after the norm."""
        s, a = self._scratch, sources[0]
        b = sources[1] if len(sources) > 1 else Map(a.at, a.height, a.width, 0, 0)
        real, channels, blocks = a.real + b.real, a.channels + b.channels, [n.real for n in sources]
        per_group = real // m.num_groups
        group = torch.full((channels,), m.num_groups)
        group[: a.real] = torch.arange(a.real) // per_group
        group[a.channels : a.channels + b.real] = torch.arange(a.real, real) // per_group
        two = dict(x=a.at, x_channels=a.channels, y=b.at, y_channels=b.channels)
        groups: dict[str, Any] = dict(
            channels=channels, group=self.copied(group), groups=m.num_groups, totals=s["totals"]
        )
        groups |= dict(means=s["means"], count=1 / (a.pixels * per_group))
        self.emit("channel_sums", **two, pixels=a.pixels, means=0, sums=s["sums"])
        self.emit("group_means", sums=s["sums"], **groups)
        self.emit("channel_sums", **two, pixels=a.pixels, means=s["means"], sums=s["deviations"])
        affine = dict(
            gamma=self.vector_of(m.weight, blocks),
            beta=self.vector_of(m.bias, blocks),
            eps=float(m.eps),
        )
        factors = dict(factors=s["factors"], offsets=s["offsets"])
        self.emit(
            "norm_factors",
            sums=s["deviations"],
            time_row=0 if time_row is None else time_row,
            **groups,
            **affine,
            **factors,
        )
        out = self.map(a.height, a.width, real, bordered, channels)
        where = dict(
            height=a.height, width=a.width, out=out.inside, out_y=out.row_stride, out_x=channels
        )
        self.emit("normalise", **two, **factors, silu=int(silu), **where)
        return out

    def move(self, x: Map, resample: str | None, bordered: bool = False) -> Map:
        """Copies x, resampled "up" (each pixel as 2x2) or "down" (means of 2x2)."""
        repeat, divide = 1 + (resample == "up"), 1 + (resample == "down")
        height, width = x.height * repeat // divide, x.width * repeat // divide
        out = self.map(height, width, x.real, bordered, x.channels)
        where = dict(
            height=height, width=width, out=out.inside, out_y=out.row_stride, out_x=out.channels
        )
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
        """scale (conv(x) + residual), 3x3, of a bordered map, which is freed.

        time_row: added instead of the bias, which it contains; blocks: channels of the maps that x
        was concatenated from.
        """
        stride, blocks = m.stride[0], blocks or [x.real]
        weight = m.weight.detach().double() * scale  # [K, C, 3, 3]
        if x.channels != x.real:
            weight = self.pad(weight, blocks, 1)
        out = self.map(x.height // stride, x.width // stride, m.out_channels)
        epilogue: dict[str, Any] = dict(
            bias=self.vector_of(cast(Tensor, m.bias) * scale) if time_row is None else time_row
        )
        epilogue |= dict(residual=residual.at if residual else 0, residual_scale=float(scale))
        even = x.height % 2 == x.width % 2 == 0 and x.channels % self.vector == 0
        if stride == 1 and even and x.pixels >= 4 * FEWEST_TILES:
            self._winograd(x, weight, out, epilogue)
        else:
            self._direct(x, weight, out, epilogue, stride, 1 - int(m.padding[0]))
        self.free_map(x)
        return out

    def _direct(
        self, x: Map, weight: Tensor, out: Map, epilogue: dict[str, Any], stride: int, first: int
    ) -> None:
        """Nine products summed in registers. first: 1 if the convolution has no padding."""
        starts = [
            x.at + (i + first) * x.row_stride + (j + first) * x.channels
            for i in range(3)
            for j in range(3)
        ]
        segments = [
            Segment(at, x.channels, stride * x.row_stride, stride * x.channels) for at in starts
        ]
        where = dict(height=out.height, width=out.width, out_y=out.row_stride, out_x=out.channels)
        u = self.pack(weight.permute(0, 2, 3, 1).flatten(1))
        self.product(segments, u, out.at, out.channels // self.vector, **where, **epilogue)

    def _winograd(self, x: Map, weight: Tensor, out: Map, epilogue: dict[str, Any]) -> None:
        """2x2 outputs from 4x4 inputs by 16 products instead of 36 (Winograd 1980; Lavin & Gray
        2016).
        """
        transformed = torch.kron(_G, _G) @ weight.permute(2, 3, 0, 1).reshape(9, -1)  # [16, K C]
        u = self.pack(transformed.view(16, *weight.shape[:2]))
        tiles_x, tile_rows = x.width // 2, x.height // 2
        rows = max(1, min(tile_rows, TRANSFORMED // (64 * (x.channels + out.channels) * tiles_x)))
        sizes = [16 * rows * tiles_x * c for c in (x.channels, out.channels)]
        v, m = (self.allocate(size, "tiles") for size in sizes)
        for first in range(0, tile_rows, rows):
            tiles = min(rows, tile_rows - first) * tiles_x
            where = dict(tiles_x=tiles_x, first=first * tiles_x, tiles=tiles)
            self.emit("winograd_in", x=x.at, width=x.width + 2, channels=x.channels, v=v, **where)
            batch = dict(
                batch=16,
                a_batch=tiles * x.channels,
                u_batch=u[0].numel(),
                out_batch=tiles * out.channels,
            )
            segment = Segment(v, x.channels, 0, x.channels)
            self.product(
                [segment],
                u,
                m,
                out.channels // self.vector,
                width=tiles,
                out_x=out.channels,
                **batch,
            )
            self.emit(
                "winograd_out",
                m=m,
                channels=out.channels,
                out=out.at,
                width=out.width,
                **where,
                **epilogue,
            )
        for place, size in zip((v, m), sizes, strict=True):
            self.free(place, size, "tiles")

    def conv1x1(self, sources: list[Map], m: nn.Conv2d) -> Map:
        """1x1 convolution of the concatenated sources."""
        out = self.map(sources[0].height, sources[0].width, m.out_channels)
        u = self.pack(self.pad(m.weight.detach().double().flatten(1), [s.real for s in sources], 1))
        segments = [Segment(s.at, s.channels, 0, s.channels) for s in sources]
        where = dict(
            width=out.pixels, out_x=out.channels, bias=self.vector_of(cast(Tensor, m.bias))
        )
        self.product(segments, u, out.at, out.channels // self.vector, **where)
        return out

    def linear(
        self, x: Map, weight: Tensor, bias: Tensor, residual: Map | None = None, scale: float = 1.0
    ) -> Map:
        """weight x + bias + scale residual for every pixel."""
        out = self.map(x.height, x.width, len(weight))
        u = self.pack(F.pad(weight.double(), (0, x.channels - weight.shape[1])))
        epilogue = dict(
            bias=self.vector_of(bias), residual=residual.at if residual else 0, residual_scale=scale
        )
        segment = Segment(x.at, x.channels, 0, x.channels)
        self.product(
            [segment],
            u,
            out.at,
            out.channels // self.vector,
            width=x.pixels,
            out_x=out.channels,
            **epilogue,
        )
        return out
