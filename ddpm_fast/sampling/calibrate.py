"""Calibration of FP8 ranges: the reference network in fp32, with hooks, in real sampling runs."""

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

    Draws the images twice, by DDIM with random classes: once for the largest |input| of every 3x3 convolution that
    can compute in e4m3, once for its error with the resulting scale. The error is that of the layer alone: relative L2
    of its product (no bias, no residual) on its fp32 input, over all steps and images. The result is bit-exact on one
    machine; another may differ in the last digit.

    Args:
        checkpoint: the network and its process.
        images: number of images, 0 ... images-1 of `seed`.
        steps: DDIM steps.
        seed: 0 ... 2^64-1.
        device: default: that of the network.
        progress: show a progress bar for each of the two runs.

    Raises:
        ValueError: no convolution of the network can compute in e4m3.
        RuntimeError: an image contains NaN or Inf.
    """
    if not (is_count(images) and is_count(steps)):
        raise ValueError(f"images = {images!r}, steps = {steps!r}; expected integers of at least 1")
    convolutions = e4m3_convolutions(checkpoint.unet)
    if not convolutions:
        raise ValueError(
            "no convolution of this network can compute in e4m3; expected multiples of 32 channels"
        )

    def run(observe: Callable[[str, nn.Conv2d, Tensor], None]) -> None:
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

    run(largest)
    amax = {name: float(f"{value:.6g}") for name, value in amax.items()}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in convolutions}

    def compare(name: str, conv: nn.Conv2d, x: Tensor) -> None:
        sums[name] += _squares(conv.weight, x, unit_of(amax[name])).cpu()

    run(compare)
    error = {
        name: float(f"{float((off / exact).sqrt()):.4g}") if exact else 0.0
        for name, (off, exact) in sums.items()
    }
    made = dict(images=images, steps=steps, solver="ddim", seed=seed)
    return Calibration.of(checkpoint.unet, made, amax, error)


def _squares(weight: Tensor, x: Tensor, unit: float) -> Tensor:
    """Sums of squares [2] fp64 of a product of e4m3 operands less the exact one, and of the exact one."""
    exact = F.conv2d(x, weight, padding=1)
    packed, scale = quantise(pack(weight), E4M3, unit)
    assert scale is not None
    rounded = (x / unit).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()
    off = F.conv2d(rounded, unpack(packed.float(), 3), padding=1) * scale[:, None, None] - exact
    return torch.stack([v.double().square().sum() for v in (off, exact)])


def _sampler(c: Checkpoint, device: torch.device | str | None) -> Sampler:
    """Sampler of the reference network itself, whose layers have the hooks."""
    unet, config = channels_last(c.unet.to(device).float().eval()), c.unet.config
    if config.size is None:
        raise ValueError("the configuration has no sample_size; expected the size of its images")

    def model(*call: Any) -> Tensor:
        return unet(*call)

    shape = (config.in_channels, *config.size)
    where = unet.conv_in.weight.device
    return Sampler(
        model,
        c.schedule,
        shape,
        c.prediction,
        c.variance,
        c.clip,
        config.num_classes,
        where,
        engine="reference",
    )
