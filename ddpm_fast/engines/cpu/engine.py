"""CPU engine: an fp32 `UNet` and the reverse steps with it, one image per core at a time.

It runs machine code that LLVM compiles on this machine (`runtime`) and needs llvmlite (`pip install
ddpm-fast[cpu]`). It is batch-invariant: no reduction depends on the number of images or threads.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...diffusion.solvers import StepTable
from ...models.config import check_integers
from ...models.unet import UNet
from ...utils.validation import is_count
from ..base import SamplingState, engine_repr

if TYPE_CHECKING:
    from .executor import ProgramExecutor

INSTALL = (
    "llvmlite is missing; for twice the speed and the same bits in every batch: "
    "pip install ddpm-fast[cpu]"
)


class CPUEngine:
    """Engine for an fp32 `UNet` on a CPU, for images of one shape.

    Args:
        unet: The network. Its weights are copied, so training it may continue.
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
        self.size = (shape[1], shape[2])
        self._executor = _executor(unet, shape, timesteps, threads)
        self.reason = self._executor.reason

    def __repr__(self) -> str:
        return engine_repr(self, shape=self.shape)

    @property
    def memory(self) -> int:
        """Bytes of packed weights, time table and the threads' feature maps, for any batch size."""
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
        if not x_t.is_floating_point() or x_t.device.type != "cpu":
            raise ValueError(f"x_t is {x_t.dtype} on {x_t.device}; expected floating on cpu")
        t = torch.as_tensor(t, device="cpu")
        t = t.expand(x_t.shape[:1]) if t.ndim == 0 else t
        self.config.check_call(x_t, labels, t, self.timesteps, self.size)
        if not len(x_t):
            return x_t.new_empty((0, self.config.out_channels, *self.size), dtype=torch.float32)
        return self._executor.forward(x_t, t.long(), None if labels is None else labels.long())

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
        """See `Engine.new_state`; allocates new memory."""
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
        c, out, count = self.shape[0], self.config.out_channels, len(state.x)
        if state.x.dtype != torch.float32:
            raise ValueError(f"the state is {state.x.dtype}; expected torch.float32")
        self.config.check_call(state.x, state.labels, timesteps=self.timesteps, size=self.size)
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
                f"{tuple(state.x.shape)}: use the buffer of new_state"
            )
        if table.multistep and state.x_0 is None:
            state.x_0 = torch.zeros_like(state.x)
        check_integers("t of the table", torch.from_numpy(table.t), len(table), self.timesteps)
        check_integers("step_index", state.step_index, count, len(table) + 1)
        return self._executor.steps(state, table) if count else (i for i in range(0))


def _check(unet: UNet, shape: tuple[int, ...], timesteps: int, threads: int) -> None:
    c, coarsest = unet.config, 2 ** (len(unet.config.channels) - 1)
    for p in unet.parameters():
        if p.dtype != torch.float32 or p.device.type != "cpu":
            raise ValueError(
                f"the weights are {p.dtype} on {p.device}; expected float32 on cpu: convert them"
            )
    if (
        len(shape) != 3
        or not all(map(is_count, shape))
        or shape[0] != c.in_channels
        or any(n % coarsest for n in shape[1:])
    ):
        raise ValueError(
            f"shape is {shape}; expected ({c.in_channels}, height, width), "
            f"both divisible by {coarsest}"
        )
    if not (is_count(timesteps) and is_count(threads)):
        raise ValueError(
            f"timesteps = {timesteps}, threads = {threads}; expected integers of at least 1"
        )


def _executor(
    unet: UNet, shape: tuple[int, int, int], timesteps: int, threads: int
) -> ProgramExecutor:
    try:
        from .executor import ProgramExecutor

        return ProgramExecutor(unet, shape, timesteps, threads)
    except ImportError:
        raise ValueError(INSTALL) from None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"LLVM does not support this machine ({error})") from None
