"""Parts of `bench.gpu`: sampling loops of ddpm_fast and of the baselines."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu.context import Bench
from bench.workloads import ROOT
from ddpm_fast import NoiseSchedule, Sampler, UNet
from ddpm_fast.benchmark.baselines import Baseline, DdpmFast, Diffusers, Plain
from ddpm_fast.benchmark.runner import TOLERANCES
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.benchmark.workload import Unavailable, Workload
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.utils.numerics import relative_error

SCHEDULE = NoiseSchedule.linear()


@dataclass(frozen=True)
class Candidate:
    """An engine to time: `create` raises Unavailable without its package; batches: sizes to run."""

    engine: str
    dtype: str
    create: Callable[[], Baseline]
    batches: tuple[int, ...]


def celebahq256(bench: Bench) -> Iterator[Row]:
    """The 256x256 network, batch 16."""
    yield from _network(bench, "celebahq256", (16,))


def sampling(bench: Bench) -> Iterator[Row]:
    """The shipped weights, then the CIFAR-10 network: ms per step and image-steps per second."""
    yield from _shipped(bench)
    yield from _network(bench, "cifar10", (1, 16, 256, 1024))


def _network(bench: Bench, network: str, batches: tuple[int, ...]) -> Iterator[Row]:
    unet = bench.network(network)
    for candidate in _candidates(bench, unet, (2,) if bench.tiny else batches):
        try:
            baseline = candidate.create()
        except Unavailable as reason:
            yield dict(what="sampling", network=network, summary=f"left out: {reason}")
            continue
        for batch in candidate.batches:
            row = _loop(bench, baseline, unet, batch, TOLERANCES[candidate.dtype])
            where = dict(
                engine=candidate.engine, dtype=candidate.dtype, network=network, batch=batch
            )
            yield dict(what=baseline.name, **where, **row)
        del baseline
        gc.collect()  # graphs and compiled code hold memory
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _candidates(bench: Bench, unet: UNet, batches: tuple[int, ...]) -> Iterator[Candidate]:
    """Baselines run at most 256 images, from which on they gain nothing, and torch.compile one batch size."""
    workloads = {dtype: Workload(Checkpoint(unet, SCHEDULE), dtype) for dtype in bench.dtypes}
    few = tuple(batch for batch in batches if batch <= 256)
    for dtype, workload in workloads.items():
        yield Candidate(
            "ddpm_fast",
            dtype,
            partial(DdpmFast, workload, "fused"),
            batches if dtype == "fp8" else few,
        )
    bf16 = workloads["bf16"]
    yield Candidate("plain PyTorch", "bf16", partial(Plain, bf16), few)
    yield Candidate("diffusers", "bf16", partial(Diffusers, bf16), few)
    if not bench.tiny:  # compiling takes half a minute per batch size: last, in case time runs out
        yield Candidate("torch.compile", "bf16", partial(Plain, bf16, True), (max(few),))


def _loop(bench: Bench, baseline: Baseline, unet: UNet, batch: int, tolerance: float) -> Row:
    """Checks and times one loop."""
    error = _error(bench, baseline, unet, batch)
    if not error < tolerance:
        return dict(error=error, failed=True, summary="wrong: not timed")
    steps = 2 if bench.tiny else 100 if batch == 1 else 20
    if isinstance(baseline, DdpmFast):
        baseline.release()
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    baseline.loop(batch, 16 if not bench.tiny else 1)
    timing = bench.measure(partial(baseline.loop, batch, steps))
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None
    per_step = timing.median / steps
    return dict(
        ms_per_step=1e3 * per_step,
        spread=timing.spread,
        image_steps_per_s=batch / per_step,
        peak_gib=memory,
        error=error,
    )


@torch.no_grad()
def _error(bench: Bench, baseline: Baseline, unet: UNet, batch: int) -> float:
    """Relative error of a forward pass against fp32, on a few of the images."""
    c, few = unet.config, slice(0, 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, c.in_channels, *(c.size or (32, 32)), generator=generator).to(
        bench.device
    )
    x = x.contiguous(
        memory_format=torch.channels_last
    )  # as in the loops: another layout is compiled again
    t = torch.arange(batch, device=bench.device) * 37 % 1000
    return relative_error(baseline.forward(x, t)[few], unet(x[few], t[few]))


def _shipped(bench: Bench) -> Iterator[Row]:
    """The shipped weights by DDIM: images per second, if safetensors is installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        yield dict(what="shipped weights", summary="left out: safetensors is not installed")
        return
    count, steps = (2, 2) if bench.tiny else (256, 50)
    for dtype in ("fp32", "bf16"):
        sampler = Sampler.from_pretrained(
            ROOT / "weights" / "fashion-mnist-32", bench.device, dtype
        )
        sampler.sample(count, solver="ddim", steps=2, batch_size=count)
        timing = bench.measure(
            partial(sampler.sample, count, solver="ddim", steps=steps, batch_size=count)
        )
        rate = count / timing.median
        yield dict(
            what="shipped weights, ddim",
            engine=sampler.engine.name,
            dtype=dtype,
            batch=count,
            steps=steps,
            images_per_s=rate,
        )
