"""Parts of `bench.gpu`: training steps and the variational bound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from bench.gpu.context import Bench
from bench.studies.training import ENGINES, LOSS_TOLERANCES, fixed_loss
from ddpm_fast import Sampler
from ddpm_fast.benchmark.timer import Row, row_of
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.evaluation.likelihood import bits_per_dimension


def training(bench: Bench) -> Iterator[Row]:
    """Steps of `Trainer` and of a plain PyTorch loop, both under autocast to bf16."""
    channels, batch = ((8, 16), 8) if bench.tiny else ((48, 96, 96), 256)
    engines = {"training": "ddpm_fast", "training, plain PyTorch": "plain PyTorch"}
    first = None
    for what, engine in engines.items():
        step, loss_of = ENGINES[engine](channels, batch, "bf16", bench.device)
        loss = fixed_loss(loss_of, "bf16", bench.device)
        first = first or loss
        if abs(loss - first) > LOSS_TOLERANCES["bf16"] * loss:
            raise AssertionError(f"losses on one input differ, {first} and {loss}: nothing timed")
        timing = bench.measure(step)
        rate = batch / timing.median
        yield dict(what=what, batch=batch, **row_of(timing), images_per_s=rate, loss=loss)


def likelihood(bench: Bench) -> Iterator[Row]:
    """Terms of the bound per second, on the CIFAR-10 network and images of noise."""
    workload = bench.workload()
    c, (channels, h, w) = workload.checkpoint, workload.shape
    count, steps, batch = (2, 5, 4) if bench.tiny else (8, 100, 256)
    pixels = np.random.default_rng(0).integers(0, 256, (count, h, w, channels), dtype=np.uint8)
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        sampler = Sampler(c.unet.to(dtype), c.schedule, (channels, h, w), engine="reference")
        bound = partial(bits_per_dimension, sampler, ImageData(pixels), steps, batch_size=batch)
        bits = bound().mean
        exact = exact or bits
        timing = bench.measure(bound)
        yield dict(
            what="likelihood",
            dtype=str(dtype).removeprefix("torch."),
            **row_of(timing),
            terms_per_s=count * steps / timing.median,
            bits=bits,
            apart=abs(bits - exact),
        )
