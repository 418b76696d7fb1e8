"""Roofline of a plan on a GPU: no launch is faster than its arithmetic at the chip's peak rate, or
its bytes at the memory's bandwidth.

`floor` is that bound per launch. `predicted` is the expected time of the kernels, from rates that
were measured on an H100: whole rounds of tiles (the last one may be half empty) with their
borders and padding, at the rate of the flat convolution, and of tiles smaller than its own as fast
as that convolution was fed; bytes at the rate of a device copy; and a gap between launches in a
CUDA graph. It is a prediction until it has been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...kernels._gemm import Target
from .plan import Launch


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, in FLOP/s and bytes/s.

    Attributes:
        half, fp8, bandwidth: Peaks of the data sheet, dense.
        product, product_fp8, copy: Sustained rates.
        measured: Whether the sustained rates were measured.
    """

    name: str
    target: Target
    half: float
    fp8: float
    bandwidth: float
    product: float
    product_fp8: float
    copy: float
    measured: bool = False

    @classmethod
    def scaled(cls, name: str, target: Target, half: float, fp8: float, bandwidth: float) -> Gpu:
        """A GPU without measurements: it sustains the same shares of its peaks as the H100."""
        h = GPUS["h100"]
        return cls(
            name,
            target,
            half,
            fp8,
            bandwidth,
            half * h.product / h.half,
            fp8 * h.product_fp8 / h.fp8,
            bandwidth * h.copy / h.bandwidth,
        )


# Sustained on the H100: by the flat convolution, border rows counted, 589 to 715 TFLOP/s in bf16,
# 991 to 1250 in fp8; a 4 GiB copy
GPUS = {
    "h100": Gpu(
        "H100 SXM",
        Target(90, 132),
        989.4e12,
        1978.9e12,
        3.35e12,
        620e12,
        1100e12,
        3.02e12,
        measured=True,
    )
}
GPUS["a100"] = Gpu.scaled("A100 SXM 80 GB", Target(80, 108), 312e12, 312e12, 2.04e12)
GPUS["h200"] = Gpu.scaled("H200", Target(90, 132), 989.4e12, 1978.9e12, 4.8e12)
GPUS["b200"] = Gpu.scaled("B200", Target(100, 148), 2250e12, 4500e12, 8.0e12)
FP32_SHARE = 1 / 16  # of the 16-bit tensor peak that plain fp32 multiply-adds reach
GAP = 1.5e-6  # seconds between launches of a graph: an assumption


@dataclass(frozen=True)
class Estimate:
    """Seconds; bound: what the floor is made of, "arithmetic" or "memory", or "launch" where the
    gap alone is longer.
    """

    flops: int
    bytes: int
    floor: float
    predicted: float
    bound: str


def estimate(launch: Launch, gpu: Gpu) -> Estimate:
    flops, moved = launch.cost()
    operand = next((b.dtype for b in launch.reads.values()), torch.float32)
    peak, rate = {
        1: (gpu.fp8, gpu.product_fp8),
        2: (gpu.half, gpu.product),
        4: (gpu.half * FP32_SHARE,) * 2,
    }[_operand_size(launch, operand)]
    arithmetic, memory = flops / peak, moved / gpu.bandwidth
    floor = max(arithmetic, memory)
    bound = "launch" if floor < GAP else "arithmetic" if arithmetic > memory else "memory"
    return Estimate(
        flops, moved, floor, max(_product(launch, gpu, rate), moved / gpu.copy) + GAP, bound
    )


def _operand_size(launch: Launch, operand: torch.dtype) -> int:
    weight = getattr(launch.op, "weight", None)
    return (operand if weight is None else weight.dtype).itemsize


def _product(launch: Launch, gpu: Gpu, rate: float) -> float:
    """Seconds of whole rounds of tiles, one tile on each processor; of what has no tiles, of the
    FLOP that count.
    """
    tiles = getattr(launch.op, "tiles", None)
    if tiles is None:
        return launch.cost()[0] / rate
    maps = {k: b.empty("meta") for k, b in launch.buffers.items()}
    weight = launch.op.weight  # type: ignore[attr-defined]
    rounds = math.ceil(launch.op.grid(**maps) / gpu.target.processors)  # type: ignore[attr-defined]
    arithmetic = 2 * tiles.block_m * tiles.block_n / (rate / gpu.target.processors)
    # the flat convolution's tiles, 128 by 128, multiply as fast as they are fed; smaller ones wait
    # for (block_m + block_n) operands a channel
    feed = 2 * 128 * 128 / (rate / gpu.target.processors) * (tiles.block_m + tiles.block_n) / 256
    return rounds * weight.shape[1] * max(arithmetic, feed)
