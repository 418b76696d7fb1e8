"""Fused engine for GPUs: network, noise, update and step counter as one CUDA graph over static
buffers.

t, coefficients, time embeddings and noise are looked up on the device, so one graph serves every
solver, seed and number of steps.
Elsewhere the same step runs uncaptured: by Triton's interpreter, or by the fallbacks of its
launches.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...diffusion.solvers import StepTable
from ...kernels.ddpm_step import COLUMNS, ddpm_step
from ...kernels.step_index import advance
from ...models.unet import UNet
from ..base import SamplingState, engine_repr, mean_of
from .cuda_graph import Graphed
from .model import PlannedUNet
from .unet import FusedUNet

STEPS_PER_GRAPH = 8  # of the second graph, for small batches
STEPS_PER_GRAPH_MAX_BATCH = 16  # images; in larger batches a step takes much longer than its launch


@dataclass(eq=False)
class StaticBuffers:
    """All that a captured step reads and writes, for `capacity` images, at fixed addresses.

    Attributes:
        network: The network. Its plan's input is x.
        x, x_0: [B, C, H, W] fp32, the state, and the prediction of x_0 in the step before.
        step_index: [B] int32.
        seed, image: [B] int64.
        t_of, coef: The step table, one row more than the chain has steps: [T + 1] int64, [T + 1,
            11] fp32.
        z: [B, C, H, W] fp32, the noise of the next step, once a caller has given noise.
        graphs: (whether the variance is learned, whether the noise is given) -> captured steps, the
            longest first.
        reserved: The state that uses the buffers, views of their first places. They are free when it
            is released, or when nothing refers to it any more.
    """

    network: PlannedUNet
    x: Tensor
    x_0: Tensor
    step_index: Tensor
    seed: Tensor
    image: Tensor
    t_of: Tensor
    coef: Tensor
    z: Tensor | None = None
    graphs: dict[tuple[bool, bool], list[Any]] = field(default_factory=dict)
    reserved: weakref.ref[SamplingState] | None = None

    @property
    def capacity(self) -> int:
        return len(self.x)

    @property
    def state(self) -> SamplingState | None:
        return None if self.reserved is None else self.reserved()

    @property
    def idle(self) -> bool:
        return self.state is None

    @classmethod
    @torch.inference_mode(False)  # or they could be written in inference mode only
    def of(cls, network: PlannedUNet, timesteps: int) -> StaticBuffers:
        plan, b, device = network.plan(), network.batch_size, network.device
        x = plan.maps[plan.x].pixels
        step_index = torch.zeros(b, dtype=torch.int32, device=device)
        seed, image = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2))
        t_of = torch.zeros(timesteps + 1, dtype=torch.int64, device=device)
        coef = torch.zeros(timesteps + 1, len(COLUMNS), dtype=torch.float32, device=device)
        return cls(network, x, torch.zeros_like(x), step_index, seed, image, t_of, coef)

    def reserve(self, batch_size: int, labelled: bool, given_noise: bool) -> SamplingState:
        """A state in the first places. The other places rest at the table's last row."""
        n, label = batch_size, self.network.inputs.label
        self.x[n:], self.step_index[n:] = 0, len(self.t_of) - 1
        self.x_0.zero_()
        label.zero_()
        if given_noise:
            with torch.inference_mode(False):
                self.z = torch.zeros_like(self.x) if self.z is None else self.z.zero_()
        x, step_index, seed, image = (
            v[:n] for v in (self.x, self.step_index, self.seed, self.image)
        )
        labels = label[:n] if labelled else None
        z = self.z[:n] if given_noise and self.z is not None else None
        state = SamplingState(x, step_index, seed, image, labels, self.x_0[:n], z)
        # references would keep the network's memory as long as the caller keeps the state
        buffers, self.reserved = weakref.ref(self), weakref.ref(state)
        reserved = self.reserved

        def release() -> None:
            used = buffers()
            if used is not None and used.reserved is reserved:  # not if another batch has them now
                used.reserved = None

        state.release = release
        return state

    def load(self, table: StepTable) -> None:
        """Copies a step table in."""
        for buffer, values in zip(
            (self.t_of, self.coef), table.padded(len(self.t_of)), strict=True
        ):
            buffer.copy_(values)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Context that restores what steps write."""
        written = (self.x, self.x_0, self.step_index)
        before = [v.clone() for v in written]
        try:
            yield
        finally:
            for buffer, values in zip(written, before, strict=True):
                buffer.copy_(values)

    def advance(self, by: int = 1) -> None:
        """Moves every image on by `by` rows of the step table, and looks up what the network reads
        there.
        """
        i = self.network.inputs
        advance(
            self.step_index,
            self.t_of,
            i.t,
            i.time_row,
            i.label,
            self.network.config.num_classes or 1,
            by,
        )

    def free(self) -> None:
        for graphs in self.graphs.values():
            for graph in graphs:
                graph.free()
        self.graphs.clear()

    def step(self, learned: bool, given_noise: bool) -> None:
        """x_t -> x_{t-1} for every image at its own row of the step table; then the next row."""
        plan = self.network.plan()
        plan.run()
        out = mean_of(plan.maps[plan.out].pixels, self.x.shape[1], learned)
        index = (self.step_index, self.seed, self.image)
        z = self.z if given_noise else None
        ddpm_step(self.x, out, self.coef, *index, learned, self.x_0, z)
        self.advance()


class FusedEngine:
    """`FusedUNet` and the rest of the step, captured once for each batch size (a power of two) and
    kind of variance.

    Args:
        unet: The network. Its weights are copied.
        shape: (C, H, W).
        precision: A key of `DTYPES`.
        device: Where the state lies.
        timesteps: Length of the noise schedule.
        reason: Why this engine was chosen.
        graph: Captures a step, as `Graphed` does; default: `Graphed` on a GPU, no capture
            elsewhere.
        options: Of `FusedUNet`.

    Raises:
        ValueError: The kernels do not support the network or the device.
        RuntimeError: The verification cannot run.
    """

    name = "fused"

    def __init__(
        self,
        unet: UNet,
        shape: tuple[int, int, int],
        precision: str,
        device: torch.device,
        timesteps: int,
        reason: str = "",
        graph: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        self.reason, self.timesteps = reason, timesteps
        self.graph = (
            partial(Graphed, device=device) if graph is None and device.type == "cuda" else graph
        )
        FusedUNet.check_config(unet.config, precision, device)
        self._make = lambda batch: FusedUNet(
            unet, batch, precision, device, shape[1:], timesteps, **options
        )
        self._buffers: list[StaticBuffers] = []

    def __repr__(self) -> str:
        return engine_repr(self, batch_sizes=[buffers.capacity for buffers in self._buffers])

    @property
    def invariant(self) -> bool:
        return all(buffers.network.invariant for buffers in self._buffers)

    @torch.no_grad()
    def new_state(
        self,
        batch_size: int,
        shape: tuple[int, int, int],
        device: torch.device,
        labelled: bool,
        given_noise: bool = False,
    ) -> SamplingState:
        """See `Engine.new_state`; a state in static buffers, of this engine's shape and device."""
        return self._free_buffers(batch_size).reserve(batch_size, labelled, given_noise)

    @torch.no_grad()
    def steps(
        self, state: SamplingState, table: StepTable, every_step: bool = True
    ) -> Generator[int, None, None]:
        """See `Engine.steps`.

        Raises:
            ValueError: The state is not from `new_state`, or it was released.
        """
        buffers = next((b for b in self._buffers if b.state is state), None)
        if buffers is None:
            raise ValueError(
                "state is not in the buffers of this engine; expected one from new_state that was "
                "not released: make a new one"
            )
        done = 0
        buffers.load(table)
        graphs = self.graphs(buffers, table.learned, state.z is not None, every_step)
        buffers.advance(by=0)
        for graph in graphs:  # the longest first
            while len(table) - done >= graph.repeats:
                graph()
                done += graph.repeats
                yield done

    def prepare(self, batch_size: int) -> None:
        """Allocates buffers for `batch_size` images, unless free ones hold as many and less than
        twice as many.
        """
        if any(batch_size <= b.capacity < 2 * batch_size and b.idle for b in self._buffers):
            return
        capacity = batch_size
        if self.graph is not None:  # capturing takes time, so few sizes are captured
            capacity = (
                2 ** (batch_size - 1).bit_length() if batch_size < 16 else -(-batch_size // 8) * 8
            )
        self._drop([b for b in self._buffers if b.capacity <= capacity < 2 * b.capacity and b.idle])
        self._buffers.append(StaticBuffers.of(self.network(capacity), self.timesteps))

    def network(self, batch_size: int) -> PlannedUNet:
        """The network for a batch size; the packed weights are shared."""
        return (
            self._buffers[0].network.resized(batch_size)
            if self._buffers
            else self._make(batch_size)
        )

    def _free_buffers(self, batch_size: int) -> StaticBuffers:
        """The smallest free buffers that suffice. Busy ones are left alone: several batches may be
        sampled in turns.
        """
        if not any(batch_size <= b.capacity and b.idle for b in self._buffers):
            self.prepare(batch_size)
        return min(
            (b for b in self._buffers if batch_size <= b.capacity and b.idle),
            key=lambda b: b.capacity,
        )

    def graphs(
        self, buffers: StaticBuffers, learned: bool, given_noise: bool, every_step: bool
    ) -> list[Any]:
        """The captured step; before it several steps in one graph, if that is faster and nothing
        happens between steps.
        """
        key = (learned, given_noise)
        step = lambda: buffers.step(*key)
        if self.graph is None:
            return [_Uncaptured(step)]
        if key not in buffers.graphs:
            pool = torch.cuda.graph_pool_handle() if buffers.x.is_cuda else None
            with buffers.preserved():  # a capture runs the step
                captured = [self.graph(step, 1, pool)]
                if buffers.capacity <= STEPS_PER_GRAPH_MAX_BATCH and not given_noise:
                    captured.insert(0, self.graph(step, STEPS_PER_GRAPH, pool))
                    if buffers.x.is_cuda and not _is_faster(
                        captured[0], captured[1], buffers.x.device
                    ):
                        captured.pop(0).free()
            buffers.graphs[key] = captured
        return buffers.graphs[key][-1:] if every_step else buffers.graphs[key]

    def free(self) -> None:
        """Releases device memory; it is reallocated on demand. Busy buffers stay."""
        self._drop([b for b in self._buffers if b.idle])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _drop(self, unused: list[StaticBuffers]) -> None:
        for buffers in unused:
            buffers.free()
            self._buffers.remove(buffers)


@dataclass
class _Uncaptured:
    """A step in place of a graph."""

    step: Callable[[], None]
    repeats: int = 1

    def __call__(self) -> None:
        self.step()

    def free(self) -> None:
        pass


def _is_faster(several: Any, single: Any, device: torch.device, rounds: int = 5) -> bool:
    """Whether several steps per graph take less than 98 % of the time. Compares the best of some
    rounds, after a warm-up.
    """
    best = [float("inf")] * 2
    for _ in range(rounds + 1):
        for i, graph in enumerate((several, single)):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(several.repeats // graph.repeats):
                graph()
            torch.cuda.synchronize(device)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] < 0.98 * best[1]
