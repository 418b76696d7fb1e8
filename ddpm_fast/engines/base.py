"""What every engine is: the state of a batch, the interface that a sampler calls, and the number
formats by name.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


def dtype_name(dtype: str | torch.dtype) -> str:
    """Returns the key in `DTYPES` of a name or a torch dtype of activations.

    Raises:
        ValueError: The dtype is not supported.
    """
    name = (
        dtype
        if isinstance(dtype, str)
        else next((k for k, v in DTYPES.items() if v.activations == dtype), str(dtype))
    )
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    return name


@dataclass
class SamplingState:
    """State of a batch during sampling: all that a reverse step reads and writes, on the device."""

    x: Tensor  # [B, C, H, W] fp32, channels-last
    step_index: Tensor  # [B] int32, each image's row of the step table
    seed: Tensor  # [B] int64, the seed's 64 bits
    image: Tensor  # [B] int64, image indices
    labels: Tensor | None  # [B] int64
    x_0: Tensor | None = (
        None  # like x: the prediction of x_0 in the last step, if the solver reads it
    )


class Engine(Protocol):
    """Interface of engines, which compute reverse steps.

    Attributes:
        name: One of `select.ENGINES`.
        reason: Why this engine was chosen, in one line.
        invariant: Whether an image has the same bits in every batch.
    """

    name: str
    reason: str

    @property
    def invariant(self) -> bool: ...

    def prepare(self, batch_size: int) -> None:
        """Allocates and compiles what batches of up to `batch_size` images need."""
        ...

    def steps(
        self, state: SamplingState, table: StepTable, every_step: bool = True
    ) -> Generator[int, None, None]:
        """Takes the state through the table in place and yields how many steps are done in total.

        An image at the table's end does not change. Nothing here waits for the device. After the
        last step, or when the generator is closed, the state's tensors belong to the caller.

        Args:
            every_step: Yield after every step; False allows several steps between two yields.
        """
        ...

    def free(self) -> None:
        """Releases device memory; it is reallocated on demand."""
        ...


def mean_of(out: Tensor, channels: int, learned: bool) -> Tensor:
    """The output [B, C, H, W] that predicts the mean. A network that also predicts its variance
    gives 2C channels: a solver that sets the variance reads the first half.
    """
    return out[:, :channels] if not learned and out.shape[1] == 2 * channels else out
