"""Context of a run of `bench.gpu`: the device, the sizes, and the deadline of the current part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.workloads import NETWORKS, TINY_UNET
from ddpm_fast import UNet
from ddpm_fast.benchmark.timer import Timing, measure


class Bench:
    """Passed to every part.

    Attributes:
        tiny: Tiny sizes on the CPU, in which figures mean nothing.
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

    def network(self, name: str = "cifar10") -> UNet:
        """A network of `bench.workloads` with random weights, on the device."""
        torch.manual_seed(0)
        return (
            UNet(TINY_UNET if self.tiny else NETWORKS[name])
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )

    def inputs(self, unet: UNet, batch: int) -> tuple[Tensor, Tensor]:
        """x_t in channels-last layout and timesteps, the same in every run."""
        generator = torch.Generator().manual_seed(batch)
        c = unet.config
        x = torch.randn(batch, c.in_channels, *(c.size or (32, 32)), generator=generator).to(
            self.device
        )
        return x.contiguous(memory_format=torch.channels_last), torch.arange(
            batch, device=self.device
        ) % 1000
