"""Program of the CPU engine: its instructions, their memory, and the weights in their layouts."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .instructions import INSTRUCTIONS
from .runtime import HEADER, WIDTH

NUMBERS = {name: k for k, name in enumerate(INSTRUCTIONS)}
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Place:
    """An address in a worker's memory, in bytes from its start."""

    offset: int

    def __add__(self, floats: int) -> Place:
        return Place(self.offset + 4 * floats)


@dataclass(frozen=True)
class Segment:
    """What a product sums over: `channels` floats at `at` + y stride_y + x stride_x, for every
    output pixel (y, x).
    """

    at: Place
    channels: int
    stride_y: int
    stride_x: int


@dataclass(frozen=True)
class Segments:
    """The number of a product's first segment in the program's table of them."""

    first: int


@dataclass(frozen=True)
class Map:
    """[height][width][channels] floats; channels padded to whole vectors, `real` of them real."""

    at: Place
    height: int
    width: int
    channels: int
    real: int
    bordered: bool = False

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def row_stride(self) -> int:
        """Numbers from a pixel to the one below it."""
        return (self.width + 2 * self.bordered) * self.channels

    @property
    def inside(self) -> Place:
        """Its first pixel that is no border."""
        return self.at + (self.row_stride + self.channels if self.bordered else 0)

    @property
    def kind(self) -> tuple[int, ...]:
        """Maps of one kind may take each other's memory: borders stay zero, since no instruction
        writes there.
        """
        floats = (self.height + 2 * self.bordered) * self.row_stride
        return (floats, self.height, self.width, self.channels) if self.bordered else (floats,)


Argument = int | float | Place | Segments | Tensor


class Program:
    """A program under construction: rows of integers for `runtime`. Weights are copied."""

    def __init__(self, vector: int) -> None:
        self.vector = vector
        self.size = 0  # bytes of a worker's memory
        self.header: dict[str, Argument] = {}
        self.instructions: list[list[Argument]] = []
        self.segments: list[Segment] = []
        self._weights: list[Tensor] = []  # what the instructions point to
        self._free: dict[tuple[object, ...], list[Place]] = defaultdict(list)

    # ---- memory

    def take(self, floats: int, *kind: object) -> Place:
        """Allocates memory; reuses what was given back under the same key."""
        key = (floats, *kind)
        if self._free[key]:
            return self._free[key].pop()
        place = Place(self.size)
        self.size += (-(-4 * floats // LINE) + 1) * LINE
        return place

    def give_back(self, place: Place, floats: int, *kind: object) -> None:
        key = (floats, *kind)
        self._free[key].append(place)

    def map(
        self, height: int, width: int, real: int, bordered: bool = False, channels: int = 0
    ) -> Map:
        """A new map; default for channels: `real` padded to whole vectors."""
        m = Map(Place(0), height, width, channels or self.padded(real), real, bordered)
        return Map(self.take(*m.kind), height, width, m.channels, real, bordered)

    def give(self, m: Map) -> None:
        self.give_back(m.at, *m.kind)

    # ---- weights

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self._weights)

    def padded(self, channels: int) -> int:
        return -(-channels // self.vector) * self.vector

    def pad(self, w: Tensor, blocks: Sequence[int], dim: int) -> Tensor:
        """w with the channels of each of `blocks` along `dim` padded with zeros on their own."""
        if all(real == self.padded(real) for real in blocks):
            return w
        padding = [0, 0] * (w.ndim - 1 - dim)
        parts = zip(w.split(list(blocks), dim), blocks, strict=True)
        return torch.cat(
            [F.pad(part, [*padding, 0, self.padded(real) - real]) for part, real in parts], dim
        )

    def keep(self, t: Tensor) -> Tensor:
        copied = torch.empty(t.shape, dtype=torch.float32 if t.is_floating_point() else t.dtype)
        copied.copy_(t)  # never the network's own memory
        self._weights.append(copied)
        return copied

    def vector_of(self, values: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
        """[C] -> [padded]"""
        return self.keep(self.pad(values.detach().double(), blocks or [len(values)], 0))

    def pack(self, weight: Tensor) -> Tensor:
        """[..., K, L] -> [..., block, L, 2 vectors]: a product's second operand."""
        block = 2 * self.vector
        weight = weight.float()
        if extra := -weight.shape[-2] % block:
            weight = F.pad(weight, (0, 0, 0, extra))
        return self.keep(weight.unflatten(-2, (-1, block)).transpose(-1, -2))

    # ---- instructions

    def emit(self, name: str, **arguments: Any) -> None:
        names = INSTRUCTIONS[name][1]
        if set(names) != set(arguments):
            raise ValueError(f"{name} was given {sorted(arguments)}; expected {sorted(names)}")
        self.instructions.append([NUMBERS[name], *(arguments[n] for n in names)])

    def product(
        self, segments: list[Segment], u: Tensor | Place, out: Place, vectors: int, **arguments: Any
    ) -> None:
        """`instructions.gemm`, its second operand packed and its output one row of pixels unless
        the arguments say otherwise.
        """
        table = Segments(len(self.segments))
        self.segments += segments
        block = 2 * self.vector
        whole: dict[str, Any] = dict(
            batch=1,
            a_batch=0,
            u_batch=0,
            u_block=sum(s.channels for s in segments) * block,
            u_row=block,
        )
        whole |= dict(bias=0, residual=0, residual_scale=1.0, out_batch=0, out_y=0, height=1)
        of_product = dict(
            segments=table, segment_count=len(segments), u=u, out=out, vectors=vectors
        )
        self.emit("gemm", **{**whole, **arguments, **of_product})

    # ---- finished

    def finish(self) -> None:
        """No instruction comes after this."""
        self._table_at = self.take(8 * len(self.segments))
        self.size += 4 * LINE  # the last vector may be stored whole

    def rows(self, memory: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The program for a worker whose memory, `size` bytes of zeros, this is; its table of
        segments is written there.
        """
        base = memory.ctypes.data
        table = [(base + s.at.offset, s.channels, s.stride_y, s.stride_x) for s in self.segments]
        flat = np.array(table, dtype=np.int64).reshape(-1)
        memory[self._table_at.offset :][: flat.nbytes] = flat.view(np.uint8)
        every = [[self.header[name] for name in HEADER], *self.instructions]
        program = np.zeros((len(every), WIDTH), dtype=np.int64)
        for line, values in zip(program, every, strict=True):
            line[: len(values)] = [self._integer(v, base) for v in values]
        return program

    def _integer(self, value: Argument, base: int) -> int:
        if isinstance(value, Place):
            return base + value.offset
        if isinstance(value, Segments):
            return base + self._table_at.offset + 32 * value.first
        if isinstance(value, Tensor):
            return value.data_ptr()
        if isinstance(value, float):
            return int(struct.unpack("<i", struct.pack("<f", value))[0])
        return value
