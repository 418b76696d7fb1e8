"""Interface of engines: batch state, protocol, number formats by name, and numerics context."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..diffusion.solvers import StepTable


class DType(NamedTuple):
    """Number formats of a network: of its activations, and of the operands of 3x3 convolutions."""

    activations: torch.dtype
    operands: torch.dtype


DTYPES = {
    "fp32": DType(torch.float32, torch.float32),
    "fp16": DType(torch.float16, torch.float16),
    "bf16": DType(torch.bfloat16, torch.bfloat16),
    "fp8": DType(torch.bfloat16, torch.float8_e4m3fn),
}
ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "float8": "fp8",
}


def dtype_name(dtype: str | torch.dtype) -> str:
    """Returns the key in `DTYPES` of a dtype.

    Args:
        dtype: A key of `DTYPES`, or the dtype of activations in PyTorch or its name, with or
            without "torch.". Case is ignored.

    Raises:
        ValueError: The dtype is not supported.
    """
    if isinstance(dtype, (str, torch.dtype)):
        name = str(dtype).lower().removeprefix("torch.")
        name = ALIASES.get(name, name)
        if name in DTYPES:
            return name
    raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def check_device(device: torch.device | str) -> torch.device:
    """Returns `device` as a torch.device, after a computation on it.

    Raises:
        ValueError: The name is unknown, or this machine or this build of PyTorch lacks the device.
    """
    try:
        checked = torch.device(device)
        torch.zeros(1, device=checked).item()  # builds without CUDA raise here
    except Exception as error:  # its type depends on the backend
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            available.append("mps")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"; {reason}" if len(reason) < 100 else ""
        raise ValueError(
            f"device is {str(device)!r}; expected one of {', '.join(available)}{reason}"
        ) from None
    return checked


@contextmanager
def default_numerics(device: torch.device) -> Iterator[None]:
    """Context in which the caller's defaults do not affect results.

    Disables `torch.autocast`, sets the default dtype to float32, and replaces a default device that
    is neither the CPU nor `device` by `device`.
    """
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type not in ("cpu", device.type):
            stack.enter_context(device)
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def isolated(steps: Generator[int, None, None], device: torch.device) -> Generator[int, None, None]:
    """Runs a generator in `default_numerics`, which is not in effect between its yields."""
    try:
        while True:
            with default_numerics(device):
                completed = next(steps, None)
            if completed is None:
                return
            yield completed
    finally:
        with default_numerics(device):
            steps.close()


@dataclass
class SamplingState:
    """State of a batch during sampling: the tensors that a reverse step reads and writes.

    The tensors may be buffers of the engine (`Engine.new_state`). They are valid until `release` or
    the end of a `with` block; copy values that are needed longer.
    """

    x: Tensor  # [B, C, H, W] fp32, channels-last
    step_index: Tensor  # [B] int32, each image's row of the step table
    seed: Tensor  # [B] int64, the seed's 64 bits
    image: Tensor  # [B] int64, image indices
    labels: Tensor | None  # [B] int64
    x_0: Tensor | None = None  # like x, the x_0 predicted in the previous step; multistep solvers
    z: Tensor | None = None  # like x, the noise of the next step, if the caller gives it
    release: Callable[[], None] = field(default=lambda: None, repr=False)  # returns the buffers

    @classmethod
    def empty(
        cls,
        batch_size: int,
        shape: tuple[int, int, int],
        device: torch.device,
        labelled: bool,
        given_noise: bool = False,
    ) -> SamplingState:
        """Allocates an uninitialized state for images of `shape` (C, H, W)."""
        c, h, w = shape
        pixels = torch.empty(batch_size, h, w, c, dtype=torch.float32, device=device)
        x = pixels.permute(0, 3, 1, 2)
        step_index = torch.empty(batch_size, dtype=torch.int32, device=device)
        seed, image, labels = (torch.empty_like(step_index, dtype=torch.int64) for _ in range(3))
        z = torch.zeros_like(x) if given_noise else None
        return cls(x, step_index, seed, image, labels if labelled else None, z=z)

    def __enter__(self) -> SamplingState:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Engine(Protocol):
    """Interface of engines, which compute reverse steps of a batch.

    Attributes:
        name: One of `select.ENGINES`.
        reason: Why this engine was chosen, in one line.
        invariant: Whether it is batch-invariant: an image has the same bits in every batch.
    """

    name: str
    reason: str

    @property
    def invariant(self) -> bool: ...

    def prepare(self, batch_size: int) -> None:
        """Allocates and compiles what batches of up to `batch_size` images need."""
        ...

    def new_state(
        self,
        batch_size: int,
        shape: tuple[int, int, int],
        device: torch.device,
        labelled: bool,
        given_noise: bool = False,
    ) -> SamplingState:
        """Returns an uninitialized state. The caller fills it in place and releases it.

        Args:
            batch_size: Number of images.
            shape: (C, H, W).
            device: Device of the state.
            labelled: Whether the images have classes.
            given_noise: Whether the state has a buffer z, which the caller fills before each step.
        """
        ...

    def steps(
        self, state: SamplingState, table: StepTable, every_step: bool = True
    ) -> Generator[int, None, None]:
        """Runs the steps of a table in place; yields the total number of completed steps.

        Images at the table's end do not change. The host does not wait for the device.

        Args:
            state: A state from `new_state`.
            table: The step table.
            every_step: Yield after every step; False allows several steps between two yields,
                unless the state has a buffer z.
        """
        ...

    def free(self) -> None:
        """Releases device memory; it is reallocated on demand."""
        ...


def engine_repr(engine: Engine, **details: Any) -> str:
    """One line that describes an engine."""
    listed = "".join(f", {name}={value}" for name, value in details.items())
    return f"{type(engine).__name__}({engine.name!r}{listed}, reason={engine.reason!r})"


def mean_of(out: Tensor, channels: int, learned: bool) -> Tensor:
    """Returns the output channels that predict the mean: the first half of 2C channels if the
    solver does not use the predicted variance.
    """
    return out[:, :channels] if not learned and out.shape[1] == 2 * channels else out
