"""Finished images on their way to the host, while the device goes on with the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.pixels import to_uint8
from ..diffusion.presets import PRESETS


@dataclass(eq=False)
class Outbox:
    """A batch that the device is done with or soon will be. images int64 [N], on the CPU."""

    images: Tensor
    pixels: Tensor
    finite: Tensor
    event: torch.cuda.Event | None
    precision: str

    @classmethod
    def send(cls, x: Tensor, images: Tensor, output: str, preset: str, precision: str) -> Outbox:
        """Starts what makes x [N, C, H, W] into what was asked for, and returns without waiting for it."""
        finite = x.isfinite().flatten(1).all(1)
        pixels = to_uint8(x, PRESETS[preset].level) if output == "uint8" else x.contiguous()
        if not x.is_cuda:
            return cls(images, pixels.cpu() if output == "uint8" else pixels, finite, None, precision)
        finite = to_host(finite)
        pixels = to_host(pixels) if output == "uint8" else pixels
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(x.device))
        return cls(images, pixels, finite, event, precision)

    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def take(self) -> tuple[int, Tensor]:
        """(index of the first image, images), once they are there. RuntimeError where one has values that are not finite."""
        if self.event is not None:
            self.event.synchronize()
        if not self.finite.all():
            broken = self.images[~self.finite.cpu()].tolist()
            raise RuntimeError(
                f"images {broken[:8]} came out with values that are not finite; check the weights, or widen {self.precision}"
            )
        return int(self.images[0]), self.pixels


def arrived(sent: list[Outbox], wait: bool = False) -> Iterator[tuple[int, Tensor]]:
    """Takes off the list, and yields, what is there by now; or all of it."""
    while sent and (wait or sent[0].ready()):
        yield sent.pop(0).take()


def to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory that the device fills in its own time: to be read after a synchronisation."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
