"""The network's part of `bench.gpu`: self-check, batch invariance, every kind of launch beside plain PyTorch, the forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.networks import NETWORKS, TINY_UNET
from ddpm_fast import NoiseSchedule, UNet
from ddpm_fast.benchmark.baselines import Diffusers, Missing, Plain, Subject
from ddpm_fast.benchmark.kernels import distinct
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.engines.fused.checks import FORWARD
from ddpm_fast.engines.fused.roofline import GPUS, estimate
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.engines.fused.verification import verify
from ddpm_fast.testing import relative_error

if TYPE_CHECKING:
    from bench.gpu import Bench


def network_of(bench: Bench, name: str = "cifar10") -> UNet:
    torch.manual_seed(0)
    return UNet(TINY_UNET if bench.tiny else NETWORKS[name]).eval().requires_grad_(False).to(bench.device)


def inputs(bench: Bench, unet: UNet, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    c = unet.config
    x = torch.randn(batch, c.in_channels, *(c.size or (32, 32)), generator=generator).to(bench.device)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch, device=bench.device) % 1000


def self_check(bench: Bench) -> Iterator[Row]:
    """Every launch of the CIFAR-10 plans against its fallback: how many passed, which did not, the seconds it took."""
    unet = network_of(bench)
    for dtype in bench.dtypes:
        for batch in (2,) if bench.tiny else (1, 256):
            fused = FusedUNet(unet, batch, dtype, check=False)
            if fused.plan().fallbacks:  # no kernels here to be checked
                yield dict(what="self-check", dtype=dtype, batch=batch, launches=len(fused.plan()), summary="fallbacks only")
                continue
            began = time.monotonic()
            found = verify(fused.spec())
            wrong = {k: v.reason for k, v in found.items() if not v.passed}
            yield dict(
                what="self-check",
                dtype=dtype,
                batch=batch,
                launches=len(found),
                failed=bool(wrong),
                wrong=wrong,
                seconds=time.monotonic() - began,
                error=found[FORWARD].error,
                allowed=found[FORWARD].allowed,
            )


def invariance(bench: Bench) -> Iterator[Row]:
    """Is an image the same to the bit in batches of every size, in the first place and the last?"""
    unet = network_of(bench)
    sizes = (1, 3) if bench.tiny else (1, 3, 64, 256)
    for dtype in bench.dtypes:
        x, t = inputs(bench, unet, sizes[-1])
        want = FusedUNet(unet, sizes[-1], dtype, check=False)(x, t)
        for batch in sizes[:-1]:
            fused = FusedUNet(unet, batch, dtype, check=False)
            same = all(torch.equal(fused(x[i : i + batch], t[i : i + batch]), want[i : i + batch]) for i in (0, sizes[-1] - batch))
            # fallbacks are libraries, which choose by batch size: no promise there
            yield dict(what="invariance", dtype=dtype, batch=batch, same=same, failed=not same and fused.invariant)


def launches(bench: Bench) -> Iterator[Row]:
    """Each distinct launch of the CIFAR-10 plan at batch 256, by its kernel and by plain PyTorch in the same precision."""
    batch = 2 if bench.tiny else 256
    for dtype in bench.dtypes:
        unet = network_of(bench)
        plan = FusedUNet(unet, batch, dtype).load(*inputs(bench, unet, batch))
        plan.run()
        for launch, count in distinct(list(plan)):
            arguments = plan.arguments(launch)
            plain = bench.clock(partial(launch.op.fallback, **arguments, compute=None), captured=True)
            ours = plain if launch.name in plan.fallbacks else bench.clock(partial(launch.op.run, **arguments), captured=True)
            e = estimate(launch, GPUS["h100"])
            yield dict(
                what=launch.op.name,
                dtype=dtype,
                first=launch.name,
                times=count,
                us=1e6 * ours.median,
                plain_us=1e6 * plain.median,
                predicted_us=1e6 * e.predicted,
                tflops=e.flops / ours.median / 1e12 if e.flops else None,
                tb_per_s=e.bytes / ours.median / 1e12,
                by="fallback" if launch.name in plan.fallbacks else "kernel",
            )


def forward(bench: Bench) -> Iterator[Row]:
    """FusedUNet's plan as one CUDA graph, beside the reference in fp32, channels-last bf16, diffusers and torch.compile."""
    unet = network_of(bench)
    subject = Subject(Checkpoint(unet, NoiseSchedule.linear()), "bf16")
    baselines: list[Any] = [Plain(subject)]
    try:
        baselines.append(Diffusers(subject))
    except Missing as missing:
        yield dict(what="diffusers", summary=f"left out: {missing}")
    if not bench.tiny:
        baselines.append(Plain(subject, compiled=True))
    for batch in (2,) if bench.tiny else (1, 16, 256):
        x, t = inputs(bench, unet, batch)
        with torch.no_grad():
            exact = unet(x, t)
            yield _forward_row("reference fp32", batch, bench.clock(partial(unet, x, t)).median, 0.0, True)
        for baseline in baselines:
            if "compile" in baseline.name and batch < 256:
                continue  # half a minute for each size
            error = relative_error(baseline.forward(x, t), exact)
            yield _forward_row(baseline.name, batch, bench.clock(partial(baseline.forward, x, t)).median, error, error < 0.05)
        for name, options in _forms(bench, batch):
            fused = FusedUNet(unet, batch, **options)
            error = relative_error(fused(x, t), exact)
            timing = bench.clock(fused.load(x, t).run, captured=True)
            row = _forward_row(f"FusedUNet {name}", batch, timing.median, error, error < (0.15 if "fp8" in name else 0.05))
            yield row | dict(fallbacks=len(fused.plan().fallbacks), launches=len(fused.plan()))


def _forms(bench: Bench, batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is in use; then what has to show that it is worth it: unbounded sums in e4m3, overlapped launches of few images."""
    for dtype in bench.dtypes:
        yield dtype, dict(dtype=dtype)
    if "fp8" in bench.dtypes:
        if batch > 1:
            yield "fp8 unbounded", dict(dtype="fp8", accumulation="unbounded", check=False)
        else:
            yield "bf16 overlapped", dict(dtype="bf16", overlap=True, check=False)


def _forward_row(name: str, batch: int, seconds: float, error: float, right: bool) -> Row:
    if not right:
        return dict(what=name, batch=batch, error=error, failed=True, summary="wrong: not timed")
    return dict(what=name, batch=batch, ms=1e3 * seconds, image_steps_per_s=batch / seconds, error=error)
