"""Predicted steps on an H100, computed from plans and measured rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench.gpu.targets import Metric, SpeedTarget
from bench.report.committed import h100_loops, h100_steps
from bench.report.fits import Series
from bench.workloads import NETWORKS, scaled
from ddpm_fast import UNet, UNetConfig
from ddpm_fast.engines.fused import roofline
from ddpm_fast.engines.fused.plan import Plan
from ddpm_fast.engines.fused.unet import FusedUNet

H100 = roofline.GPUS["h100"]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SIZES = (16, 32, 64, 128, 256)  # at batch 16
CHANNELS = (64, 96, 128, 192, 256)  # of the first level, at batch 64


@dataclass(frozen=True)
class StepPrediction:
    """A step of the whole batch; times in milliseconds.

    Attributes:
        batch: Images.
        launches: Kernels of a forward pass.
        floor: A forward pass at the peaks of the chip.
        forward: A forward pass.
        parts: Milliseconds of a step by their bound: gaps between launches, memory, products.
        bytes: Memory of the weights, the arena and the state.
    """

    batch: int
    launches: int
    floor: float
    forward: float
    parts: dict[str, float]
    bytes: int

    @property
    def step(self) -> float:
        return sum(self.parts.values())

    @property
    def rate(self) -> float:
        """Image-steps per second."""
        return 1e3 * self.batch / self.step


def plan_of(config: UNetConfig, batch: int, dtype: str) -> tuple[UNet, Plan]:
    """A network and its plan for an H100, on the meta device."""
    with torch.device("meta"):
        unet = UNet(config)
    return unet, FusedUNet(unet, batch, dtype, "meta", check=False).plan()


@cache
def predict_step(config: UNetConfig, batch: int, dtype: str) -> StepPrediction:
    unet, plan = plan_of(config, batch, dtype)
    step = roofline.predict_step(plan, H100)
    elements = batch * plan.x.channels * plan.x.height * plan.x.width
    parameters = sum(p.numel() for p in unet.parameters())
    size = plan.arena.size + parameters * (1 if dtype == "fp8" else 2) + 5 * 4 * elements
    parts = {k: 1e3 * v for k, v in step.parts.items()}
    return StepPrediction(batch, len(plan), 1e3 * step.floor, 1e3 * step.forward, parts, size)


def predict(network: str, batch: int, dtype: str) -> StepPrediction:
    return predict_step(NETWORKS[network], batch, dtype)


def series(dtype: str) -> dict[str, Series]:
    """The CIFAR-10 network against batch, size and channels."""
    base = replace(NETWORKS["cifar10"], sample_size=32)
    return dict(
        batch=[_row(n, base, n, dtype) for n in BATCHES],
        size=[_row(n, replace(base, sample_size=n), 16, dtype) for n in SIZES],
        channels=[_row(n, scaled(base, n), 64, dtype) for n in CHANNELS],
    )


def _row(x: int, config: UNetConfig, batch: int, dtype: str) -> dict[str, object]:
    p = predict_step(config, batch, dtype)
    return dict(x=x, ms=p.step, bytes=p.bytes, parts=p.parts)


def compiled_ms(network: str, batch: int) -> float | None:
    """Measured step of torch.compile on an H100; None if this batch was not measured."""
    rows = [r for r in h100_loops(network) if (r["engine"], r["batch"]) == ("torch.compile", batch)]
    return rows[0]["step_ms"] if rows else None


def speedup(network: str, batch: int, dtype: str) -> float | None:
    """Predicted speedup over the measured torch.compile."""
    compiled = compiled_ms(network, batch)
    return None if compiled is None else compiled / predict(network, batch, dtype).step


def of_target(target: SpeedTarget) -> float | None:
    """Predicted value of a target; None for elementwise kernels (`bench.studies.predict`)."""
    case = target.network, target.batch, target.dtype
    values: dict[Metric, Callable[[], float | None]] = {
        Metric.COPY_SHARE: lambda: None,
        Metric.SPEEDUP: lambda: speedup(*case),
        Metric.MS_PER_STEP: lambda: predict(*case).step,
        Metric.RATE: lambda: predict(*case).rate,
    }
    return values[target.metric]()


def best_rates() -> list[tuple[str, float, str]]:
    """(engine, best image-steps per second on the CIFAR-10 network, "predicted" or "measured")"""
    rates = [
        (
            f"ddpm_fast {dtype}",
            max(predict("cifar10", batch, dtype).rate for batch in (256, 1024)),
            "predicted",
        )
        for dtype in ("fp8", "bf16")
    ]
    for engine, dtype in (("torch.compile", "bf16"), ("eager", "bf16"), ("eager", "fp32")):
        best = max(1e3 * batch / ms for batch, ms in h100_steps("cifar10", engine, dtype))
        rates.append((f"{engine} {dtype}", best, "measured"))
    return rates
