"""Fused engine for GPUs: network, noise, update and step counter in one CUDA graph.

The step reads t, coefficients, time embeddings and seeds from static device buffers, so one graph
serves all solvers, seeds and numbers of steps. On a CPU the step runs without a graph: by Triton's
interpreter, or by the fallbacks of its launches.
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
    """Tensors that a captured step reads and writes, for `capacity` images, at fixed addresses.

    Attributes:
        network: The network. Its plan's input is x.
        x, x_0: [B, C, H, W] fp32, the state, and the x_0 predicted in the previous step.
        step_index: [B] int32.
        seed, image: [B] int64.
        t_of, coef: The padded step table: [T + 1] int64, [T + 1, 11] fp32.
        z: [B, C, H, W] fp32, the noise of the next step, once a caller has given noise.
        graphs: (whether the variance is learned, whether the noise is given) -> captured steps, the
            longest first.
        reserved: The state that uses the buffers: views of the first images. The buffers are idle
            after its release, or when the state is garbage-collected.
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
    @torch.inference_mode(False)  # inference tensors could be written in inference mode only
    def of(cls, network: PlannedUNet, timesteps: int) -> StaticBuffers:
        plan, b, device = network.plan(), network.batch_size, network.device
        x = plan.maps[plan.x].pixels
        step_index = torch.zeros(b, dtype=torch.int32, device=device)
        seed, image = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2))
        t_of = torch.zeros(timesteps + 1, dtype=torch.int64, device=device)
        coef = torch.zeros(timesteps + 1, len(COLUMNS), dtype=torch.float32, device=device)
        return cls(network, x, torch.zeros_like(x), step_index, seed, image, t_of, coef)

    def reserve(self, batch_size: int, labelled: bool, given_noise: bool) -> SamplingState:
        """Returns a state of the first images. The others stay at the table's last row."""
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
        # weak, because the caller may keep the state longer than the engine keeps the network
        reference, self.reserved = weakref.ref(self), weakref.ref(state)
        reserved = self.reserved

        def release() -> None:
            buffers = reference()
            if buffers is not None and buffers.reserved is reserved:  # not by a later state
                buffers.reserved = None

        state.release = release
        return state

    def load(self, table: StepTable) -> None:
        """Copies a step table to the buffers."""
        for buffer, values in zip(
            (self.t_of, self.coef), table.padded(len(self.t_of)), strict=True
        ):
            buffer.copy_(values)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Context that restores the buffers that steps write."""
        written = (self.x, self.x_0, self.step_index)
        before = [v.clone() for v in written]
        try:
            yield
        finally:
            for buffer, values in zip(written, before, strict=True):
                buffer.copy_(values)

    def advance(self, by: int = 1) -> None:
        """Advances every image by `by` rows of the step table and updates the network's inputs."""
        i, classes = self.network.inputs, self.network.config.num_classes or 1
        advance(self.step_index, self.t_of, i.t, i.time_row, i.label, classes, by)

    def free(self) -> None:
        for graphs in self.graphs.values():
            for graph in graphs:
                graph.free()
        self.graphs.clear()

    def step(self, learned: bool, given_noise: bool) -> None:
        """Computes x_t -> x_{t-1} of every image at its row of the step table, and advances."""
        plan = self.network.plan()
        plan.run()
        out = mean_of(plan.maps[plan.out].pixels, self.x.shape[1], learned)
        index = (self.step_index, self.seed, self.image)
        z = self.z if given_noise else None
        ddpm_step(self.x, out, self.coef, *index, learned, self.x_0, z)
        self.advance()


class FusedEngine:
    """Engine of a `FusedUNet`: captures a step for a few batch sizes and each kind of variance.

    Args:
        unet: The network. Its weights are copied.
        shape: (C, H, W).
        precision: A key of `DTYPES`.
        device: Device of the state.
        timesteps: Length of the noise schedule.
        reason: Why this engine was chosen.
        graph: Callable that captures a step; default: `Graphed` on a GPU, no capture on a CPU.
        options: Options of `FusedUNet`.

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
        """See `Engine.new_state`; the state is in static buffers."""
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
                "not released: create a new one"
            )
        completed = 0
        buffers.load(table)
        graphs = self.graphs(buffers, table.learned, state.z is not None, every_step)
        buffers.advance(by=0)
        for graph in graphs:  # the longest first
            while len(table) - completed >= graph.repeats:
                graph()
                completed += graph.repeats
                yield completed

    def prepare(self, batch_size: int) -> None:
        """Allocates buffers for `batch_size` images, unless idle ones have a capacity from
        `batch_size` to less than twice that.
        """
        if any(batch_size <= b.capacity < 2 * batch_size and b.idle for b in self._buffers):
            return
        capacity = batch_size
        if self.graph is not None:  # captures few sizes, because capturing takes time
            capacity = (
                2 ** (batch_size - 1).bit_length() if batch_size < 16 else -(-batch_size // 8) * 8
            )
        self._drop([b for b in self._buffers if b.capacity <= capacity < 2 * b.capacity and b.idle])
        self._buffers.append(StaticBuffers.of(self.network(capacity), self.timesteps))

    def network(self, batch_size: int) -> PlannedUNet:
        """Returns the network for a batch size; packed weights are shared."""
        return (
            self._buffers[0].network.resized(batch_size)
            if self._buffers
            else self._make(batch_size)
        )

    def _free_buffers(self, batch_size: int) -> StaticBuffers:
        """The smallest idle buffers that fit the batch. Others may be in use by other batches."""
        fits = lambda b: batch_size <= b.capacity and b.idle
        if not any(map(fits, self._buffers)):
            self.prepare(batch_size)
        return min(filter(fits, self._buffers), key=lambda b: b.capacity)

    def graphs(
        self, buffers: StaticBuffers, learned: bool, given_noise: bool, every_step: bool
    ) -> list[Any]:
        """Returns the captured step, preceded by a graph of several steps if that is faster and the
        caller does nothing between steps.
        """
        key = (learned, given_noise)
        step = lambda: buffers.step(*key)
        if self.graph is None:
            return [_Uncaptured(step)]
        if key not in buffers.graphs:
            pool = torch.cuda.graph_pool_handle() if buffers.x.is_cuda else None
            with buffers.preserved():  # capturing runs the step
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
        """Releases the memory of idle buffers; it is reallocated on demand."""
        self._drop([b for b in self._buffers if b.idle])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _drop(self, unused: list[StaticBuffers]) -> None:
        for buffers in unused:
            buffers.free()
            self._buffers.remove(buffers)


@dataclass
class _Uncaptured:
    """Step with the interface of a graph."""

    step: Callable[[], None]
    repeats: int = 1

    def __call__(self) -> None:
        self.step()

    def free(self) -> None:
        pass


def _is_faster(several: Any, single: Any, device: torch.device, rounds: int = 5) -> bool:
    """Whether several steps per graph take less than 98 % of the time: best of `rounds` after a
    warm-up.
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
