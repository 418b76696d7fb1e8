"""CPU engine: the function of an fp32 `UNet` and a solver's steps, one image per core at a time.

It runs machine code that LLVM compiles on this machine (`runtime`) and needs llvmlite (`pip install
ddpm-fast[cpu]`). It is batch-invariant: no reduction depends on the number of images or of threads.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...diffusion.solvers import StepTable
from ...models.unet import UNet
from ...utils.validation import is_count
from ..base import SamplingState, engine_repr

if TYPE_CHECKING:
    from .executor import NativeExecutor

INSTALL = "llvmlite is missing; for twice the speed and the same bits in every batch: pip install ddpm-fast[cpu]"


class CPUEngine:
    """eps_theta(x_t, t) of a trained fp32 `UNet`, and whole steps with it, for images of one shape.

    Args:
        unet: The network. Its weights are copied: training may go on.
        shape: (C, H, W).
        timesteps: t runs from 0 to timesteps - 1.
        threads: Number of cores; default: as many as PyTorch uses.

    Raises:
        ValueError: The weights are not fp32 on the CPU, the network does not take the shape,
            llvmlite is missing, or LLVM does not support this machine.
    """

    name = "cpu"
    invariant = True  # an image's bits do not depend on its batch

    def __init__(
        self,
        unet: UNet,
        shape: tuple[int, int, int],
        timesteps: int,
        threads: int | None = None,
    ) -> None:
        self.config, self.shape, self.timesteps = unet.config, tuple(shape), timesteps
        threads = torch.get_num_threads() if threads is None else threads
        _check(unet, self.shape, timesteps, threads)
        self._executor = _executor(unet, shape, timesteps, threads)
        self.reason = self._executor.reason

    def __repr__(self) -> str:
        return engine_repr(self, shape=self.shape)

    @property
    def memory(self) -> int:
        """Bytes of packed weights, time table and the threads' feature maps; independent of the
        batch size.
        """
        return self._executor.memory

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Computes the network's output.

        Args:
            x_t: [B, C, H, W] floating.
            t: int, or integer [B].
            labels: Integer [B] if the network has classes.

        Returns:
            [B, C_out, H, W] fp32, channels-last.

        Raises:
            ValueError: A shape is wrong, or a t or label out of range.
        """
        if (
            x_t.ndim != 4
            or tuple(x_t.shape[1:]) != self.shape
            or not x_t.is_floating_point()
            or x_t.device.type != "cpu"
        ):
            shape = ", ".join(map(str, self.shape))
            raise ValueError(
                f"x_t is {x_t.dtype} {tuple(x_t.shape)} on {x_t.device}; expected floating [B, {shape}] on cpu"
            )
        t = torch.as_tensor(t, device="cpu")
        t = self._integers("t", t.expand(len(x_t)) if t.ndim == 0 else t, len(x_t), self.timesteps)
        labels = self._labels(labels, len(x_t))
        if not len(x_t):
            return x_t.new_empty(
                (0, self.config.out_channels, *self.shape[1:]), dtype=torch.float32
            )
        return self._executor.forward(x_t, t, labels)

    def prepare(self, batch_size: int) -> None:
        """Does nothing: memory is allocated for one image per thread."""

    def new_state(
        self,
        batch_size: int,
        shape: tuple[int, int, int],
        device: torch.device,
        labelled: bool,
        given_noise: bool = False,
    ) -> SamplingState:
        """See `Engine.new_state`; the memory is the state's."""
        return SamplingState.empty(batch_size, shape, device, labelled, given_noise)

    def free(self) -> None:
        """Does nothing: the memory is released with the engine."""

    def steps(
        self, state: SamplingState, table: StepTable, every_step: bool = True
    ) -> Generator[int, None, None]:
        """See `Engine.steps`; yields after every step.

        Raises:
            ValueError: The state has another shape, or the table does not fit the network. Raised
                before the first step.
        """
        c, out = self.shape[0], self.config.out_channels
        shape = ", ".join(map(str, self.shape))
        if (
            state.x.dtype != torch.float32
            or state.x.ndim != 4
            or tuple(state.x.shape[1:]) != self.shape
        ):
            raise ValueError(
                f"the state is {state.x.dtype} {tuple(state.x.shape)}; expected float32 [B, {shape}]"
            )
        if out not in (c, 2 * c) or (table.learned and out != 2 * c):
            expected = f"{2 * c} (mean and variance)" if table.learned else f"{c} or {2 * c}"
            raise ValueError(f"the network gives {out} channels; a step needs {expected}")
        if state.z is not None and (
            state.z.dtype != torch.float32
            or state.z.shape != state.x.shape
            or not state.z.is_contiguous(memory_format=torch.channels_last)
        ):
            raise ValueError(
                f"z is {state.z.dtype} {tuple(state.z.shape)}; expected channels-last float32 "
                f"[B, {shape}]: use the buffer of new_state"
            )
        if table.multistep and state.x_0 is None:
            state.x_0 = torch.zeros_like(state.x)
        count = len(state.x)
        self._integers("t of the table", torch.from_numpy(table.t), len(table), self.timesteps)
        self._integers("step_index", state.step_index, count, len(table) + 1)
        self._labels(state.labels, count)
        return self._executor.steps(state, table) if count else (i for i in range(0))

    def _labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        classes = self.config.num_classes
        if (labels is None) != (classes is None):
            expected = (
                "no labels: the network is unconditional"
                if classes is None
                else f"labels [B] in 0..{classes - 1}"
            )
            raise ValueError(
                f"labels {'missing' if labels is None else 'given'}; expected {expected}"
            )
        return (
            None if labels is None else self._integers("labels", labels, count, int(classes or 1))
        )

    def _integers(self, name: str, v: Tensor, count: int, most: int) -> Tensor:
        wrong = (
            v.shape != (count,) or v.is_floating_point() or v.is_complex() or v.dtype == torch.bool
        )
        if wrong or bool(((v < 0) | (v >= most)).any()):
            values = "" if wrong or not count else f" of {v.min()}..{v.max()}"
            raise ValueError(
                f"{name}: {v.dtype} {tuple(v.shape)}{values}; expected integers [{count}] in 0..{most - 1}"
            )
        return v.long()


def _check(unet: UNet, shape: tuple[int, ...], timesteps: int, threads: int) -> None:
    c, coarsest = unet.config, 2 ** (len(unet.config.channels) - 1)
    other = next(
        (p for p in unet.parameters() if p.dtype != torch.float32 or p.device.type != "cpu"), None
    )
    if other is not None:
        raise ValueError(
            f"the weights are {other.dtype} on {other.device}; this engine computes in float32 on the CPU: convert them"
        )
    if (
        len(shape) != 3
        or not all(map(is_count, shape))
        or shape[0] != c.in_channels
        or any(n % coarsest for n in shape[1:])
    ):
        raise ValueError(
            f"shape {shape}; expected ({c.in_channels}, height, width), both divisible by {coarsest}"
        )
    if not (is_count(timesteps) and is_count(threads)):
        raise ValueError(
            f"timesteps = {timesteps}, threads = {threads}; expected integers of at least 1"
        )


def _executor(
    unet: UNet, shape: tuple[int, int, int], timesteps: int, threads: int
) -> NativeExecutor:
    try:
        from .executor import NativeExecutor

        return NativeExecutor(unet, shape, timesteps, threads)
    except ImportError:
        raise ValueError(INSTALL) from None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"LLVM does not support this machine ({error})") from None
