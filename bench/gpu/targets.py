"""Speed targets of the engine on an H100, and whether the results of `bench.gpu` reach them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ddpm_fast.benchmark.timer import Row


class Metric(Enum):
    COPY_SHARE = "share of the device's copy rate"
    SPEEDUP = "image-steps per second over those of torch.compile in bf16 in the same run"
    MS_PER_STEP = "milliseconds per step of the batch"
    RATE = "image-steps per second"


@dataclass(frozen=True)
class SpeedTarget:
    """One target: the engine must reach `bar` and should reach `goal`.

    `kernel` names the elementwise kernel of a COPY_SHARE; `network`, `batch` and `dtype` name the
    sampling loop of the other metrics.
    """

    what: str
    metric: Metric
    bar: float
    goal: float
    network: str = "cifar10"
    batch: int = 256
    dtype: str = "bf16"
    kernel: str = ""

    def meets(self, value: float, limit: float) -> bool:
        return value <= limit if self.metric is Metric.MS_PER_STEP else value >= limit

    def reached(self, value: float | None) -> str | None:
        """ "goal", "bar" or "neither"; None without a value."""
        if value is None:
            return None
        if self.meets(value, self.goal):
            return "goal"
        return "bar" if self.meets(value, self.bar) else "neither"

    def measured(self, parts: dict[str, Any]) -> float | None:
        """The value in the parts of a result; None if it was not measured."""
        if self.metric is Metric.COPY_SHARE:  # in fp32, of the best shape and layout
            rows = parts.get("kernels", {}).get("rows", [])
            case = (self.kernel, "float32")
            shares = [r["share_of_copy"] for r in rows if (r["what"], r.get("dtype")) == case]
            return max(filter(None, shares), default=None)
        rate = self._rate(parts, "ddpm_fast", self.dtype)
        if rate is None or self.metric is Metric.RATE:
            return rate
        if self.metric is Metric.MS_PER_STEP:
            return 1e3 * self.batch / rate
        compiled = self._rate(parts, "torch.compile", "bf16")
        return rate / compiled if compiled else None

    def _rate(self, parts: dict[str, Any], engine: str, dtype: str) -> float | None:
        """Image-steps per second; of the last rows, which torch.compile shares with ddpm_fast."""
        case = dict(engine=engine, dtype=dtype, network=self.network, batch=self.batch)
        rates = [
            row["image_steps_per_s"]
            for part in ("celebahq256", "sampling")
            for row in parts.get(part, {}).get("rows", [])
            if "image_steps_per_s" in row and case.items() <= row.items()
        ]
        return rates[-1] if rates else None


TARGETS = (
    SpeedTarget(
        "q_sample, fp32: share of the copy rate", Metric.COPY_SHARE, 0.70, 0.70, kernel="q_sample"
    ),
    SpeedTarget(
        "ddpm_step, fp32: share of the copy rate", Metric.COPY_SHARE, 0.85, 0.85, kernel="ddpm_step"
    ),
    SpeedTarget(
        "CelebA-HQ 256, batch 16, bf16: speedup over torch.compile",
        Metric.SPEEDUP,
        1.6,
        2.0,
        "celebahq256",
        16,
    ),
    SpeedTarget("CIFAR-10, batch 1, bf16: ms per step", Metric.MS_PER_STEP, 0.6, 0.5, batch=1),
    SpeedTarget(
        "CIFAR-10, batch 1024, fp8: image-steps per second",
        Metric.RATE,
        45_000,
        60_000,
        batch=1024,
        dtype="fp8",
    ),
    SpeedTarget(
        "CIFAR-10, batch 256, fp8: speedup over torch.compile bf16",
        Metric.SPEEDUP,
        2.2,
        2.7,
        dtype="fp8",
    ),
    SpeedTarget("CIFAR-10, batch 256, bf16: speedup over torch.compile", Metric.SPEEDUP, 1.7, 2.0),
)


def compare_with_targets(parts: dict[str, Any]) -> list[Row]:
    """A row per target, with a line for the terminal."""
    rows = []
    for target in TARGETS:
        value = target.measured(parts)
        reached = target.reached(value)
        shown = "not measured" if value is None else f"{value:,.4g}"
        limits = f"bar {target.bar:g}, goal {target.goal:g}: {reached or 'unknown'}"
        line = f"{target.what:52} {shown:>12}   {limits}"
        row = dict(what=target.what, value=value, bar=target.bar, goal=target.goal)
        rows.append(row | dict(reached=reached, line=line))
    return rows
