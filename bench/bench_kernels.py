"""Each kernel beside plain PyTorch and torch.compile: bytes or FLOP a second, and the share of the ceiling measured beside it.

On a CPU the elementwise operations run by their references, and the network's kernels not at all: its native instructions are timed
by `ddpm-fast bench`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from bench.elementwise import ALLOWED, CACHE, DTYPES, LAYOUTS, SHAPES, Case, Elementwise
from bench.networks import NETWORKS, TINY_UNET
from ddpm_fast import UNet
from ddpm_fast.benchmark.kernels import distinct
from ddpm_fast.engines.fused.plan import Launch, Plan
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.testing import relative_error

KERNELS = ("noise", "q_sample", "ddpm_step", "ddpm_step, history", "noise_mse", "noise_mse gradient")
PLAIN = ("q_sample", "ddpm_step", "noise_mse")
CASES = [*KERNELS, *(f"{name}, {how}" for name in PLAIN for how in ("plain PyTorch", "torch.compile"))]


@cache
def tensors(shape: tuple[int, ...], layout: str, dtype: str, device: str) -> Elementwise:
    tensors.cache_clear()  # one at a time: they fill gigabytes
    return Elementwise(shape, LAYOUTS[layout], DTYPES[dtype], torch.device(device))


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_elementwise(shape, layout, dtype, name, timed, device, tiny, ceilings, benchmark):
    real = SHAPES[shape] if device.type == "cuda" else (64, *SHAPES[shape][1:])
    if tiny and "torch.compile" in name:
        pytest.skip("compiling takes half a minute")
    on = tensors((2, 3, 8, 8) if tiny else real, layout, dtype, str(device))
    case: Case = {c.name: c for c in (*on.cases(), *on.compiled())}[name]
    ours = name in KERNELS
    how = ("kernel" if device.type == "cuda" else "reference") if ours else name.split(", ")[-1]
    # operands come from memory, since sets of them take turns; what is written goes where the allocator says
    seconds = timed(case.call, on.error if ours else 0.0, ALLOWED, by=how, bytes=case.bytes, sets=on.sets)
    small = case.bytes < CACHE
    benchmark.extra_info.update(
        gb_per_s=case.bytes / seconds / 1e9, share_of_copy=case.bytes / seconds / ceilings["copy"], output_may_stay_in_cache=small
    )


@cache
def plan_of(dtype: str, tiny: bool, device: str) -> Plan:
    """Of the CIFAR-10 network, loaded and run once."""
    torch.manual_seed(0)
    unet = UNet(TINY_UNET if tiny else NETWORKS["cifar10"]).eval().requires_grad_(False).to(device)
    c, batch = unet.config, 2 if tiny else 256
    x = torch.randn(batch, c.in_channels, *(c.size or (32, 32)), device=device).contiguous(memory_format=torch.channels_last)
    plan = FusedUNet(unet, batch, dtype, check=False).load(x, torch.arange(batch, device=device) % 1000)
    plan.run()
    return plan


KINDS = ("conv1x1", "conv3x3", "conv_downsample", "conv_in", "conv_upsample", "folded_attention", "group_norm_silu")


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("how", ["kernel", "plain PyTorch"])
@pytest.mark.parametrize("kind", KINDS)
def test_network(kind, how, dtype, timed, device, tiny, ceilings, benchmark):
    """The kind's launch that takes most of a forward pass, by its kernel and by PyTorch on the same buffers."""
    if device.type == "cpu" and (how == "kernel" or dtype == "fp8"):
        pytest.skip("the network's kernels run on a GPU; here stands plain PyTorch alone")
    if dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    plan = plan_of(dtype, tiny, str(device))
    mine = [(launch, times) for launch, times in distinct(list(plan)) if launch.op.name == kind]
    if not mine:
        pytest.skip(f"no {kind} in this network")
    launch = max(mine, key=lambda found: found[1] * max(found[0].cost()))[0]
    flops, moved = launch.cost()
    call = partial(launch.op.fallback, **plan.arguments(launch), compute=None) if how != "kernel" else partial(plan.run_one, launch)
    error, allowed = (0.0, 0.0) if how != "kernel" else (_apart(plan, launch), 0.02)
    seconds = timed(call, error, allowed, launch=launch.name, dtype=dtype, flops=flops, bytes=moved)
    info: dict[str, Any] = dict(gb_per_s=moved / seconds / 1e9, share_of_copy=moved / seconds / ceilings["copy"])
    if flops and dtype in ceilings:
        info |= dict(tflops=flops / seconds / 1e12, share_of_matmul=flops / seconds / ceilings[dtype])
    # its operands come from the launch before it, in the network as here: where they fit, out of the second-level cache
    benchmark.extra_info.update(**info, operands_fit_into_cache=moved < CACHE)


def _apart(plan: Plan, launch: Launch) -> float:
    """Of the kernel's output from its fallback's."""
    out = plan.maps[launch.out].pixels
    plan.run_one(launch)
    ours = out.float().clone()
    launch.op.fallback(**plan.arguments(launch), compute=torch.float32)
    return relative_error(ours, out.float())
