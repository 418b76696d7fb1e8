"""Asynchronous device-to-host transfer of finished batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.image_io import to_pil
from ..data.pixels import to_uint8
from ..diffusion.presets import preset_of

OUTPUTS = ("uint8", "float", "pil")


class _Pair(NamedTuple):
    first: int
    images: Any


class Batch(_Pair):
    """Batch of finished images: the pair (first, images).

    Attributes:
        first: Index of the first image.
        images: The images, in the format of `output`.
        indices: Index of every image, int64 [N] on the CPU.
    """

    indices: Tensor

    @classmethod
    def of(cls, indices: Tensor, images: Any) -> Batch:
        batch = cls(int(indices[0]), images)
        batch.indices = indices
        return batch


@dataclass(eq=False)
class HostTransfer:
    """Asynchronous transfer of a batch to the host; images of output "float" stay on the device.

    Attributes:
        indices: Image indices, int64 [N] on the CPU.
        images: uint8 [N, H, W, C] on the CPU or fp32 [N, C, H, W] on the device.
        output: One of `OUTPUTS`.
        finite: bool [N], False for an image that contains NaN or Inf.
        event: CUDA event recorded after the last copy; None on the CPU.
        precision: The network's precision, for the error message.
    """

    indices: Tensor
    images: Tensor
    output: str
    finite: Tensor
    event: torch.cuda.Event | None
    precision: str

    @classmethod
    def start(
        cls, x: Tensor, indices: Tensor, output: str, preset: str, precision: str
    ) -> HostTransfer:
        """Enqueues the conversion of x [N, C, H, W] to `output` and the copy; does not wait.

        Work enqueued later on the current stream may overwrite x.
        """
        finite = x.isfinite().flatten(1).all(1)
        if output == "float":
            copied = x.clone(memory_format=torch.contiguous_format)  # stays on the device
        else:
            images = to_uint8(x, preset_of(preset).level)
            copied = copy_to_host(images) if x.is_cuda else images.cpu()
        if not x.is_cuda:
            return cls(indices, copied, output, finite, None, precision)
        finite = copy_to_host(finite)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(x.device))
        return cls(indices, copied, output, finite, event, precision)

    def done(self) -> bool:
        return self.event is None or self.event.query()

    def result(self) -> Batch:
        """Waits for the transfer; returns the batch.

        Raises:
            RuntimeError: An image contains NaN or Inf.
        """
        if self.event is not None:
            self.event.synchronize()
        if not self.finite.all():
            invalid = self.indices[~self.finite.cpu()].tolist()
            raise RuntimeError(
                f"images {invalid[:8]} contain NaN or Inf; check the weights, or use a higher "
                f"precision than {self.precision}"
            )
        images = to_pil(self.images.numpy()) if self.output == "pil" else self.images
        return Batch.of(self.indices, images)


def completed(transfers: list[HostTransfer], wait: bool = False) -> Iterator[Batch]:
    """Removes finished transfers, or all if `wait`, from the front of the list; yields results."""
    while transfers and (wait or transfers[0].done()):
        yield transfers.pop(0).result()


def copy_to_host(x: Tensor) -> Tensor:
    """Copies asynchronously to pinned memory; synchronize before reading the copy."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
