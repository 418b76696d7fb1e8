"""Kernels, plain PyTorch and torch.compile: bytes or FLOP per second, and share of the ceiling.

On a CPU the elementwise operations run their references, and the network's kernels do not run:
`ddpm-fast bench` times the instructions of the CPU engine.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from bench.elementwise import (
    CACHE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    TOLERANCE,
    Case,
    Elementwise,
    Implementation,
)
from bench.workloads import NETWORKS, TINY_UNET, random_checkpoint
from ddpm_fast.benchmark.kernels import distinct
from ddpm_fast.benchmark.workload import Workload
from ddpm_fast.engines.fused.plan import Launch, Plan
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.utils.numerics import relative_error

KERNELS = (
    "noise",
    "q_sample",
    "ddpm_step",
    "ddpm_step, history",
    "noise_mse",
    "noise_mse gradient",
)
BASELINES = ("q_sample", "ddpm_step", "noise_mse")
CASES = [(name, Implementation.KERNEL) for name in KERNELS]
CASES += [
    (name, by) for name in BASELINES for by in (Implementation.PLAIN, Implementation.COMPILED)
]


@cache
def tensors(shape: tuple[int, ...], layout: str, dtype: str, device: str) -> Elementwise:
    tensors.cache_clear()  # one at a time: they take gigabytes
    return Elementwise(shape, LAYOUTS[layout], DTYPES[dtype], torch.device(device))


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("operation", "by"), CASES, ids=lambda v: v.value if isinstance(v, Implementation) else v
)
def test_elementwise(shape, layout, dtype, operation, by, timed, device, tiny, ceilings, benchmark):
    real = SHAPES[shape] if device.type == "cuda" else (64, *SHAPES[shape][1:])
    if tiny and by is Implementation.COMPILED:
        pytest.skip("compiling takes half a minute")
    on = tensors((2, 3, 8, 8) if tiny else real, layout, dtype, str(device))
    case: Case = {(c.operation, c.by): c for c in (*on.cases(), *on.compiled())}[operation, by]
    is_kernel = by is Implementation.KERNEL
    code = "reference" if is_kernel and device.type == "cpu" else by.value
    # the cycle of operand sets exceeds the caches; outputs are placed by the allocator
    seconds = timed(
        case.call,
        on.error if is_kernel else 0.0,
        TOLERANCE,
        by=code,
        bytes=case.bytes,
        sets=on.sets,
    )
    small = case.bytes < CACHE
    benchmark.extra_info.update(
        gb_per_s=case.bytes / seconds / 1e9,
        share_of_copy=case.bytes / seconds / ceilings["copy"],
        output_may_stay_in_cache=small,
    )


@cache
def plan_of(dtype: str, tiny: bool, device: str) -> Plan:
    """Plan of the CIFAR-10 network, loaded and run once."""
    checkpoint = random_checkpoint(TINY_UNET if tiny else NETWORKS["cifar10"])
    unet, batch = checkpoint.unet.to(device), 2 if tiny else 256
    fused = FusedUNet(unet, batch, dtype, check=False)
    plan = fused.load(*Workload(checkpoint, dtype).inputs(batch))
    plan.run()
    return plan


KINDS = (
    "conv1x1",
    "conv3x3",
    "conv_downsample",
    "conv_in",
    "conv_upsample",
    "folded_attention",
    "group_norm_silu",
)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "by", [Implementation.KERNEL, Implementation.PLAIN], ids=lambda by: by.value
)
@pytest.mark.parametrize("kind", KINDS)
def test_network(kind, by, dtype, timed, device, tiny, ceilings, benchmark):
    """The largest launch of a kind: its kernel, and plain PyTorch on the same buffers."""
    if device.type == "cpu" and (by is Implementation.KERNEL or dtype == "fp8"):
        pytest.skip("the network's kernels run on a GPU; on a CPU only plain PyTorch is timed")
    if dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    plan = plan_of(dtype, tiny, str(device))
    candidates = [
        (launch, times) for launch, times in distinct(list(plan)) if launch.op.name == kind
    ]
    if not candidates:
        pytest.skip(f"no {kind} in this network")
    launch = max(candidates, key=lambda pair: pair[1] * max(pair[0].cost()))[0]
    flops, moved = launch.cost()
    if by is Implementation.KERNEL:
        call, error, tolerance = partial(plan.run_one, launch), _error(plan, launch), 0.02
    else:
        call, error, tolerance = (
            partial(launch.op.fallback, **plan.arguments(launch), compute=None),
            0.0,
            0.0,
        )
    seconds = timed(
        call, error, tolerance, launch=launch.name, dtype=dtype, flops=flops, bytes=moved
    )
    info: dict[str, Any] = dict(
        gb_per_s=moved / seconds / 1e9, share_of_copy=moved / seconds / ceilings["copy"]
    )
    if flops and dtype in ceilings:
        info |= dict(
            tflops=flops / seconds / 1e12, share_of_matmul=flops / seconds / ceilings[dtype]
        )
    # operands that fit come from the second-level cache, as in the network
    benchmark.extra_info.update(**info, operands_fit_into_cache=moved < CACHE)


def _error(plan: Plan, launch: Launch) -> float:
    """Relative error of the kernel's output against its fallback in fp32."""
    out = plan.maps[launch.out].pixels
    plan.run_one(launch)
    output = out.float().clone()
    launch.op.fallback(**plan.arguments(launch), compute=torch.float32)
    return relative_error(output, out.float())
