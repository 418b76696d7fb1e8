"""What a user would run instead, behind one face: a forward pass and a sampling loop with the same weights.

Ours        `Sampler` with one of its engines
Plain       the reference UNet in the usual loop, eagerly or by torch.compile; coefficients on the host, torch's own noise
Diffusers   UNet2DModel and DDPMScheduler in their own loop, with labels where the network has classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler, UNet
from ddpm_fast.profile import EXACT
from ddpm_fast.timesteps import choose_timesteps
from ddpm_fast.unet import channels_last

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Peer(Protocol):
    """forward(x_t [B, C, H, W] fp32, t int64 [B], labels int64 [B] or None) -> eps; sample(count, steps): a batch of images."""

    name: str

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor: ...
    def sample(self, count: int, steps: int) -> Tensor: ...


class Ours:
    """A sampler, and the forward pass of its engine."""

    def __init__(self, sampler: Sampler, forward: Callable[..., Tensor] | None = None) -> None:
        self.name, self.sampler = f"ddpm_fast {sampler.engine.name} {sampler.precision}", sampler
        self._forward = forward or sampler.model

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._forward(x_t, t, *(() if labels is None else (labels,)))

    def sample(self, count: int, steps: int) -> Tensor:
        return self.sampler.sample(count, steps=steps, batch_size=count, output="float")


class Plain:
    """The usual loop in plain PyTorch, as fast as it gets without kernels of one's own: nothing in it waits for the device."""

    def __init__(self, unet: UNet, schedule: NoiseSchedule, dtype: str, compiled: bool = False) -> None:
        self.name = f"torch.compile {dtype}" if compiled else f"plain PyTorch {dtype}"
        device, c = unet.conv_in.weight.device, unet.config
        half = channels_last(UNet(c).eval().requires_grad_(False).to(device, DTYPES[dtype]))
        half.load_state_dict(unet.state_dict())
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.model: Callable[..., Tensor] = torch.compile(half, mode=mode, dynamic=False) if compiled else half
        self.schedule, self.config, self.device, self.dtype = schedule, c, device, DTYPES[dtype]

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(x_t.to(self.dtype), t, *(() if labels is None else (labels,))).float()

    @torch.no_grad()
    def sample(self, count: int, steps: int) -> Tensor:
        c, labels = self.config, _labels(self.config, count, self.device)
        t = choose_timesteps(len(self.schedule), steps)
        table = EXACT.table(self.schedule, "ddpm", t)
        x = torch.randn(count, c.in_channels, *(c.size or (32, 32)), device=self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        for at, row in zip(table.t, table.coef.tolist(), strict=True):
            x_0_x, x_0_out, clip, mean_x_0, mean_x, _, _, sigma, *_ = row
            out = self.forward(x, torch.full((count,), int(at), device=self.device), labels)
            x = mean_x_0 * (x_0_x * x + x_0_out * out).clamp(-clip, clip) + mean_x * x + sigma * torch.randn_like(x)
        return x


class Diffusers:
    """diffusers' network and scheduler in diffusers' own loop. ImportError where it is not installed."""

    def __init__(self, unet: UNet, dtype: str = "fp32") -> None:
        from diffusers import DDPMScheduler, UNet2DModel

        self.name = f"diffusers {dtype}"
        device, self.config, self.dtype = unet.conv_in.weight.device, unet.config, DTYPES[dtype]
        self.unet: Any = UNet2DModel.from_config(unet.config.to_diffusers()).eval()
        self.unet.load_state_dict(unet.state_dict())
        self.unet.to(device, self.dtype)
        if dtype != "fp32":
            self.unet.to(memory_format=torch.channels_last)
        self.scheduler: Any = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
        self.device = device

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x_t.to(self.dtype), t, class_labels=labels).sample.float()

    @torch.no_grad()
    def sample(self, count: int, steps: int) -> Tensor:
        c, labels = self.config, _labels(self.config, count, self.device)
        self.scheduler.set_timesteps(steps, device=self.device)
        x = torch.randn(count, c.in_channels, *(c.size or (32, 32)), device=self.device, dtype=self.dtype)
        for t in self.scheduler.timesteps:
            out = self.unet(x, t, class_labels=labels).sample
            x = self.scheduler.step(out, t, x).prev_sample
        return x


def _labels(config: Any, count: int, device: torch.device) -> Tensor | None:
    return None if config.num_classes is None else torch.arange(count, device=device) % config.num_classes
