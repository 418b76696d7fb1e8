"""Packed weights of a `UNet`: every layer as an operation with its tiles."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels._gemm import Target, Tiles, choose_tiles
from ...kernels.time_embedding import TimeEmbeddingProjection
from ...models.time_table import time_table
from ...models.unet import ResBlock, UNet
from .calibration import e4m3_convolutions

E4M3 = torch.float8_e4m3fn
DEVIATIONS = 8.0  # range of an e4m3 activation around its mean, without a calibration
AnyOp = TypeVar("AnyOp")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a forward pass in addition to x_t.

    Attributes:
        t, label: [B] int64.
        time_row: [B] int64, the rows of `table` for (t, label).
        table: [R, S] fp32, written once; or [B, S], written by `time_rows` in every forward pass.
        time_rows: The operation that writes `table`, or None.
    """

    t: Tensor
    label: Tensor
    time_row: Tensor
    table: Tensor
    time_rows: TimeEmbeddingProjection | None


class PackedUNet:
    """Layers of a `UNet` as operations, packed at their first use.

    Args:
        unet: The network. Weights are copied.
        device: Device of the packed weights.
        activations, operands: Dtypes of activations, and of the operands of 3x3 convolutions.
        target: GPU that tiles are chosen for.
        timesteps: t runs from 0 to timesteps - 1.
        tiles: Overrides of the tiles of single launches, by `tile_key`.
        units: 3x3 convolution -> the value of a stored 1 of its e4m3 input; default: from the norm.
        keep_bf16: 3x3 convolutions whose operands have the dtype of activations.
        bounded: See `Conv3x3`.
        count_saturated: Count values that are clamped or NaN.

    Attributes:
        e4m3_convolutions: Names of the convolutions that take e4m3.
        saturated: [e4m3_convolutions] int64, the counts.
    """

    def __init__(
        self,
        unet: UNet,
        device: torch.device,
        activations: torch.dtype,
        operands: torch.dtype,
        target: Target,
        timesteps: int,
        tiles: Mapping[str, Mapping[str, Any]],
        *,
        units: Mapping[str, float],
        keep_bf16: Collection[str],
        bounded: bool,
        count_saturated: bool,
    ) -> None:
        self.config, self.device, self.target, self.tiles = unet.config, device, target, tiles
        self.activations, self.operands = activations, operands
        # weights are packed in this type
        self.weight_dtype = torch.float64 if unet.dtype == torch.float64 else torch.float32
        self.units, self.bounded, self.count_saturated = units, bounded, count_saturated
        candidates = list(e4m3_convolutions(unet)) if operands == E4M3 else []
        self.e4m3_convolutions = [name for name in candidates if name not in keep_bf16]
        self.saturated = torch.zeros(len(self.e4m3_convolutions), dtype=torch.int64, device=device)
        self._operations: dict[str, Any] = {}
        self.keep_structure(unet)
        blocks = [m for m in unet.modules() if isinstance(m, ResBlock)]
        widths = [b.time_emb_proj.out_features for b in blocks]
        self.time_columns = dict(zip((self.names[b] for b in blocks), _starts(widths), strict=True))
        self.time_row_width = sum(widths)
        self._pack_time(blocks, timesteps)

    def keep_structure(self, unet: UNet) -> None:
        """Sets the network that the structure is read from."""
        self.unet = unet
        self.names = {module: name for name, module in unet.named_modules()}

    def weight(self, p: Tensor | None) -> Tensor:
        """Copy of a parameter in the dtype that packing computes in."""
        assert p is not None
        return p.detach().to(self.device, self.weight_dtype, copy=True)

    def cached(self, name: str, make: Callable[[], AnyOp]) -> AnyOp:
        """Returns the operation `name`, which the first call makes."""
        if name not in self._operations:
            self._operations[name] = make()
        return self._operations[name]

    # ---- time

    @torch.no_grad()
    def _pack_time(self, blocks: list[ResBlock], timesteps: int) -> None:
        """Packs the table of time embeddings that residual blocks add, or, if it is too large, the
        operation that computes its rows in every step.
        """
        c = self.config
        on_host = "meta" if self.device.type == "meta" else self.unet.conv_in.weight.device
        embedded = self.unet.embed(torch.arange(timesteps, device=on_host), None)
        classes = (
            self.weight(self.unet.class_embedding.weight)
            if c.num_classes
            else embedded.new_zeros(1, c.time_dim).to(self.device)
        )
        time = self.weight(embedded)
        weight = torch.cat([self.weight(b.time_emb_proj.weight) for b in blocks])
        # without scale-shift, the bias of the first convolution is added together with the row
        with_conv = lambda b: 0 if b.scale_shift else self.weight(b.conv1.bias)
        bias = torch.cat([self.weight(b.time_emb_proj.bias) + with_conv(b) for b in blocks])
        self.time_rows: TimeEmbeddingProjection | None = None
        self.table = time_table(time, classes, weight, bias)
        if self.table is not None:
            return
        pad = (0, -c.time_dim % 64)  # to whole K steps of the product
        tiles = self.cut("time_embedding", 64, self.time_row_width, 64, 1, 1, tma=False)
        time, classes = (F.pad(v, pad).float().contiguous() for v in (time, classes))
        self.time_rows = TimeEmbeddingProjection(
            time, classes, F.pad(weight, pad).to(self.activations).contiguous(), bias.float(), tiles
        )

    def inputs(self, batch: int) -> Inputs:
        """Allocates the inputs of a batch."""
        t, label, time_row = (
            torch.zeros(batch, dtype=torch.int64, device=self.device) for _ in range(3)
        )
        if self.table is not None:
            return Inputs(t, label, time_row, self.table, None)
        table = torch.zeros(batch, self.time_row_width, device=self.device)
        return Inputs(t, label, torch.arange(batch, device=self.device), table, self.time_rows)

    # ---- tiles

    def cut(
        self,
        kind: str,
        c: int,
        k: int,
        rows: int,
        h: int,
        w: int,
        *,
        tma: bool,
        dtype: torch.dtype | None = None,
        warps: int = 8,
        shrinks: float = 0,
    ) -> Tiles:
        """Tiles of a launch: the override for its key, or by rule."""
        dtype = dtype or self.activations
        by_rule = choose_tiles(
            self.target, dtype, c, k, rows, tma=tma, warps=warps, small_rounds=shrinks
        )
        return replace(
            by_rule, **self.tiles.get(tile_key(kind, self.target, dtype, c, k, h, w), {})
        )


def tile_key(kind: str, target: Target, dtype: torch.dtype, c: int, k: int, h: int, w: int) -> str:
    """Key of a launch in `tiles`: operation, architecture, operands, channels, input size."""
    return f"{kind} sm{target.sm} {str(dtype).removeprefix('torch.')} {c}->{k} {h}x{w}"


KINDS = ("conv3x3", "conv_upsample", "conv_downsample", "conv1x1", "conv_in", "time_embedding")


def check_tiles(tiles: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError if a key does not have the form of `tile_key` or a field is not of `Tiles`.
    Keys for other GPUs are allowed.
    """
    known = [f.name for f in fields(Tiles)]
    for key, changes in tiles.items():
        if not re.fullmatch(rf"({'|'.join(KINDS)}) sm\d+ \w+ \d+->\d+ \d+x\d+", key):
            raise ValueError(
                f"tiles for {key!r}; expected a key such as 'conv3x3 sm90 bfloat16 128->128 32x32'"
            )
        if unknown := set(changes) - set(known):
            raise ValueError(
                f"tiles for {key!r} set {', '.join(sorted(unknown))}; "
                f"expected some of {', '.join(known)}"
            )


def _starts(widths: list[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]
