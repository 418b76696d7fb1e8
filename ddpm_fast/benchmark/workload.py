"""Workload of a benchmark: what every engine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..engines.fused.calibration import Calibration
from ..models.unet import UNet
from ..sampling.sampler import Sampler

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """Raised where an engine is not installed or does not support the workload; holds the reason."""


@dataclass(frozen=True)
class Workload:
    """Workload of a benchmark: the checkpoint and the precision that every engine runs.

    Args:
        checkpoint: Its UNet is in fp32, on the device.
        dtype: Precision of the network, a name in `engines.base.DTYPES`.
        folder: Cache folder of the engine; None where the engine may cache nothing.
        size: (H, W) in pixels; None for the size of the training images.
        calibration: Of the fp8 layers.
    """

    checkpoint: Checkpoint
    dtype: str = "fp32"
    folder: Path | None = None
    size: tuple[int, int] | None = None
    calibration: Calibration | None = None

    @property
    def unet(self) -> UNet:
        return self.checkpoint.unet

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def shape(self) -> tuple[int, int, int]:
        size = self.size or self.unet.config.size
        if size is None:
            raise ValueError("the network names no sample_size; give a size (height, width)")
        return self.unet.config.in_channels, *size

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's; raises Unavailable for fp8, which only ddpm_fast computes."""
        if self.dtype not in DTYPES:
            raise Unavailable(f"does not compute in {self.dtype}")
        return DTYPES[self.dtype]

    def sampler(
        self,
        engine: str = "auto",
        dtype: str | None = None,
        model: Callable[..., Tensor] | None = None,
    ) -> Sampler:
        """Sampler of this network, or of another function with its signature."""
        c = self.checkpoint
        options = (c.prediction, c.variance, c.clip, self.unet.config.num_classes, self.device)
        return Sampler(
            model or c.unet,
            c.schedule,
            self.shape,
            *options,
            engine,
            dtype or self.dtype,
            self.calibration,
        )

    def labels(self, count: int) -> Tensor | None:
        classes = self.unet.config.num_classes
        return None if classes is None else torch.arange(count, device=self.device) % classes

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """x_t, t and, for a network with classes, labels: the same for every engine."""
        g = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, *self.shape, generator=g).contiguous(
            memory_format=torch.channels_last
        )
        t = torch.randint(0, len(self.checkpoint.schedule), (batch,), generator=g)
        labels = self.labels(batch)
        return x.to(self.device), t.to(self.device), *(() if labels is None else (labels,))

    def x_T(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Initial noise from torch's global generator, as plain PyTorch code draws it."""
        x = torch.randn(count, *self.shape, device=self.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)
