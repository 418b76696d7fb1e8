"""What the engine has to reach on an H100, and whether a run of `bench.gpu` says that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddpm_fast.benchmark.timer import Row

Find = Callable[[dict[str, Any]], float | None]


def _rate(parts: dict[str, Any], what: str, batch: int, network: str = "cifar10") -> float | None:
    rows = [r for part in ("celebahq256", "sampling") for r in parts.get(part, {}).get("rows", [])]
    found = [
        r for r in rows if (r["what"], r.get("network"), r.get("batch")) == (what, network, batch) and "image_steps_per_s" in r
    ]
    return found[0]["image_steps_per_s"] if found else None


def _faster(what: str, batch: int, network: str = "cifar10") -> Find:
    """Image-steps a second over those of torch.compile in the same run."""

    def find(parts: dict[str, Any]) -> float | None:
        ours, theirs = _rate(parts, what, batch, network), _rate(parts, "torch.compile bf16", batch, network)
        return ours / theirs if ours and theirs else None

    return find


def _milliseconds(parts: dict[str, Any]) -> float | None:
    rate = _rate(parts, "ddpm_fast fused bf16", 1)
    return 1e3 / rate if rate else None


def _share(kernel: str) -> Find:
    """Of the copy rate, in fp32, the better of the two layouts' larger images."""

    def find(parts: dict[str, Any]) -> float | None:
        rows = [r for r in parts.get("kernels", {}).get("rows", []) if r["what"] == kernel and r.get("dtype") == "float32"]
        shares = [r["share_of_copy"] for r in rows if r.get("share_of_copy")]
        return max(shares) if shares else None

    return find


# what, how it is found, the bar, the goal, and whether less is better
BARS: tuple[tuple[str, Find, float, float, bool], ...] = (
    ("q_sample, fp32: share of the copy rate", _share("q_sample"), 0.70, 0.70, False),
    ("ddpm_step, fp32: share of the copy rate", _share("ddpm_step"), 0.85, 0.85, False),
    ("CelebA-HQ 256, batch 16, bf16: times torch.compile", _faster("ddpm_fast fused bf16", 16, "celebahq256"), 1.6, 2.0, False),
    ("CIFAR-10, batch 1, bf16: ms a step", _milliseconds, 0.6, 0.5, True),
    ("CIFAR-10, batch 1024, fp8: img-steps/s", lambda parts: _rate(parts, "ddpm_fast fused fp8", 1024), 45_000, 60_000, False),
    ("CIFAR-10, batch 256, fp8: times torch.compile bf16", _faster("ddpm_fast fused fp8", 256), 2.2, 2.7, False),
    ("CIFAR-10, batch 256, bf16: times torch.compile", _faster("ddpm_fast fused bf16", 256), 1.7, 2.0, False),
)


def bars(parts: dict[str, Any]) -> list[Row]:
    """A row for each bar, and the line that is shown: measured, bar, goal."""
    rows = []
    for what, find, bar, goal, less in BARS:
        value = find(parts)
        reached = (
            None if value is None else "goal" if _meets(value, goal, less) else "bar" if _meets(value, bar, less) else "neither"
        )
        shown = "not measured" if value is None else f"{value:,.4g}"
        line = f"{what:52} {shown:>12}   bar {bar:g}, goal {goal:g}: {reached or 'unknown'}"
        rows.append(dict(what=what, value=value, bar=bar, goal=goal, reached=reached, line=line))
    return rows


def _meets(value: float, wanted: float, less: bool) -> bool:
    return value <= wanted if less else value >= wanted
