"""Parts of `bench.gpu` on the network: self-check, batch invariance, every kind of launch, the forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.context import Bench
from ddpm_fast import NoiseSchedule
from ddpm_fast.benchmark.baselines import Diffusers, Plain
from ddpm_fast.benchmark.kernels import distinct
from ddpm_fast.benchmark.runner import TOLERANCES
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.benchmark.workload import Unavailable, Workload
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.engines.fused.checks import FORWARD
from ddpm_fast.engines.fused.roofline import GPUS, estimate
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.engines.fused.verification import verify
from ddpm_fast.utils.numerics import relative_error


def self_check(bench: Bench) -> Iterator[Row]:
    """Every launch of the CIFAR-10 plans against its fallback: which failed, and the time of the check."""
    unet = bench.network()
    for dtype in bench.dtypes:
        for batch in (2,) if bench.tiny else (1, 256):
            fused = FusedUNet(unet, batch, dtype, check=False)
            if fused.plan().fallbacks:  # no kernels on this device
                yield dict(
                    what="self-check",
                    dtype=dtype,
                    batch=batch,
                    launches=len(fused.plan()),
                    summary="fallbacks only",
                )
                continue
            start = time.monotonic()
            results = verify(fused.spec())
            wrong = {k: v.reason for k, v in results.items() if not v.passed}
            yield dict(
                what="self-check",
                dtype=dtype,
                batch=batch,
                launches=len(results),
                failed=bool(wrong),
                wrong=wrong,
                seconds=time.monotonic() - start,
                error=results[FORWARD].error,
                allowed=results[FORWARD].allowed,
            )


def invariance(bench: Bench) -> Iterator[Row]:
    """Bit-equality of an image in batches of every size, at the first and the last position."""
    unet = bench.network()
    sizes = (1, 3) if bench.tiny else (1, 3, 64, 256)
    for dtype in bench.dtypes:
        x, t = bench.inputs(unet, sizes[-1])
        expected = FusedUNet(unet, sizes[-1], dtype, check=False)(x, t)
        for batch in sizes[:-1]:
            fused = FusedUNet(unet, batch, dtype, check=False)
            same = all(
                torch.equal(fused(x[i : i + batch], t[i : i + batch]), expected[i : i + batch])
                for i in (0, sizes[-1] - batch)
            )
            # fallbacks call libraries, whose algorithm depends on the batch size
            yield dict(
                what="invariance",
                dtype=dtype,
                batch=batch,
                same=same,
                failed=not same and fused.invariant,
            )


def launches(bench: Bench) -> Iterator[Row]:
    """Each distinct launch of the CIFAR-10 plan at batch 256: its kernel, and plain PyTorch in the same precision."""
    batch = 2 if bench.tiny else 256
    for dtype in bench.dtypes:
        unet = bench.network()
        plan = FusedUNet(unet, batch, dtype).load(*bench.inputs(unet, batch))
        plan.run()
        for launch, count in distinct(list(plan)):
            arguments = plan.arguments(launch)
            plain = bench.measure(
                partial(launch.op.fallback, **arguments, compute=None), captured=True
            )
            kernel = (
                plain
                if launch.name in plan.fallbacks
                else bench.measure(partial(launch.op.run, **arguments), captured=True)
            )
            e = estimate(launch, GPUS["h100"])
            yield dict(
                what=launch.op.name,
                dtype=dtype,
                first=launch.name,
                times=count,
                us=1e6 * kernel.median,
                plain_us=1e6 * plain.median,
                predicted_us=1e6 * e.predicted,
                tflops=e.flops / kernel.median / 1e12 if e.flops else None,
                tb_per_s=e.bytes / kernel.median / 1e12,
                by="fallback" if launch.name in plan.fallbacks else "kernel",
            )


def forward(bench: Bench) -> Iterator[Row]:
    """FusedUNet's plan as one CUDA graph, the reference in fp32, channels-last bf16, diffusers and torch.compile."""
    unet = bench.network()
    workload = Workload(Checkpoint(unet, NoiseSchedule.linear()), "bf16")
    baselines: list[Any] = [Plain(workload)]
    try:
        baselines.append(Diffusers(workload))
    except Unavailable as reason:
        yield dict(what="diffusers", summary=f"left out: {reason}")
    compiled = None if bench.tiny else Plain(workload, compiled=True)
    for batch in (2,) if bench.tiny else (1, 16, 256):
        x, t = bench.inputs(unet, batch)
        with torch.no_grad():
            exact = unet(x, t)
            yield _forward_row(
                "reference fp32", batch, bench.measure(partial(unet, x, t)).median, 0.0, 0.0
            )
        # torch.compile takes half a minute per batch size
        for baseline in [*baselines, compiled] if compiled and batch == 256 else baselines:
            error = relative_error(baseline.forward(x, t), exact)
            seconds = bench.measure(partial(baseline.forward, x, t)).median
            yield _forward_row(baseline.name, batch, seconds, error, TOLERANCES["bf16"])
        for name, options in _forms(bench, batch):
            fused = FusedUNet(unet, batch, **options)
            error = relative_error(fused(x, t), exact)
            seconds = bench.measure(fused.load(x, t).run, captured=True).median
            row = _forward_row(
                f"FusedUNet {name}", batch, seconds, error, TOLERANCES[options["dtype"]]
            )
            yield row | dict(fallbacks=len(fused.plan().fallbacks), launches=len(fused.plan()))


def _forms(bench: Bench, batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The forms in use; then those that are candidates: unbounded sums in e4m3, overlapped launches of few images."""
    for dtype in bench.dtypes:
        yield dtype, dict(dtype=dtype)
    if "fp8" in bench.dtypes:
        if batch > 1:
            yield "fp8 unbounded", dict(dtype="fp8", accumulation="unbounded", check=False)
        else:
            yield "bf16 overlapped", dict(dtype="bf16", overlap=True, check=False)


def _forward_row(name: str, batch: int, seconds: float, error: float, tolerance: float) -> Row:
    if not error <= tolerance:
        return dict(what=name, batch=batch, error=error, failed=True, summary="wrong: not timed")
    return dict(
        what=name, batch=batch, ms=1e3 * seconds, image_steps_per_s=batch / seconds, error=error
    )
