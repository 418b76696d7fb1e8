"""Fused engine for GPUs: network, noise, update and step counter as one CUDA graph over static
buffers.

t, coefficients, time embeddings and noise are looked up on the device, so one graph serves every
solver, seed and number of steps.
Elsewhere the same step runs uncaptured: by Triton's interpreter, or by the fallbacks of its
launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
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
            10] fp32.
        graphs: Whether the variance is learned -> captured steps, the longest first.
        busy: Whether a batch is using the buffers.
    """

    network: PlannedUNet
    x: Tensor
    x_0: Tensor
    step_index: Tensor
    seed: Tensor
    image: Tensor
    t_of: Tensor
    coef: Tensor
    graphs: dict[bool, list[Any]] = field(default_factory=dict)
    busy: bool = False

    @property
    def capacity(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, network: PlannedUNet, timesteps: int) -> StaticBuffers:
        plan, b, device = network.plan(), network.batch_size, network.device
        x = plan.maps[plan.x].pixels
        step_index = torch.zeros(b, dtype=torch.int32, device=device)
        seed, image = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2))
        t_of = torch.zeros(timesteps + 1, dtype=torch.int64, device=device)
        coef = torch.zeros(timesteps + 1, len(COLUMNS), device=device)
        return cls(network, x, torch.zeros_like(x), step_index, seed, image, t_of, coef)

    def load(self, state: SamplingState, table: StepTable) -> None:
        """Copies a batch and its table in. Places without an image stay at the table's last row."""
        n = len(state.x)
        for buffer, values in zip(
            (self.t_of, self.coef), table.padded(len(self.t_of)), strict=True
        ):
            buffer.copy_(values)
        self.x[n:], self.x_0[n:], self.step_index[n:] = 0, 0, len(self.t_of) - 1
        self.x[:n], self.step_index[:n], self.seed[:n], self.image[:n] = (
            state.x,
            state.step_index,
            state.seed,
            state.image,
        )
        self.x_0[:n] = 0 if state.x_0 is None else state.x_0
        label = self.network.inputs.label
        label[:n], label[n:] = 0 if state.labels is None else state.labels, 0
        self.advance(by=0)

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

    def show(self, state: SamplingState, with_x_0: bool) -> None:
        """Makes the state's tensors those that the graph writes."""
        n = len(state.x)
        state.x, state.step_index = self.x[:n], self.step_index[:n]
        state.x_0 = self.x_0[:n] if with_x_0 else None

    def free(self) -> None:
        for graphs in self.graphs.values():
            for graph in graphs:
                graph.free()
        self.graphs.clear()

    def step(self, learned: bool) -> None:
        """x_t -> x_{t-1} for every image at its own row of the step table; then the next row."""
        plan = self.network.plan()
        plan.run()
        out = mean_of(plan.maps[plan.out].pixels, self.x.shape[1], learned)
        ddpm_step(self.x, out, self.coef, self.step_index, self.seed, self.image, learned, self.x_0)
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
    def steps(
        self, state: SamplingState, table: StepTable, every_step: bool = True
    ) -> Generator[int, None, None]:
        """See `Engine.steps`. While it runs, the state's tensors are the static buffers."""
        buffers = self._free_buffers(len(state.x))
        buffers.busy, done = True, 0
        try:
            graphs = self.graphs(buffers, table.learned, every_step)
            buffers.load(state, table)
            buffers.show(state, table.multistep or state.x_0 is not None)
            for graph in graphs:  # the longest first
                while len(table) - done >= graph.repeats:
                    graph()
                    done += graph.repeats
                    yield done
            _detach(state)
        except GeneratorExit:  # a caller that stops early keeps the state after the last step
            _detach(state)
            raise
        finally:
            buffers.busy = False

    def prepare(self, batch_size: int) -> None:
        """Allocates buffers for `batch_size` images, unless free ones hold as many and less than
        twice as many.
        """
        if any(batch_size <= b.capacity < 2 * batch_size and not b.busy for b in self._buffers):
            return
        capacity = batch_size
        if self.graph is not None:  # capturing takes time, so few sizes are captured
            capacity = (
                2 ** (batch_size - 1).bit_length() if batch_size < 16 else -(-batch_size // 8) * 8
            )
        self._drop(
            [b for b in self._buffers if b.capacity <= capacity < 2 * b.capacity and not b.busy]
        )
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
        if not any(batch_size <= b.capacity and not b.busy for b in self._buffers):
            self.prepare(batch_size)
        return min(
            (b for b in self._buffers if batch_size <= b.capacity and not b.busy),
            key=lambda b: b.capacity,
        )

    def graphs(self, buffers: StaticBuffers, learned: bool, every_step: bool) -> list[Any]:
        """The captured step; before it several steps in one graph, if that is faster and not every
        step is observed.
        """
        step = lambda: buffers.step(learned)
        if self.graph is None:
            return [_Uncaptured(step)]
        if learned not in buffers.graphs:
            pool = torch.cuda.graph_pool_handle() if buffers.x.is_cuda else None
            captured = [self.graph(step, 1, pool)]
            if buffers.capacity <= STEPS_PER_GRAPH_MAX_BATCH:
                captured.insert(0, self.graph(step, STEPS_PER_GRAPH, pool))
                if buffers.x.is_cuda and not _is_faster(captured[0], captured[1], buffers.x.device):
                    captured.pop(0).free()
            buffers.graphs[learned] = captured
        return buffers.graphs[learned][-1:] if every_step else buffers.graphs[learned]

    def free(self) -> None:
        """Releases device memory; it is reallocated on demand. Busy buffers stay."""
        self._drop([b for b in self._buffers if not b.busy])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _drop(self, unused: list[StaticBuffers]) -> None:
        for buffers in unused:
            buffers.free()
            self._buffers.remove(buffers)


def _detach(state: SamplingState) -> None:
    """Copies the state out of the static buffers, which the next batch overwrites."""
    state.x, state.step_index = (
        state.x.clone(memory_format=torch.channels_last),
        state.step_index.clone(),
    )
    state.x_0 = None if state.x_0 is None else state.x_0.clone(memory_format=torch.channels_last)


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
