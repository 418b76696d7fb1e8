"""A `UNet` packed for our kernels: every layer as an operation, and the tiles of each. `fused_walk` lists its launches."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels._gemm import Target, Tiles, cut
from ...kernels.time_embedding import TimeEmbeddingProjection
from ...models.unet import ResBlock, UNet
from .calibration import e4m3_convolutions

LARGEST_TABLE = 256 * 2**20  # bytes that the table of time embeddings may take
E4M3 = torch.float8_e4m3fn
DEVIATIONS = 8.0  # from the mean, that an e4m3 activation holds without saturating, where no calibration says what comes
AnyOp = TypeVar("AnyOp")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a forward pass reads besides x_t, all [B] integer: t, label, and row, the row of `table` that they name.

    table   [R, S] fp32, written once; or rows_of, which writes the [B, S] rows of this step
    """

    t: Tensor
    label: Tensor
    row: Tensor
    table: Tensor
    rows_of: TimeEmbeddingProjection | None


class Network:
    """Every layer as an operation, packed when it is first asked for.

    act, operand   types of activations, and of what 3x3 convolutions multiply
    tiles          overrides of single launches' tiles, by `tile_key`
    units          3x3 convolution -> what a 1 of its e4m3 input is worth; those that are not named follow the rule
    wide           3x3 convolutions that multiply in `act`, whatever `operand` is
    bounded        see `Conv3x3`
    saturated      [convolutions that take e4m3] int64: values of their inputs that were clamped or NaN, where `counting`
    """

    def __init__(
        self,
        unet: UNet,
        device: torch.device,
        act: torch.dtype,
        operand: torch.dtype,
        target: Target,
        timesteps: int,
        tiles: Mapping[str, Mapping[str, Any]],
        units: Mapping[str, float],
        wide: Collection[str],
        bounded: bool,
        counting: bool,
    ) -> None:
        self.config, self.wide = unet.config, torch.float64 if unet.dtype == torch.float64 else torch.float32
        self.device, self.act, self.operand, self.target, self.tiles = device, act, operand, target, tiles
        self.units, self.bounded, self.counting = units, bounded, counting
        may = list(e4m3_convolutions(unet)) if operand == E4M3 else []
        self.narrow = [name for name in may if name not in wide]
        self.saturated = torch.zeros(len(self.narrow), dtype=torch.int64, device=device)
        self._ops: dict[str, Any] = {}
        self.keep_structure(unet)
        blocks = [m for m in unet.modules() if isinstance(m, ResBlock)]
        widths = [b.time_emb_proj.out_features for b in blocks]
        self.columns = dict(zip((self.names[b] for b in blocks), _starts(widths), strict=True))  # in a row of the table
        self.row_width = sum(widths)
        self._pack_time(blocks, timesteps)

    def keep_structure(self, unet: UNet) -> None:
        """From now on the network is read from `unet`."""
        self.unet = unet
        self.names = {module: name for name, module in unet.named_modules()}

    def weight(self, p: Tensor | None) -> Tensor:
        assert p is not None
        return p.detach().to(self.device, self.wide, copy=True)  # the caller may go on training

    def once(self, name: str, make: Callable[[], AnyOp]) -> AnyOp:
        if name not in self._ops:
            self._ops[name] = make()
        return self._ops[name]

    # ---- time

    @torch.no_grad()
    def _pack_time(self, blocks: list[ResBlock], timesteps: int) -> None:
        """The table of everything that the residual blocks get to know of (t, class), or what makes its rows step by step."""
        c = self.config
        on_host = "meta" if self.device.type == "meta" else self.unet.conv_in.weight.device
        embedded = self.unet.embed(torch.arange(timesteps, device=on_host), None)
        classes = (
            self.weight(self.unet.class_embedding.weight) if c.num_classes else embedded.new_zeros(1, c.time_dim).to(self.device)
        )
        time = self.weight(embedded)
        weight = torch.cat([self.weight(b.time_emb_proj.weight) for b in blocks])
        # without scale-shift the row is added before the norm, and the first convolution's bias with it
        bias = torch.cat([self.weight(b.time_emb_proj.bias) + (0 if b.scale_shift else self.weight(b.conv1.bias)) for b in blocks])
        self.rows_of: TimeEmbeddingProjection | None = None
        if timesteps * len(classes) * self.row_width * 4 <= LARGEST_TABLE:
            both = F.silu(time[:, None] + classes).flatten(0, 1)
            self.table = F.linear(both, weight, bias).float()
            return
        pad = (0, -c.time_dim % 64)  # whole steps of the product
        tiles = self.cut("time_embedding", 64, self.row_width, 64, 1, 1, tma=False)
        time, classes = (F.pad(v, pad).float().contiguous() for v in (time, classes))
        self.rows_of = TimeEmbeddingProjection(time, classes, F.pad(weight, pad).to(self.act).contiguous(), bias.float(), tiles)

    def inputs(self, batch: int) -> Inputs:
        t, label, row = (torch.zeros(batch, dtype=torch.int64, device=self.device) for _ in range(3))
        if self.rows_of is None:
            return Inputs(t, label, row, self.table, None)
        rows = torch.zeros(batch, self.row_width, device=self.device)
        return Inputs(t, label, torch.arange(batch, device=self.device), rows, self.rows_of)

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
        shrinks: float = 0,
    ) -> Tiles:
        """The tiles of a launch by rule, or as `tiles` says for its key; the batch is no part of the key."""
        dtype = dtype or self.act
        warps = 4 if kind == "conv3x3" and dtype != E4M3 else 8
        by_rule = cut(self.target, dtype, c, k, rows, tma=tma, warps=warps, shrinks=shrinks)
        return replace(by_rule, **self.tiles.get(tile_key(kind, self.target, dtype, c, k, h, w), {}))


def tile_key(kind: str, target: Target, dtype: torch.dtype, c: int, k: int, h: int, w: int) -> str:
    """Which launch an override is for: operation, architecture, operands' type, channels in and out, size of its input."""
    return f"{kind} sm{target.sm} {str(dtype).removeprefix('torch.')} {c}->{k} {h}x{w}"


KINDS = ("conv3x3", "conv_upsample", "conv_downsample", "conv1x1", "conv_in", "time_embedding")


def check_tiles(tiles: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError for a key that no `tile_key` can be, or a field that `Tiles` has not. Keys for other GPUs may be there."""
    known = [f.name for f in fields(Tiles)]
    for key, changes in tiles.items():
        if not re.fullmatch(rf"({'|'.join(KINDS)}) sm\d+ \w+ \d+->\d+ \d+x\d+", key):
            raise ValueError(f"tiles for {key!r}; expected a key such as 'conv3x3 sm90 bfloat16 128->128 32x32'")
        if odd := set(changes) - set(known):
            raise ValueError(f"tiles for {key!r} set {', '.join(sorted(odd))}; expected some of {', '.join(known)}")


def _starts(widths: list[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]
