"""Plan of a network: a fixed list of launches over buffers in one arena.

A launch is an operation of `kernels` with the buffers that it reads and writes. It runs by its
Triton kernel, or by its fallback: the same function in plain PyTorch over the same buffers. With
fallbacks, everything except the kernels (packing, algebra, arena, wiring) is tested on any machine.
A kernel that fails its verification is replaced by its fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels._feature_map import FeatureMap
from ...kernels._launch import overlapped
from ...utils.numerics import full_fp32

ALIGNMENT = 1024  # bytes: whole TMA swizzles and cache lines


class Op(Protocol):
    """Operation of a launch; see `kernels`."""

    @property
    def name(self) -> str: ...
    @property
    def run(self) -> Any: ...
    @property
    def fallback(self) -> Any: ...
    @property
    def cost(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Buffer:
    """Feature map without memory. external: its memory is outside the arena and outlives a run."""

    name: str
    images: int
    height: int
    width: int
    channels: int
    dtype: torch.dtype
    bordered: bool = True
    external: bool = False

    @property
    def rows(self) -> int:
        return self.images * (self.height + self.bordered) * (self.width + self.bordered)

    @property
    def nbytes(self) -> int:
        return self.rows * self.channels * self.dtype.itemsize

    def on(self, memory: Tensor) -> FeatureMap:
        """Returns the map over `memory`, uint8 of at least nbytes."""
        rows = memory[: self.nbytes].view(self.dtype).view(self.rows, self.channels)
        return FeatureMap(rows, self.images, self.height, self.width, self.bordered)

    def empty(self, device: torch.device | str) -> FeatureMap:
        return FeatureMap.empty(
            self.images, self.height, self.width, self.channels, self.dtype, device, self.bordered
        )


@dataclass(frozen=True, eq=False)
class Launch:
    """Operation with its buffers.

    Attributes:
        reads, writes: Parameters of the operation -> buffers.
        tensors: Parameters of the operation -> tensors that are not part of the plan.
    """

    name: str
    op: Op
    reads: Mapping[str, Buffer]
    writes: Mapping[str, Buffer]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def out(self) -> Buffer:
        return self.writes["out"]

    @property
    def buffers(self) -> dict[str, Buffer]:
        return {**self.reads, **self.writes}

    def cost(self) -> tuple[int, int]:
        """(FLOP, bytes that must be moved)"""
        return self.op.cost(**{k: b.empty("meta") for k, b in self.buffers.items()})


@dataclass(frozen=True, eq=False)
class Arena:
    """Byte offsets that assign non-overlapping memory to buffers with overlapping lifetimes."""

    offsets: Mapping[Buffer, int]
    size: int

    @classmethod
    def of(cls, launches: list[Launch]) -> Arena:
        """Places buffers largest first, at the lowest offset that is free during their lifetime."""
        life = lifetimes(launches)
        placed: list[tuple[int, int, Buffer]] = []
        for b in sorted(life, key=lambda b: -b.nbytes):
            first, last = life[b]
            neighbours = sorted(
                (at, end)
                for at, end, other in placed
                if life[other][0] <= last and first <= life[other][1]
            )
            at = 0
            for begin, end in neighbours:
                if at + b.nbytes <= begin:
                    break
                at = max(at, end)
            placed.append((at, -(-(at + b.nbytes) // ALIGNMENT) * ALIGNMENT, b))
        return cls({b: at for at, _, b in placed}, max((end for _, end, _ in placed), default=0))


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Context without inference mode, gradients, autocast and TF32."""
    kind = "cpu" if device.type == "meta" else device.type
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(kind, enabled=False),
        full_fp32(),
    ):
        yield


def lifetimes(launches: list[Launch]) -> dict[Buffer, tuple[int, int]]:
    """Buffer -> indices (first, last) of the launches that use it, without external buffers."""
    life: dict[Buffer, tuple[int, int]] = {}
    for i, launch in enumerate(launches):
        for b in launch.buffers.values():
            if not b.external:
                life[b] = (life.get(b, (i, i))[0], i)
    return life


class Plan:
    """Launches bound to memory.

    Args:
        launches: The launches in order.
        device: Device of the memory.
        x, out: External buffers of the input and output.
        external: Memory of external buffers that is allocated already.

    Attributes:
        fallbacks: Names of the launches that run by their fallbacks.
        compute: Dtype that fallbacks compute in; None: the dtype of each buffer. fp32 on a CPU.
        overlap: Launches start while the previous ones finish.
    """

    def __init__(
        self,
        launches: list[Launch],
        device: torch.device,
        x: Buffer,
        out: Buffer,
        external: Mapping[Buffer, FeatureMap] | None = None,
    ) -> None:
        names = [launch.name for launch in launches]
        assert len(set(names)) == len(names)
        self.launches, self.device, self.x, self.out = launches, device, x, out
        self.compute = torch.float32 if device.type == "cpu" else None
        self.arena, self._external = Arena.of(launches), dict(external or {})
        self.fallbacks: set[str] = set()
        self.overlap = False

    @cached_property
    def memory(self) -> Tensor:
        """The arena, allocated at its first use, after a worker has verified the plan."""
        with exactly(self.device):
            return torch.empty(self.arena.size, dtype=torch.uint8, device=self.device)

    @cached_property
    def maps(self) -> dict[Buffer, FeatureMap]:
        """Memory of every buffer."""
        with exactly(self.device):
            maps = {
                b: b.on(self.memory[at:]) for b, at in self.arena.offsets.items()
            } | self._external
            for launch in self.launches:
                for b in launch.buffers.values():
                    if b.external and b not in maps:
                        maps[b] = b.empty(self.device)
                        maps[b].rows.zero_()
            return maps

    def arguments(self, launch: Launch) -> dict[str, Any]:
        return {k: self.maps[b] for k, b in launch.buffers.items()} | dict(launch.tensors)

    def run_one(self, launch: Launch) -> None:
        if launch.name in self.fallbacks:
            launch.op.fallback(**self.arguments(launch), compute=self.compute)
        else:
            with overlapped(self.overlap):
                launch.op.run(**self.arguments(launch))

    def run(self) -> None:
        with exactly(self.device) if self.fallbacks else nullcontext():
            for launch in self.launches:
                self.run_one(launch)

    def poison(self) -> None:
        """Fills the arena with NaN in all floating types."""
        self.memory.fill_(0xFF)

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.launches)

    def __len__(self) -> int:
        return len(self.launches)
