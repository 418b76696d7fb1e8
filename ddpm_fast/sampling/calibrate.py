"""Calibration of FP8 ranges: hooks on the fp32 reference network during sampling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..engines.fused.calibration import Calibration, e4m3_convolutions, unit_of
from ..kernels._gemm import E4M3_MAX, pack, quantise, unpack
from ..models.unet import channels_last
from ..utils.validation import is_count
from .sampler import Sampler

E4M3 = torch.float8_e4m3fn
BATCH = 16
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    images: int = 16,
    steps: int = 25,
    seed: int = 1,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Calibration:
    """Measures activation ranges for e4m3 by sampling with the reference network.

    Draws the images twice, by DDIM with random classes. The first run measures the largest |input|
    of every 3x3 convolution that can compute in e4m3, the second its error with the resulting
    scale: the relative L2 error of the product (without bias and residual) on its fp32 input, over
    all steps and images. Results are bit-exact on one machine; another machine may differ in the
    last digit.

    Args:
        checkpoint: The network and its process.
        images: Number of images, 0 ... images-1 of `seed`.
        steps: DDIM steps.
        seed: 0 ... 2^64-1.
        device: Default: the device of the network.
        progress: Show a progress bar for each of the two runs.

    Raises:
        ValueError: No convolution of the network can compute in e4m3.
        RuntimeError: An image contains NaN or Inf.
    """
    if not (is_count(images) and is_count(steps)):
        raise ValueError(f"images = {images!r}, steps = {steps!r}; expected integers of at least 1")
    convolutions = e4m3_convolutions(checkpoint.unet)
    if not convolutions:
        raise ValueError(
            "no convolution of this network can compute in e4m3; expected multiples of 32 channels"
        )

    def sample(observe: Callable[[str, nn.Conv2d, Tensor], None]) -> None:
        def hook(name: str, conv: nn.Conv2d) -> Hook:
            return lambda module, inputs: observe(name, conv, inputs[0])

        with ExitStack() as hooks:
            for name, conv in convolutions.items():
                hooks.callback(conv.register_forward_pre_hook(hook(name, conv)).remove)
            _sampler(checkpoint, device).sample(
                images,
                seed=seed,
                solver="ddim",
                steps=steps,
                output="float",
                batch_size=BATCH,
                progress=progress,
            )

    amax = dict.fromkeys(convolutions, 0.0)

    def largest(name: str, conv: nn.Conv2d, x: Tensor) -> None:
        amax[name] = max(amax[name], float(x.abs().max()))

    sample(largest)
    amax = {name: float(f"{value:.6g}") for name, value in amax.items()}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in convolutions}

    def compare(name: str, conv: nn.Conv2d, x: Tensor) -> None:
        sums[name] += _squares(conv.weight, x, unit_of(amax[name])).cpu()

    sample(compare)
    error = {
        name: float(f"{float((difference / exact).sqrt()):.4g}") if exact else 0.0
        for name, (difference, exact) in sums.items()
    }
    settings = dict(images=images, steps=steps, solver="ddim", seed=seed)
    return Calibration.of(checkpoint.unet, settings, amax, error)


def _squares(weight: Tensor, x: Tensor, unit: float) -> Tensor:
    """Sums of squares, fp64 [2]: of the error of the product in e4m3, and of the exact product."""
    exact = F.conv2d(x, weight, padding=1)
    packed, scale = quantise(pack(weight), E4M3, unit)
    assert scale is not None
    rounded = (x / unit).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()
    product = F.conv2d(rounded, unpack(packed.float(), 3), padding=1) * scale[:, None, None]
    return torch.stack([v.double().square().sum() for v in (product - exact, exact)])


def _sampler(c: Checkpoint, device: torch.device | str | None) -> Sampler:
    """Sampler of the reference network, not of a copy: its layers have the hooks."""
    unet, config = channels_last(c.unet.to(device).float().eval()), c.unet.config
    if config.size is None:
        raise ValueError("the configuration has no sample_size; expected the size of its images")

    def model(*arguments: Any) -> Tensor:
        return unet(*arguments)

    shape = (config.in_channels, *config.size)
    process = (c.schedule, shape, c.prediction, c.variance, c.clip, config.num_classes)
    return Sampler(model, *process, unet.conv_in.weight.device, engine="reference")
