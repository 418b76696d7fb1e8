"""Roofline and predicted times of a plan on a GPU.

`floor` is the roofline of a launch: no launch is faster than its arithmetic at the GPU's peak rate
or its bytes at the memory's bandwidth. `predicted` is the expected time, from rates measured on an
H100. It counts whole rounds of tiles, with borders and padding, at the rate of the flat
convolution, or of its operands' traffic for smaller tiles; bytes at the rate of a device copy; and
a gap between launches in a CUDA graph. It is a prediction until it has been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...kernels._gemm import Target
from .plan import Launch, Plan


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, in FLOP/s and bytes/s.

    Attributes:
        half, fp8, bandwidth: Peaks from the data sheet, dense.
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
        """A GPU that is assumed to sustain the same shares of its peaks as the H100."""
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


# Sustained on the H100: the flat convolution, border rows counted, 589 to 715 TFLOP/s in bf16 and
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
FP32_SHARE = 1 / 16  # rate of plain fp32 multiply-adds as a share of the 16-bit tensor peak
GAP = 1.5e-6  # seconds between launches of a graph: an assumption


@dataclass(frozen=True)
class Estimate:
    """Times of a launch in seconds.

    Attributes:
        bound: What limits the floor: "arithmetic" or "memory", or "launch" if the gap is longer.
    """

    flops: int
    bytes: int
    floor: float
    predicted: float
    bound: str


@dataclass(frozen=True)
class StepPrediction:
    """Predicted reverse step of a whole batch, in seconds.

    Attributes:
        launches: Estimates of the launches of the forward pass, in order.
        parts: Time of the step by what bounds it: "gaps" between launches, "memory", "products".
    """

    launches: list[Estimate]
    parts: dict[str, float]

    @property
    def floor(self) -> float:
        """Lower bound of a forward pass."""
        return sum(e.floor for e in self.launches)

    @property
    def forward(self) -> float:
        """Predicted time of a forward pass."""
        return sum(e.predicted for e in self.launches)


def predict_step(plan: Plan, gpu: Gpu) -> StepPrediction:
    """Predicts a reverse step: the plan's forward pass, `ddpm_step` and the step counter."""
    estimates = [estimate(launch, gpu) for launch in plan]
    parts = {"gaps": 0.0, "memory": 0.0, "products": 0.0}
    for e in estimates:
        bound = "memory" if e.bytes / gpu.copy >= 0.999 * (e.predicted - GAP) else "products"
        parts["gaps"] += GAP
        parts[bound] += e.predicted - GAP
    elements = plan.x.images * plan.x.channels * plan.x.height * plan.x.width
    # ddpm_step reads x_t, the output and the previous x_0, and writes x_{t-1} and x_0
    parts["memory"] += elements * 20 / gpu.copy
    parts["gaps"] += 2 * GAP
    return StepPrediction(estimates, parts)


def estimate(launch: Launch, gpu: Gpu) -> Estimate:
    """Estimates the time of one launch."""
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
    """Seconds of whole rounds of tiles, one per processor; without tiles, of the FLOP."""
    tiles = getattr(launch.op, "tiles", None)
    if tiles is None:
        return launch.cost()[0] / rate
    maps = {k: b.empty("meta") for k, b in launch.buffers.items()}
    weight = launch.op.weight  # type: ignore[attr-defined]
    rounds = math.ceil(launch.op.grid(**maps) / gpu.target.processors)  # type: ignore[attr-defined]
    arithmetic = 2 * tiles.block_m * tiles.block_n / (rate / gpu.target.processors)
    # tiles of 128 by 128 load operands as fast as they multiply; smaller tiles wait for
    # block_m + block_n operands per channel
    feed = 2 * 128 * 128 / (rate / gpu.target.processors) * (tiles.block_m + tiles.block_n) / 256
    return rounds * weight.shape[1] * max(arithmetic, feed)
