"""Program of the CPU engine: its instructions, their memory, and the packed weights."""

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
    """Address in a worker's memory: offset in bytes."""

    offset: int

    def __add__(self, floats: int) -> Place:
        return Place(self.offset + 4 * floats)


@dataclass(frozen=True)
class Segment:
    """Operand of a product: `channels` floats at `at` + y stride_y + x stride_x for each output
    pixel (y, x).
    """

    at: Place
    channels: int
    stride_y: int
    stride_x: int


@dataclass(frozen=True)
class Segments:
    """Index of a product's first segment in the program's table of segments."""

    first: int


@dataclass(frozen=True)
class Map:
    """Feature map: [height][width][channels] floats; `real` channels, padded to whole vectors."""

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
        """Floats from a pixel to the one below it."""
        return (self.width + 2 * self.bordered) * self.channels

    @property
    def inside(self) -> Place:
        """Address of the first pixel that is not a border."""
        return self.at + (self.row_stride + self.channels if self.bordered else 0)

    @property
    def kind(self) -> tuple[int, ...]:
        """Key of maps that can share memory: their borders, which no instruction writes, stay 0."""
        floats = (self.height + 2 * self.bordered) * self.row_stride
        return (floats, self.height, self.width, self.channels) if self.bordered else (floats,)


Argument = int | float | Place | Segments | Tensor


class Program:
    """Program under construction: rows of integers for `runtime`. Weights are copied."""

    def __init__(self, vector: int) -> None:
        self.vector = vector
        self.size = 0  # bytes of a worker's memory
        self.header: dict[str, Argument] = {}
        self.instructions: list[list[Argument]] = []
        self.segments: list[Segment] = []
        self._weights: list[Tensor] = []  # the instructions contain their addresses
        self._free: dict[tuple[object, ...], list[Place]] = defaultdict(list)

    # ---- memory

    def allocate(self, floats: int, *kind: object) -> Place:
        """Allocates memory; reuses memory that was freed under the same key."""
        key = (floats, *kind)
        if self._free[key]:
            return self._free[key].pop()
        place = Place(self.size)
        self.size += (-(-4 * floats // LINE) + 1) * LINE
        return place

    def free(self, place: Place, floats: int, *kind: object) -> None:
        key = (floats, *kind)
        self._free[key].append(place)

    def map(
        self, height: int, width: int, real: int, bordered: bool = False, channels: int = 0
    ) -> Map:
        """Allocates a map; default for channels: `real` padded to whole vectors."""
        m = Map(Place(0), height, width, channels or self.padded(real), real, bordered)
        return Map(self.allocate(*m.kind), height, width, m.channels, real, bordered)

    def free_map(self, m: Map) -> None:
        self.free(m.at, *m.kind)

    # ---- weights

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self._weights)

    def padded(self, channels: int) -> int:
        return -(-channels // self.vector) * self.vector

    def pad(self, w: Tensor, blocks: Sequence[int], dim: int) -> Tensor:
        """Pads w along `dim` with zeros: each of `blocks` to whole vectors."""
        if all(real == self.padded(real) for real in blocks):
            return w
        padding = [0, 0] * (w.ndim - 1 - dim)
        parts = zip(w.split(list(blocks), dim), blocks, strict=True)
        return torch.cat(
            [F.pad(part, [*padding, 0, self.padded(real) - real]) for part, real in parts], dim
        )

    def copied(self, t: Tensor) -> Tensor:
        copy = torch.empty(t.shape, dtype=torch.float32 if t.is_floating_point() else t.dtype)
        self._weights.append(copy.copy_(t))
        return copy

    def vector_of(self, values: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
        """[C] -> [padded]"""
        return self.copied(self.pad(values.detach().double(), blocks or [len(values)], 0))

    def pack(self, weight: Tensor) -> Tensor:
        """[..., K, L] -> [..., block, L, 2 vectors]: a product's second operand."""
        block = 2 * self.vector
        weight = weight.float()
        if extra := -weight.shape[-2] % block:
            weight = F.pad(weight, (0, 0, 0, extra))
        return self.copied(weight.unflatten(-2, (-1, block)).transpose(-1, -2))

    # ---- instructions

    def emit(self, name: str, **arguments: Any) -> None:
        names = INSTRUCTIONS[name][1]
        if set(names) != set(arguments):
            raise ValueError(f"{name} was given {sorted(arguments)}; expected {sorted(names)}")
        self.instructions.append([NUMBERS[name], *(arguments[n] for n in names)])

    def product(
        self, segments: list[Segment], u: Tensor | Place, out: Place, vectors: int, **arguments: Any
    ) -> None:
        """Emits `products.gemm`. By default u is packed and the output is one row of pixels."""
        table = Segments(len(self.segments))
        self.segments += segments
        block = 2 * self.vector
        values: dict[str, Any] = dict(batch=1, a_batch=0, u_batch=0, u_row=block, bias=0)
        values |= dict(residual=0, residual_scale=1.0, out_batch=0, out_y=0, height=1)
        values["u_block"] = sum(s.channels for s in segments) * block
        values |= arguments | dict(segments=table, segment_count=len(segments), u=u, out=out)
        self.emit("gemm", **values, vectors=vectors)

    # ---- rows of integers

    def finish(self) -> None:
        """Ends the program: no instruction can be emitted afterwards."""
        self._table_at = self.allocate(8 * len(self.segments))
        self.size += 4 * LINE  # the last store may write a whole vector

    def rows(self, memory: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Returns the program for a worker with this memory, `size` bytes of zeros, and writes the
        table of segments into it.
        """
        base = memory.ctypes.data
        table = [(base + s.at.offset, s.channels, s.stride_y, s.stride_x) for s in self.segments]
        flat = np.array(table, dtype=np.int64).reshape(-1)
        memory[self._table_at.offset :][: flat.nbytes] = flat.view(np.uint8)
        rows = [[self.header[name] for name in HEADER], *self.instructions]
        program = np.zeros((len(rows), WIDTH), dtype=np.int64)
        for line, values in zip(program, rows, strict=True):
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
