"""The engine for a GPU: network, noise, update and step counter as one CUDA graph over static buffers.

t, coefficients, time embeddings and noise are looked up on the device, so one graph serves every solver, seed and number of steps.
Elsewhere the same step runs uncaptured: by Triton's interpreter, or by the fallbacks of its launches.
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
from ..select import State, mean_of
from .cuda_graph import Graphed
from .unet import FusedUNet

SEVERAL = 8  # steps a graph, where that pays
SEVERAL_UP_TO = 16  # images: beyond, a step takes so long that nobody notices its launch


@dataclass(eq=False)
class Slots:
    """Places for `batch` images: everything that a captured step reads and writes, at addresses that stay.

    x, x_0        [B, C, H, W] fp32: the state, which is the network's input as it stands, and the x_0 of the step before
    row [B] int32; seed, image, label [B] int64
    t_of, coef    the step table, one row more than the chain has steps: [T + 1] int64, [T + 1, 10] fp32
    """

    fused: FusedUNet
    x: Tensor
    x_0: Tensor
    row: Tensor
    seed: Tensor
    image: Tensor
    t_of: Tensor
    coef: Tensor
    graphs: dict[bool, list[Any]] = field(default_factory=dict)  # learned variance? -> what was captured
    busy: bool = False  # with a batch that is on its way

    @property
    def places(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, fused: FusedUNet, timesteps: int) -> Slots:
        plan, b, device = fused.plan(), fused.batch_size, fused.device
        x = plan.maps[plan.x].pixels
        row = torch.zeros(b, dtype=torch.int32, device=device)
        seed, image = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2))
        t_of = torch.zeros(timesteps + 1, dtype=torch.int64, device=device)
        coef = torch.zeros(timesteps + 1, len(COLUMNS), device=device)
        return cls(fused, x, torch.zeros_like(x), row, seed, image, t_of, coef)

    def load(self, state: State, table: StepTable) -> None:
        """Puts a batch and its table in place; places without an image rest in the table's last row."""
        n = len(state.x)
        for own, given in zip((self.t_of, self.coef), table.padded(len(self.t_of)), strict=True):
            own.copy_(given)
        self.x[n:], self.x_0[n:], self.row[n:] = 0, 0, len(self.t_of) - 1
        self.x[:n], self.row[:n], self.seed[:n], self.image[:n] = state.x, state.row, state.seed, state.image
        self.x_0[:n] = 0 if state.x_0 is None else state.x_0
        label = self.fused.inputs.label
        label[:n], label[n:] = 0 if state.labels is None else state.labels, 0
        self.advance(by=0)

    def advance(self, by: int = 1) -> None:
        i = self.fused.inputs
        advance(self.row, self.t_of, i.t, i.row, i.label, self.fused.config.num_classes or 1, by)

    def show(self, state: State, kept: bool) -> None:
        """While the batch is on its way, its state is what the graph writes."""
        n = len(state.x)
        state.x, state.row = self.x[:n], self.row[:n]
        state.x_0 = self.x_0[:n] if kept else None

    def free(self) -> None:
        for graphs in self.graphs.values():
            for graph in graphs:
                graph.free()
        self.graphs.clear()

    def step(self, learned: bool) -> None:
        """x_t -> x_{t-1} for every image at its own row, and on to the next."""
        plan = self.fused.plan()
        plan.run()
        out = mean_of(plan.maps[plan.out].pixels, self.x.shape[1], learned)
        ddpm_step(self.x, out, self.coef, self.row, self.seed, self.image, learned, self.x_0)
        self.advance()


class FusedEngine:
    """`FusedUNet` and the rest of the step, captured once for each number of images (a power of two) and kind of variance.

    ValueError for what the kernels cannot do; RuntimeError where the self-check cannot be made.
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
        """graph: captures a step, as `Graphed` does; default: that on a GPU, None elsewhere. options: of `FusedUNet`."""
        self.reason, self.timesteps = reason, timesteps
        self.graph = partial(Graphed, device=device) if graph is None and device.type == "cuda" else graph
        FusedUNet.check_config(unet.config, precision, device)
        self._make = lambda batch: FusedUNet(unet, batch, precision, device, shape[1:], timesteps, **options)
        self._slots: list[Slots] = []

    @property
    def invariant(self) -> bool:
        return all(slots.fused.invariant for slots in self._slots)

    @torch.no_grad()
    def steps(self, state: State, table: StepTable, watched: bool = True) -> Generator[int, None, None]:
        slots = self._free_slots(len(state.x))
        slots.busy, done = True, 0
        try:
            graphs = self.graphs(slots, table.learned, watched)
            slots.load(state, table)
            slots.show(state, table.multistep or state.x_0 is not None)
            for graph in graphs:  # the longest first
                while len(table) - done >= graph.repeats:
                    graph()
                    done += graph.repeats
                    yield done
            _own(state)
        except GeneratorExit:  # whoever stops half way keeps the state that far
            _own(state)
            raise
        finally:
            slots.busy = False

    def prepare(self, images: int) -> None:
        """Places for `images`, made where those at hand are too few, or more than twice too many: capturing takes its time."""
        if any(images <= s.places < 2 * images and not s.busy for s in self._slots):
            return
        batch = images
        if self.graph is not None:
            batch = 2 ** (images - 1).bit_length() if images < 16 else -(-images // 8) * 8
        self._drop([s for s in self._slots if s.places <= batch < 2 * s.places and not s.busy])
        self._slots.append(Slots.of(self.network(batch), self.timesteps))

    def network(self, batch: int) -> FusedUNet:
        """The network for so many images, with the packed weights of those that are there."""
        return self._slots[0].fused.resized(batch) if self._slots else self._make(batch)

    def _free_slots(self, images: int) -> Slots:
        """The smallest that will do. One that is busy is left alone: a caller may draw images while others are on their way."""
        if not any(images <= s.places and not s.busy for s in self._slots):
            self.prepare(images)
        return min((s for s in self._slots if images <= s.places and not s.busy), key=lambda s: s.places)

    def graphs(self, slots: Slots, learned: bool, watched: bool) -> list[Any]:
        """The captured step, before it several at once where that was found faster and nobody watches."""
        step = lambda: slots.step(learned)
        if self.graph is None:
            return [_Uncaptured(step)]
        if learned not in slots.graphs:
            pool = torch.cuda.graph_pool_handle() if slots.x.is_cuda else None
            captured = [self.graph(step, 1, pool)]
            if slots.places <= SEVERAL_UP_TO:
                captured.insert(0, self.graph(step, SEVERAL, pool))
                if slots.x.is_cuda and not _pays(captured[0], captured[1], slots.x.device):
                    captured.pop(0).free()
            slots.graphs[learned] = captured
        return slots.graphs[learned][-1:] if watched else slots.graphs[learned]

    def free(self) -> None:
        self._drop([s for s in self._slots if not s.busy])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _drop(self, unwanted: list[Slots]) -> None:
        for slots in unwanted:
            slots.free()
            self._slots.remove(slots)


def _own(state: State) -> None:
    """From now on the state is the caller's, and not what the next batch overwrites."""
    state.x, state.row = state.x.clone(memory_format=torch.channels_last), state.row.clone()
    state.x_0 = None if state.x_0 is None else state.x_0.clone(memory_format=torch.channels_last)


@dataclass
class _Uncaptured:
    """Stands where a graph would be."""

    step: Callable[[], None]
    repeats: int = 1

    def __call__(self) -> None:
        self.step()

    def free(self) -> None:
        pass


def _pays(several: Any, single: Any, device: torch.device, rounds: int = 5) -> bool:
    """Do several steps a graph take less than 98 % of the time? The best of some rounds, launches and all, after one of each."""
    best = [float("inf")] * 2
    for _ in range(rounds + 1):
        for i, graph in enumerate((several, single)):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(several.repeats // graph.repeats):
                graph()
            torch.cuda.synchronize(device)
            best[i] = min(best[i], time.perf_counter() - began)
    return best[0] < 0.98 * best[1]
