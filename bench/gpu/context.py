"""Context of a run of `bench.gpu`: the device, the sizes, and the deadline of the current part."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.workloads import NETWORKS, TINY_UNET, random_checkpoint
from ddpm_fast import Checkpoint
from ddpm_fast.benchmark.timer import Timing, measure
from ddpm_fast.benchmark.workload import Workload
from ddpm_fast.models.unet import channels_last


class Bench:
    """Argument of every part.

    Attributes:
        tiny: Tiny sizes on the CPU, whose times mean nothing.
        device: Device of the run.
        copy_rate: Bytes per second of a copy, once the part `ceilings` has measured it.
        deadline: `time.monotonic()` at which the current part is stopped.
    """

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
        self.copy_rate: float | None = None
        self.deadline = 0.0

    @property
    def dtypes(self) -> list[str]:
        """Precisions of the network that this device supports."""
        has_fp8 = self.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
        return ["bf16", "fp8"] if has_fp8 else ["bf16"]

    def measure(self, call: Callable[[], object], captured: bool = False) -> Timing:
        """Times a call; `captured` as in `benchmark.timer.measure`."""
        seconds, least = (0.02, 2) if self.tiny else (0.3, 5)
        return measure(call, self.device, seconds, least, captured)

    def checkpoint(self, network: str = "cifar10") -> Checkpoint:
        """A network of `bench.workloads` with random weights, on the device."""
        checkpoint = random_checkpoint(TINY_UNET if self.tiny else NETWORKS[network])
        channels_last(checkpoint.unet.to(self.device))
        return checkpoint

    def workload(self, network: str = "cifar10") -> Workload:
        return Workload(self.checkpoint(network), "bf16")
