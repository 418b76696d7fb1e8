"""Executor of a program for a batch: one image per core; all cores share the remaining images."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...diffusion.solvers import StepTable
from ...kernels.ddpm_step import noise_rows
from ...models.time_table import TimeTable
from ...models.unet import UNet
from ..base import SamplingState
from .codegen import vector_width
from .lowering import UNetProgram
from .runtime import ITEM, JOB, compile_kernels

COLUMN = {name: k for k, name in enumerate(ITEM)}


class ProgramExecutor:
    """Executor of a `UNetProgram` by machine code. Images are bit-equal on one kind of CPU."""

    def __init__(
        self, unet: UNet, shape: tuple[int, int, int], timesteps: int, threads: int
    ) -> None:
        self.threads, self.out_channels = threads, unet.config.out_channels
        self._work, self._engine, self.from_cache = compile_kernels()
        self.program = UNetProgram(unet, shape, vector_width())
        self.times = TimeTable(unet, *self.program.projection, timesteps)
        # one per thread, and one for shared images, which may start before the others are finished
        self._memory = [_aligned_zeros(self.program.size) for _ in range(threads + (threads > 1))]
        self._programs = [self.program.rows(m) for m in self._memory]
        self._job = np.zeros(JOB.index("claims") + threads, dtype=np.int64)
        self._job[JOB.index("yield_to_others")] = _yield_address()
        self._start_threads()
        reference = weakref.ref(self)

        def restart_threads() -> None:
            executor = reference()
            if executor is not None:
                executor._start_threads()

        if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
            os.register_at_fork(after_in_child=restart_threads)
        self.reason = (
            f"machine code for this CPU, {vector_width()} floats per vector, on {threads} threads"
        )

    @property
    def memory(self) -> int:
        """Bytes of weights, time table and the threads' feature maps."""
        return self.program.weight_bytes + self.times.nbytes + sum(m.nbytes for m in self._memory)

    def _start_threads(self) -> None:
        # Threads wait for parts that others have claimed. So a thread that Ctrl-C does not reach
        # starts all of them, batch after batch.
        self._lead, self._helpers = (
            ThreadPoolExecutor(max(1, n), "ddpm-fast") for n in (1, self.threads - 1)
        )
        for pool in (self._lead, self._helpers):
            weakref.finalize(self, pool.shutdown, wait=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        x = x.float().contiguous(memory_format=torch.channels_last)
        out = torch.empty(
            (len(x), self.out_channels, *x.shape[2:]),
            dtype=torch.float32,
            device="cpu",
            memory_format=torch.channels_last,
        )
        items = _items(len(x))
        rows = self.times.rows(t, labels)
        _set_addresses(items, x=x, out=out)
        items[:, COLUMN["time_row"]] = rows.addresses
        self._run(items, x, out, rows)
        return out

    def steps(self, state: SamplingState, table: StepTable) -> Generator[int, None, None]:
        """See `Engine.steps`; yields after every step."""
        t, coef = table.padded(len(table) + 1)
        x = state.x.contiguous(memory_format=torch.channels_last)
        old = None if state.x_0 is None else state.x_0.contiguous(memory_format=torch.channels_last)
        items = _items(len(x))
        _set_addresses(items, x=x, **({} if old is None else {"old": old}))
        if state.z is not None:
            _set_addresses(items, z=state.z)
        for name, values in (("seed", state.seed), ("image", state.image)):
            items[:, COLUMN[name]] = values.numpy()
        items[:, COLUMN["learned"]] = table.learned
        for i in range(len(table)):
            at = state.step_index.long()
            rows = self.times.rows(t[at], state.labels)
            items[:, COLUMN["time_row"]] = rows.addresses
            items[:, COLUMN["coef"]] = coef.data_ptr() + at.numpy() * coef.stride(0) * 4
            items[:, COLUMN["noise_row"]] = noise_rows(coef, at).numpy()
            self._run(items, x, old, state.z, rows, coef)
            state.step_index.add_(1).clamp_(max=len(table))
            if x is not state.x:
                state.x.copy_(x)
            if old is not None and old is not state.x_0:
                state.x_0.copy_(old)  # type: ignore[union-attr]
            yield i + 1

    def _run(self, items: NDArray[np.int64], *used: Any) -> None:
        """Runs all items. `used`: the tensors that items point into, kept alive until all items are
        done, even if the caller is interrupted.
        """
        lead = self._lead.submit(self._run_threads, items, used)
        try:
            lead.result()
        finally:
            wait([lead])

    def _run_threads(self, items: NDArray[np.int64], used: Any) -> None:
        """Runs full rounds of one image per thread. All threads share the rest, unless it is nearly
        a round.
        """
        count, left = len(items), len(items) % self.threads
        alone = count - left if left <= self.threads * 3 // 4 else count
        threads = min(self.threads, count if alone == count else self.threads)
        self._job[: JOB.index("yield_to_others")] = [0, alone, count, items.ctypes.data, 0]
        self._job[JOB.index("claims") :] = 0
        rest = [self._helpers.submit(self._run_thread, k, threads) for k in range(1, threads)]
        self._run_thread(0, threads)
        for part in rest:
            part.result()

    def _run_thread(self, thread: int, threads: int) -> None:
        alone, shared = self._programs[thread], self._programs[-1]
        addresses = (v.ctypes.data for v in (self._job, alone, shared))
        self._work(*addresses, len(alone), thread, threads)


def _items(count: int) -> NDArray[np.int64]:
    return np.zeros((count, len(ITEM)), dtype=np.int64)


def _set_addresses(items: NDArray[np.int64], **tensors: Tensor) -> None:
    """Sets the addresses of each item's image in dense tensors."""
    for name, tensor in tensors.items():
        items[:, COLUMN[name]] = tensor.data_ptr() + np.arange(len(items)) * tensor.stride(0) * 4


def _aligned_zeros(size: int) -> NDArray[np.uint8]:
    memory = np.zeros(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def _yield_address() -> int:
    """Address of a function without arguments that yields the core to other threads."""
    library = ctypes.CDLL("kernel32" if sys.platform == "win32" else None)
    function = library.SwitchToThread if sys.platform == "win32" else library.sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
