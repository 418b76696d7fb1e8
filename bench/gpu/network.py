"""Parts of `bench.gpu` on the network: self-check, batch invariance, launches, forward passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.context import Bench
from ddpm_fast.benchmark.check import TOLERANCES, ReferenceCheck
from ddpm_fast.benchmark.kernels import launches as timed_launches
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.engines.fused.checks import FORWARD
from ddpm_fast.engines.fused.roofline import GPUS, estimate
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.engines.fused.verification import verify


def self_check(bench: Bench) -> Iterator[Row]:
    """Every launch of the CIFAR-10 plans against its fallback: failures, and the time it takes."""
    unet = bench.checkpoint().unet
    for dtype in bench.dtypes:
        for batch in (2,) if bench.tiny else (1, 256):
            fused = FusedUNet(unet, batch, dtype, check=False)
            launches = len(fused.plan())
            row = dict(what="self-check", dtype=dtype, batch=batch, launches=launches)
            if fused.plan().fallbacks:  # no kernels on this device
                yield row | dict(summary="fallbacks only")
                continue
            start = time.monotonic()
            results = verify(fused.spec())
            wrong = {k: v.reason for k, v in results.items() if not v.passed}
            yield row | dict(
                failed=bool(wrong),
                wrong=wrong,
                seconds=time.monotonic() - start,
                error=results[FORWARD].error,
                allowed=results[FORWARD].allowed,
            )


def invariance(bench: Bench) -> Iterator[Row]:
    """Bit-equality of an image in batches of every size, at the first and the last position."""
    workload = bench.workload()
    sizes = (1, 3) if bench.tiny else (1, 3, 64, 256)
    x, t = workload.inputs(sizes[-1])
    for dtype in bench.dtypes:
        expected = FusedUNet(workload.unet, sizes[-1], dtype, check=False)(x, t)
        for batch in sizes[:-1]:
            fused = FusedUNet(workload.unet, batch, dtype, check=False)
            same = all(
                torch.equal(fused(x[i : i + batch], t[i : i + batch]), expected[i : i + batch])
                for i in (0, sizes[-1] - batch)
            )
            # fallbacks call libraries, whose algorithm depends on the batch size
            failed = not same and fused.invariant
            yield dict(what="invariance", dtype=dtype, batch=batch, same=same, failed=failed)


def launches(bench: Bench) -> Iterator[Row]:
    """Each distinct launch of the CIFAR-10 plan at batch 256: its kernel, and plain PyTorch."""
    batch, workload = 2 if bench.tiny else 256, bench.workload()
    timer = partial(bench.measure, captured=True)
    for dtype in bench.dtypes:
        plan = FusedUNet(workload.unet, batch, dtype).load(*workload.inputs(batch))
        plan.run()
        for launch, point in timed_launches(plan, batch, timer):
            seconds = point["seconds"]
            plain = timer(partial(launch.op.fallback, **plan.arguments(launch), compute=None))
            predicted = estimate(launch, GPUS["h100"]).predicted
            yield dict(
                what=point["what"],
                dtype=dtype,
                first=point["first"],
                times=point["times"],
                us=1e6 * seconds,
                plain_us=1e6 * plain.median,
                predicted_us=1e6 * predicted,
                tflops=point["flops"] / seconds / 1e12 if point["flops"] else None,
                tb_per_s=point["bytes"] / seconds / 1e12,
                by="fallback" if launch.name in plan.fallbacks else "kernel",
            )


def forward(bench: Bench) -> Iterator[Row]:
    """Forms of FusedUNet as one CUDA graph; the part `sampling` times the baselines."""
    workload = bench.workload()
    check = ReferenceCheck(workload)
    for batch in (2,) if bench.tiny else (1, 16, 256):
        inputs = workload.inputs(batch)
        for name, options in _forms(bench, batch):
            fused = FusedUNet(workload.unet, batch, **options)
            error = check.error_of(fused(*inputs), batch)
            row = dict(what=f"FusedUNet {name}", batch=batch, error=error)
            if not error <= TOLERANCES[options["dtype"]]:
                yield row | dict(failed=True, summary="wrong: not timed")
                continue
            plan = fused.load(*inputs)
            seconds = bench.measure(plan.run, captured=True).median
            yield row | dict(
                ms=1e3 * seconds,
                image_steps_per_s=batch / seconds,
                fallbacks=len(plan.fallbacks),
                launches=len(plan),
            )


def _forms(bench: Bench, batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forms in use, then candidates: unbounded sums in e4m3, overlapped launches of few images."""
    for dtype in bench.dtypes:
        yield dtype, dict(dtype=dtype)
    if "fp8" in bench.dtypes:
        if batch > 1:
            yield "fp8 unbounded", dict(dtype="fp8", accumulation="unbounded", check=False)
        else:
            yield "bf16 overlapped", dict(dtype="bf16", overlap=True, check=False)
