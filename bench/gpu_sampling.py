"""Whole sampling loops beside those that users would run: the last part of `bench.gpu`, and the one that matters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from bench.networks import NETWORKS, ROOT, TINY_UNET
from ddpm_fast import NoiseSchedule, Sampler, UNet
from ddpm_fast.benchmark.baselines import Baseline, Diffusers, Missing, Ours, Plain, Subject
from ddpm_fast.benchmark.runner import ALLOWED
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.testing import relative_error

if TYPE_CHECKING:
    from bench.gpu import Bench

SCHEDULE = NoiseSchedule.linear()


def celebahq256(bench: Bench) -> Iterator[Row]:
    """The 256x256 network, batch 16."""
    yield from _network(bench, "celebahq256", (16,))


def sampling(bench: Bench) -> Iterator[Row]:
    """The weights that ship, then the CIFAR-10 network: ms a step and img-steps/s, a thousandth of it images/s at T = 1000."""
    yield from _shipped(bench)
    yield from _network(bench, "cifar10", (1, 16, 256, 1024))


def _network(bench: Bench, network: str, batches: tuple[int, ...]) -> Iterator[Row]:
    torch.manual_seed(0)
    unet = UNet(TINY_UNET if bench.tiny else NETWORKS[network]).eval().requires_grad_(False).to(bench.device)
    for make in _baselines(bench, unet):
        try:
            baseline = make()
        except Missing as error:
            yield dict(what="sampling", network=network, summary=f"left out: {error}")
            continue
        yield from _loops(bench, baseline, unet, network, (2,) if bench.tiny else batches)
        del baseline
        gc.collect()  # graphs and compiled code hold memory
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _baselines(bench: Bench, unet: UNet) -> list[Callable[[], Baseline]]:
    subjects = {dtype: Subject(Checkpoint(unet, SCHEDULE), dtype) for dtype in bench.dtypes}
    baselines: list[Callable[[], Baseline]] = [partial(Ours, subject, "fused") for subject in subjects.values()]
    baselines += [partial(make, subjects["bf16"]) for make in (Plain, Diffusers)]
    if not bench.tiny:  # compiling takes half a minute: last, should time run out
        baselines.append(partial(Plain, subjects["bf16"], True))
    return baselines


def _loops(bench: Bench, baseline: Baseline, unet: UNet, network: str, batches: tuple[int, ...]) -> Iterator[Row]:
    for batch in batches:
        if (batch == 1024 and "fp8" not in baseline.name) or (
            "compile" in baseline.name and batch != max(b for b in batches if b < 1024)
        ):
            continue  # the others gain nothing from more images; compiling takes half a minute for each size
        error = _error(bench, baseline, unet, batch)
        if not error < ALLOWED[baseline.name.rsplit(" ", 1)[1]]:
            yield dict(what=baseline.name, network=network, batch=batch, error=error, failed=True, summary="wrong: not timed")
            continue
        steps = 2 if bench.tiny else 100 if batch == 1 else 20
        if isinstance(baseline, Ours):
            baseline.forget()
        if bench.device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        baseline.loop(batch, 16 if not bench.tiny else 1)
        timing = bench.clock(partial(baseline.loop, batch, steps))
        memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None
        per_step = timing.median / steps
        yield dict(
            what=baseline.name,
            network=network,
            batch=batch,
            ms_per_step=1e3 * per_step,
            spread=timing.spread,
            image_steps_per_s=batch / per_step,
            peak_gib=memory,
            error=error,
        )


@torch.no_grad()
def _error(bench: Bench, baseline: Baseline, unet: UNet, batch: int) -> float:
    """Of a forward pass against fp32, on a few of the images."""
    c, few = unet.config, slice(0, 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, c.in_channels, *(c.size or (32, 32)), generator=generator).to(bench.device)
    x = x.contiguous(memory_format=torch.channels_last)  # as the loops have it: else what is compiled is compiled twice
    t = torch.arange(batch, device=bench.device) * 37 % 1000
    return relative_error(baseline.forward(x, t)[few], unet(x[few], t[few]))


def _shipped(bench: Bench) -> Iterator[Row]:
    """The weights that ship, DDIM: whole images, if safetensors is there to read them."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        yield dict(what="shipped weights", summary="safetensors is not installed: left out")
        return
    count, steps = (2, 2) if bench.tiny else (256, 50)
    for dtype in ("fp32", "bf16"):
        sampler = Sampler.from_pretrained(ROOT / "weights" / "fashion-mnist-32", bench.device, dtype)
        sampler.sample(count, solver="ddim", steps=2, batch_size=count)
        timing = bench.clock(partial(sampler.sample, count, solver="ddim", steps=steps, batch_size=count))
        rate = count / timing.median
        yield dict(
            what="shipped weights, ddim", engine=sampler.engine.name, dtype=dtype, batch=count, steps=steps, images_per_s=rate
        )
