"""The network's part of `bench.gpu`: self-check, batch invariance, every kind of launch beside plain PyTorch, the forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.networks import NETWORKS
from ddpm_fast import UNet, UNetConfig
from ddpm_fast.fused_unet import FusedUNet
from ddpm_fast.plan import Launch
from ddpm_fast.roofline import GPUS, estimate
from ddpm_fast.self_check import FORWARD
from ddpm_fast.testing import relative_error
from ddpm_fast.unet import channels_last
from ddpm_fast.verdicts import verdicts

if TYPE_CHECKING:
    from bench.gpu import Bench

Row = dict[str, Any]
TINY_UNET = UNetConfig(sample_size=8, channels=(16, 32), layers=1, attention=(False, True), norm_groups=8)


def network_of(bench: Bench, name: str = "cifar10") -> UNet:
    torch.manual_seed(0)
    return UNet(TINY_UNET if bench.tiny else NETWORKS[name]).eval().requires_grad_(False).to(bench.device)


def inputs(bench: Bench, unet: UNet, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    c = unet.config
    x = torch.randn(batch, c.in_channels, *(c.size or (32, 32)), generator=generator).to(bench.device)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch, device=bench.device) % 1000


def dtypes(bench: Bench) -> list[str]:
    new = bench.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    return ["bf16", "fp8"] if new else ["bf16"]


def self_check(bench: Bench) -> list[Row]:
    """Every launch of the CIFAR-10 plans against its twin: how many passed, which did not, the seconds it took."""
    rows: list[Row] = []
    unet = network_of(bench)
    for dtype in dtypes(bench):
        for batch in (2,) if bench.tiny else (1, 256):
            if bench.late():
                return [*rows, dict(what="self-check", failed=True, summary="out of time")]
            fused = FusedUNet(unet, batch, dtype, check=False)
            if fused.plan().twins:  # no kernels here to be checked
                rows.append(dict(what="self-check", dtype=dtype, batch=batch, launches=len(fused.plan()), summary="twins only"))
                continue
            began = time.monotonic()
            found = verdicts(fused.subject(fused.size, fused.plan()))
            wrong = {k: v.reason for k, v in found.items() if not v.passed}
            rows.append(
                dict(
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
            )
    return rows


def invariance(bench: Bench) -> list[Row]:
    """Is an image the same to the bit in batches of every size, in the first place and the last?"""
    unet = network_of(bench)
    rows: list[Row] = []
    sizes = (1, 3) if bench.tiny else (1, 3, 64, 256)
    for dtype in dtypes(bench):
        x, t = inputs(bench, unet, sizes[-1])
        want = FusedUNet(unet, sizes[-1], dtype, check=False)(x, t)
        for batch in sizes[:-1]:
            fused = FusedUNet(unet, batch, dtype, check=False)
            same = all(torch.equal(fused(x[i : i + batch], t[i : i + batch]), want[i : i + batch]) for i in (0, sizes[-1] - batch))
            # twins are libraries, which choose by batch size: no promise there
            rows.append(dict(what="invariance", dtype=dtype, batch=batch, same=same, failed=not same and fused.invariant))
    return rows


def launches(bench: Bench) -> list[Row]:
    """Each distinct launch of the CIFAR-10 plan at batch 256, by its kernel and by plain PyTorch in the same precision."""
    batch = 2 if bench.tiny else 256
    rows: list[Row] = []
    for dtype in dtypes(bench):
        unet = network_of(bench)
        plan = FusedUNet(unet, batch, dtype).load(*inputs(bench, unet, batch))
        plan.run()
        for launch, count in _distinct(list(plan)):
            if bench.late():
                return [*rows, dict(what="launch", failed=True, summary="out of time")]
            arguments = plan.arguments(launch)
            plain = bench.clock(partial(launch.op.twin, **arguments, compute=None), captured=True)
            ours = plain if launch.name in plan.twins else bench.clock(partial(launch.op.run, **arguments), captured=True)
            e = estimate(launch, GPUS["h100"])
            rows.append(
                dict(
                    what=launch.op.name,
                    dtype=dtype,
                    first=launch.name,
                    times=count,
                    us=1e6 * ours.median,
                    plain_us=1e6 * plain.median,
                    predicted_us=1e6 * e.predicted,
                    tflops=e.flops / ours.median / 1e12 if e.flops else None,
                    tb_per_s=e.bytes / ours.median / 1e12,
                    by="twin" if launch.name in plan.twins else "kernel",
                )
            )
    return rows


def _distinct(plan: list[Launch]) -> Iterator[tuple[Launch, int]]:
    seen: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in plan:
        shapes = tuple((k, b.height, b.width, b.channels, b.bordered, b.dtype) for k, b in launch.buffers.items())
        seen.setdefault((launch.op.name, shapes), []).append(launch)
    for group in seen.values():
        yield group[0], len(group)


def forward(bench: Bench) -> list[Row]:
    """FusedUNet's plan as one CUDA graph, beside channels-last bf16 eagerly and by torch.compile(reduce-overhead)."""
    unet = network_of(bench)
    half = channels_last(UNet(unet.config).eval().requires_grad_(False).to(bench.device, torch.bfloat16))
    half.load_state_dict(unet.state_dict())
    compiled = None if bench.tiny else torch.compile(half, mode="reduce-overhead")
    rows: list[Row] = []
    for batch in (2,) if bench.tiny else (1, 16, 256):
        x, t = inputs(bench, unet, batch)
        exact = unet(x, t)
        peers = {"bf16 channels-last": half} | ({} if compiled is None else {"torch.compile": compiled})
        for name, model in peers.items():
            if bench.late():
                return [*rows, dict(what="network", failed=True, summary="out of time")]
            with torch.no_grad():
                error = relative_error(model(x, t), exact)
                timing = bench.clock(partial(model, x, t))
            rows.append(_forward_row(name, batch, timing.median, error, error < 0.05))
        for dtype in dtypes(bench):
            fused = FusedUNet(unet, batch, dtype)
            error = relative_error(fused(x, t), exact)
            timing = bench.clock(fused.load(x, t).run, captured=True)
            row = _forward_row(f"FusedUNet {dtype}", batch, timing.median, error, error < (0.15 if dtype == "fp8" else 0.05))
            rows.append(row | dict(twins=len(fused.plan().twins), launches=len(fused.plan())))
    return rows


def _forward_row(name: str, batch: int, seconds: float, error: float, right: bool) -> Row:
    if not right:
        return dict(what=name, batch=batch, error=error, failed=True, summary="wrong: not timed")
    return dict(what=name, batch=batch, ms=1e3 * seconds, image_steps_per_s=batch / seconds, error=error)
