"""Workload of a benchmark: the checkpoint, precision and size that every engine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_pretrained
from ..engines.base import DTYPES
from ..engines.fused.calibration import Calibration, load_calibration
from ..models.unet import UNet, channels_last
from ..sampling.sampler import Sampler


class Cause(Enum):
    """Why an engine is left out of a comparison."""

    NOT_INSTALLED = "not installed"
    UNSUPPORTED = "unsupported"
    FAILED = "failed"


class Unavailable(Exception):
    """Raised where an engine is not installed or does not support the workload.

    Args:
        reason: The message.
        cause: `Cause.NOT_INSTALLED` if a package is missing.
    """

    def __init__(self, reason: str, cause: Cause = Cause.UNSUPPORTED) -> None:
        super().__init__(reason)
        self.cause = cause


@dataclass(frozen=True)
class Workload:
    """Workload of a benchmark.

    Args:
        checkpoint: Its UNet is in fp32, on the device.
        dtype: Precision of the network, a key of `engines.base.DTYPES`.
        folder: Cache folder of the engine; None disables caching.
        size: (H, W) in pixels; None for the size of the training images.
        calibration: Activation ranges of the fp8 layers.
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
    def timesteps(self) -> int:
        return len(self.checkpoint.schedule)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's; raises Unavailable for fp8, which only ddpm_fast computes."""
        dtype = DTYPES[self.dtype]
        if dtype.operands != dtype.activations:
            raise Unavailable(f"does not compute in {self.dtype}")
        return dtype.activations

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
        t = torch.randint(0, self.timesteps, (batch,), generator=g)
        labels = self.labels(batch)
        return x.to(self.device), t.to(self.device), *(() if labels is None else (labels,))

    def x_T(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Initial noise from torch's global generator, as in plain PyTorch code."""
        x = torch.randn(count, *self.shape, device=self.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Setting:
    """Setting of a benchmark, serializable as JSON for worker processes.

    Args:
        weights: Checkpoint, a diffusers folder; None for a `Checkpoint` in memory.
        dtype: Precision of the network, a key of `engines.base.DTYPES`.
        device: As torch names it.
        threads: CPU threads of torch.
        size: (H, W) in pixels; None for the size of the training images.
        folder: Cache folder of the engine; None disables caching.
    """

    weights: str | None
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    size: tuple[int, int] | None = None
    folder: str | None = None

    def workload(self, checkpoint: Checkpoint | None = None) -> Workload:
        """Returns the workload, on the device; loads `weights` unless a checkpoint is given."""
        calibration = None
        if self.weights is not None:
            checkpoint = checkpoint or load_pretrained(self.weights)
            if self.dtype == "fp8":
                calibration = load_calibration(self.weights, checkpoint.unet)
        assert checkpoint is not None
        channels_last(checkpoint.unet.eval().requires_grad_(False).to(self.device))
        size = None if self.size is None else (self.size[0], self.size[1])
        folder = None if self.folder is None else Path(self.folder)
        return Workload(checkpoint, self.dtype, folder, size, calibration)


def indexed(device: torch.device | str) -> torch.device:
    """Returns the device with its index: `torch.cuda.set_device` rejects a plain "cuda"."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
