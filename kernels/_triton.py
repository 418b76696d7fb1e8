"""Import of Triton, with placeholders if it is missing, and argument checks.

Without Triton every operation runs its PyTorch reference, and launching a kernel raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import update_wrapper
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Inert:
        """Placeholder of a kernel."""

        def __init__(self, fn: Any) -> None:
            self.fn = fn

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                f"Triton is unavailable; {self.fn.__name__} needs it: pip install 'triton>=3.6'"
            )

    def _jit(fn: Any = None, **_: Any) -> Any:
        return _Inert if fn is None else _Inert(fn)

    triton = SimpleNamespace(jit=_jit, cdiv=lambda a, b: -(-a // b))
    tl = SimpleNamespace(constexpr=lambda value: SimpleNamespace(value=value))

PRESENT = not isinstance(triton, SimpleNamespace)
INTERPRETED = PRESENT and bool(triton.knobs.runtime.interpret)


def operation(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that registers a function as a `torch.library` operation.

    Args:
        name: "namespace::operation".
        mutates_args: Names of the arguments that the operation writes into.
    """

    def register(function: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(name, mutates_args=tuple(mutates_args))(function)
        return update_wrapper(registered, function)

    return register


# Kernels that failed their check on this machine. Operations that use them run their references.
UNTRUSTED: set[str] = set()


def launches_kernel(x: Tensor, *kernels: str) -> bool:
    """Whether an operation on `x` launches its kernel (on a GPU, or by Triton's interpreter).

    Args:
        x: Input of the operation.
        kernels: Names in the self-check of the kernels that it uses; none may be in `UNTRUSTED`.
    """
    return (INTERPRETED or (PRESENT and x.is_cuda)) and UNTRUSTED.isdisjoint(kernels)


def image_strides(x: Tensor, name: str) -> tuple[int, int, int]:
    """Returns the (image, channel, pixel) strides of x [B, C, H, W], which is not copied.

    Raises:
        ValueError: The rows of an image are not adjacent in memory. Channels-first, channels-last
            and slices of channels of both are accepted. Or an image spans 2^31 elements.
    """
    _, c, h, w = x.shape
    image, channel, row_stride, pixel = x.stride()
    if w == 1:
        pixel = row_stride
    elif h > 1 and row_stride != w * pixel:
        raise ValueError(
            f"{name} {tuple(x.shape)} has strides {x.stride()}; expected whole images, "
            "channels-first or channels-last; call .contiguous() first"
        )
    if (c - 1) * channel + (h * w - 1) * pixel >= 2**31 - 2**16:
        # offsets inside an image are int32
        raise ValueError(f"an image of {name} {tuple(x.shape)} spans 2^31 elements; expected fewer")
    return image, channel, pixel


def is_element_order(x: Tensor, strides: tuple[int, int, int]) -> bool:
    """Whether element (c, h, w) is at (h * W + w) * C + c: channels-last, or one channel."""
    _, c, h, w = x.shape
    return (c == 1 or strides[1] == 1) and (h * w == 1 or strides[2] == c)


def check_per_image(batch: int, device: torch.device, **vectors: Tensor) -> None:
    """Raises ValueError unless all `vectors` are integer [batch], contiguous and on `device`."""
    for name, v in vectors.items():
        if (
            v.shape != (batch,)
            or v.dtype not in (torch.int32, torch.int64)
            or v.device != device
            or not v.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {v.dtype} {tuple(v.shape)} on {v.device}; "
                f"expected int32 or int64 [{batch}], contiguous, on {device}"
            )


def check_table(name: str, table: Tensor, columns: int, device: torch.device) -> None:
    """Raises ValueError unless `table` is fp32 [rows, columns], contiguous and on `device`."""
    if (
        table.dtype != torch.float32
        or table.ndim != 2
        or table.shape[1] != columns
        or table.device != device
        or not table.is_contiguous()
    ):
        raise ValueError(
            f"{name} is {table.dtype} {tuple(table.shape)} on {table.device}; "
            f"expected contiguous float32 [rows, {columns}] on {device}"
        )
