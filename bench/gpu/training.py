"""Parts of `bench.gpu`: training steps and the likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from bench.gpu.context import Bench
from bench.studies.training import ENGINES
from bench.workloads import NETWORKS, TINY_UNET
from ddpm_fast import NoiseSchedule, Sampler, UNet
from ddpm_fast.benchmark.timer import Row, row_of
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.evaluation.likelihood import bits_per_dimension
from ddpm_fast.models.unet import channels_last


def training(bench: Bench) -> Iterator[Row]:
    """Steps of `Trainer` and of the same network in a plain PyTorch loop, both under autocast to bf16."""
    channels, batch = ((8, 16), 8) if bench.tiny else ((48, 96, 96), 256)
    x_t, eps = torch.randn(2, 4, 1, 32, 32, device=bench.device)
    t, labels = (
        torch.tensor([0, 300, 600, 999], device=bench.device),
        torch.arange(4, device=bench.device),
    )
    first = None
    for name, engine in {
        "training": "ddpm_fast",
        "training, plain PyTorch": "plain PyTorch",
    }.items():
        step, loss_of = ENGINES[engine](channels, batch, "bf16", bench.device)
        with torch.no_grad():
            loss = float(loss_of(x_t, t, labels, eps))
        first = first or loss
        if abs(loss - first) > 1e-3 * loss:
            raise AssertionError(f"losses on one input differ, {first} and {loss}: nothing timed")
        timing = bench.measure(step)
        yield dict(
            what=name, batch=batch, **row_of(timing), images_per_s=batch / timing.median, loss=loss
        )


def likelihood(bench: Bench) -> Iterator[Row]:
    """Terms of the bound per second on the CIFAR-10 network and images of noise: images and timesteps in one batch."""
    torch.manual_seed(0)
    config = TINY_UNET if bench.tiny else NETWORKS["cifar10"]
    count, steps, batch = (2, 5, 4) if bench.tiny else (8, 100, 256)
    h, w = config.size or (32, 32)
    data = ImageData(
        np.random.default_rng(0).integers(0, 256, (count, h, w, config.in_channels), dtype=np.uint8)
    )
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        unet = channels_last(UNet(config).eval().to(bench.device, dtype))
        sampler = Sampler(
            unet, NoiseSchedule.linear(), (config.in_channels, h, w), engine="reference"
        )
        bits = bits_per_dimension(sampler, data, steps, batch_size=batch).mean
        exact = exact or bits
        timing = bench.measure(partial(bits_per_dimension, sampler, data, steps, batch_size=batch))
        figures = dict(
            terms_per_s=count * steps / timing.median, bits=bits, apart=abs(bits - exact)
        )
        yield dict(
            what="likelihood", dtype=str(dtype).removeprefix("torch."), **row_of(timing), **figures
        )
