"""Time and memory against batch, image size, steps and channels, fitted and drawn.

    python -m bench.scaling      measures on this CPU, two minutes, into bench/results/scaling-cpu.json

`bench.report` draws: what was measured on a CPU, and what is predicted of an H100.
A fit is a sum of powers that have a reason to be there (`POWERS`), by least squares of relative errors.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.networks import NETWORKS, ROOT
from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.benchmark.kernels import distinct
from ddpm_fast.benchmark.results import provenance, write
from ddpm_fast.benchmark.timer import measure
from ddpm_fast.engines.fused.roofline import GAP, GPUS, estimate
from ddpm_fast.engines.fused.unet import FusedUNet

MEASURED = ROOT / "bench" / "results" / "scaling-cpu.json"
H100 = GPUS["h100"]
Series = list[dict[str, Any]]  # rows with x, ms (a step of the whole batch), bytes


def scaled(config: UNetConfig, width: int) -> UNetConfig:
    """All channels in proportion, the first level's `width`."""
    return replace(config, channels=tuple(c * width // config.channels[0] for c in config.channels))


# ---- fits

# what can be there: something fixed; per image or step; per pixel, and attention between all of them; bytes and FLOP by width
POWERS = dict(batch=(0, 1), steps=(0, 1), size=(0, 2, 4), channels=(0, 1, 2))


@dataclass(frozen=True)
class Fit:
    """ms = the sum of factors n^powers. apart: the largest relative deviation of a row."""

    powers: tuple[int, ...]
    factors: tuple[float, ...]
    apart: float

    @classmethod
    def of(cls, name: str, rows: Series) -> Fit:
        """Least squares of relative errors among factors that are not negative."""
        n, ms = (np.array([r[k] for r in rows], float) for k in ("x", "ms"))
        best = None
        for chosen in (c for k in range(1, 4) for c in itertools.combinations(POWERS[name], k)):
            columns = np.stack([n**p / ms for p in chosen], 1)
            factors, *_ = np.linalg.lstsq(columns, np.ones(len(n)), rcond=None)
            off = columns @ factors - 1
            if min(factors) > 0 and (best is None or off @ off < best[0]):
                best = off @ off, cls(chosen, tuple(map(float, factors)), float(abs(off).max()))
        assert best is not None
        return best[1]

    def __call__(self, n: Any) -> Any:
        return sum(f * n**p for f, p in zip(self.factors, self.powers, strict=True))

    def __str__(self) -> str:
        signs = {0: "", 1: " n", 2: " n²", 4: " n⁴"}
        return " + ".join(f"{f:.3g}{signs[p]}" for f, p in zip(self.factors, self.powers, strict=True))


# ---- on an H100, predicted

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SIZES = (16, 32, 64, 128, 256)  # at batch 16
WIDTHS = (64, 96, 128, 192, 256)  # at batch 64


@cache
def predicted(dtype: str) -> dict[str, Series]:
    """The CIFAR-10 network against batch, size and channels."""
    base = NETWORKS["cifar10"]
    return dict(
        batch=[_predict(base, n, 32, dtype, n) for n in BATCHES],
        size=[_predict(base, 16, n, dtype, n) for n in SIZES],
        channels=[_predict(scaled(base, n), 64, 32, dtype, n) for n in WIDTHS],
    )


def _predict(config: UNetConfig, batch: int, size: int, dtype: str, x: int) -> dict[str, Any]:
    """A step, and what its time goes into: gaps between launches, and launches that wait for memory or for products."""
    with torch.device("meta"):
        unet = UNet(replace(config, sample_size=size))
    plan = FusedUNet(unet, batch, dtype, "meta", check=False).plan()
    by = {"gaps": 0.0, "memory": 0.0, "products": 0.0}
    for launch in plan:
        e = estimate(launch, H100)
        longer = "memory" if e.bytes / H100.copy >= 0.999 * (e.predicted - GAP) else "products"
        by["gaps"] += GAP
        by[longer] += e.predicted - GAP
    elements = batch * config.in_channels * size**2
    by["memory"] += elements * 20 / H100.copy  # ddpm_step: three states read, two written
    by["gaps"] += 2 * GAP
    parameters = sum(p.numel() for p in unet.parameters())
    nbytes = plan.arena.size + parameters * (1 if dtype == "fp8" else 2) + 5 * 4 * elements
    return dict(x=x, ms=1e3 * sum(by.values()), bytes=nbytes, by=by)


# ---- on a CPU, measured


def measured() -> dict[str, Any]:
    """The network that ships, by the CPU engine."""
    base = NETWORKS["fashion_mnist"]
    series: dict[str, Series] = dict(
        batch=[_step(base, n, 32) | dict(x=n) for n in (1, 2, 4, 8, 16, 32)],
        size=[_step(base, 2, n) | dict(x=n) for n in (16, 24, 32, 48, 64, 96)],
        channels=[_step(scaled(base, n), 2, 32) | dict(x=n) for n in (32, 64, 96, 128, 192)],
        steps=[_loop(base, n) | dict(x=n) for n in (2, 5, 10, 20, 50, 100)],
    )
    return dict(**provenance(), series=series)


def _step(config: UNetConfig, batch: int, size: int) -> dict[str, Any]:
    """A step among ten, without what a loop begins and ends with."""
    sampler = _sampler(config, size)
    table, begun = sampler.table(steps=10), sampler.begin(torch.arange(batch), 0)

    def steps() -> None:
        for _ in sampler.engine.steps(copy.deepcopy(begun), table):
            pass

    return _timed(steps, sampler, 10)


def _loop(config: UNetConfig, steps: int) -> dict[str, Any]:
    """A whole loop of two images."""
    sampler = _sampler(config, 32)
    return _timed(lambda: sampler.sample(2, steps=steps, output="float"), sampler, 1)


def _sampler(config: UNetConfig, size: int) -> Sampler:
    torch.manual_seed(0)
    return Sampler(UNet(config).eval(), NoiseSchedule.linear(), (config.in_channels, size, size), engine="cpu")


def _timed(call: Callable[[], object], sampler: Sampler, steps: int) -> dict[str, Any]:
    timing = measure(call, sampler.device, 3)
    engine: Any = sampler.engine
    row = dict(ms=1e3 * timing.median / steps, spread=timing.spread, bytes=engine.memory)
    print(row, flush=True)
    return row


# ---- drawn


def draw_cpu(result: dict[str, Any], out: Path) -> None:
    from ddpm_fast.plotting.style import BLUE, GREY, ORANGE, figure, save

    picture, axes = figure(width=15, height=6.5, rows=2, columns=4)
    what = dict(batch="images in a batch", size="pixels a side", channels="channels of the first level", steps="steps of the loop")
    for (name, rows), (top, bottom) in zip(result["series"].items(), axes.T, strict=True):
        x = np.array([r["x"] for r in rows], float)
        top.plot(x, [r["ms"] for r in rows], "o", color=BLUE)
        line = Fit.of(name, rows)
        fine = np.geomspace(x[0], x[-1], 200)
        top.plot(fine, line(fine), "-", color=GREY, label=f"{line} ms")
        top.set(xscale="log", yscale="log", ylabel="ms a loop" if name == "steps" else "ms a step")
        bottom.plot(x, [r["bytes"] / 2**20 for r in rows], "s-", color=ORANGE)
        bottom.set(xscale="log", ylim=(0, None), xlabel=what[name], ylabel="MiB: weights, maps of two threads")
        top.legend(frameon=False, fontsize=8)
        _ticks((top, bottom), [r["x"] for r in rows])
    axes[0, 0].set_title(f"Fashion-MNIST network on {result['environment']['cpu']}, two threads: measured", loc="left", fontsize=9)
    save(picture, out)


def _ticks(axes: Iterable[Any], at: list[int]) -> None:
    for a in axes:
        a.set_xticks(at, [str(v) for v in at], fontsize=7)
        a.minorticks_off()


def draw_h100(out: Path) -> None:
    from bench.report import baselines_of
    from ddpm_fast.plotting.style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save

    picture, axes = figure(width=15, height=8, rows=2, columns=3)
    styles = {"bf16": dict(color=BLUE, marker="o"), "fp8": dict(color=GREEN, marker="s")}
    what = dict(batch="images in a batch, 32x32", size="pixels a side, batch 16", channels="channels of the first level, batch 64")
    for dtype, style in styles.items():
        for (name, rows), a in zip(predicted(dtype).items(), axes[0], strict=True):
            x = np.array([r["x"] for r in rows], float)
            line, fine = Fit.of(name, rows), np.geomspace(x[0], x[-1], 200)
            a.plot(x, [r["ms"] for r in rows], linestyle="", **style, label=f"ours {dtype}, predicted: {line}")
            a.plot(fine, line(fine), "-", color=style["color"], linewidth=0.8)
            a.set(xscale="log", yscale="log", xlabel=what[name], ylabel="ms a step")
            _ticks([a], [r["x"] for r in rows])
        rows = predicted(dtype)["batch"]
        axes[1, 0].plot([r["x"] for r in rows], [r["bytes"] / 2**30 for r in rows], **style, label=f"{dtype}, predicted")
    for how, color in (("torch.compile", ORANGE), ("eager bf16", PINK), ("eager fp32", GREY)):
        found = baselines_of("cifar10", how)
        axes[0, 0].plot(*zip(*found, strict=True), "x--", color=color, linewidth=0.8, label=f"{how}, measured")
    axes[1, 0].set(xscale="log", yscale="log", xlabel="images in a batch, 32x32", ylabel="GiB: weights, arena, state")
    _ticks([axes[1, 0]], list(BATCHES))
    _shares(axes[1, 1], predicted("bf16")["batch"])
    _hours(axes[1, 2])
    for a in axes.flat:
        a.legend(frameon=False, fontsize=8)
    axes[0, 0].set_title("CIFAR-10 network on one H100", loc="left", fontsize=9)
    save(picture, out)


def draw_roofline(out: Path) -> None:
    """Every launch of the CIFAR-10 network, batch 256, predicted."""
    from ddpm_fast.benchmark.figures import roofline
    from ddpm_fast.plotting.style import figure, save

    picture, axes = figure(width=15, height=5.5, columns=2)
    for dtype, a in zip(("bf16", "fp8"), axes[0], strict=True):
        with torch.device("meta"):
            unet = UNet(NETWORKS["cifar10"])
        points = []
        for launch, times in distinct(list(FusedUNet(unet, 256, dtype, "meta", check=False).plan())):
            e = estimate(launch, H100)
            what = dict(what=launch.op.name, times=times, images=256)
            points.append(dict(**what, flops=e.flops, bytes=e.bytes, seconds=e.predicted))
        rates = {"bf16": H100.product, "fp8": H100.product_fp8}
        roofs = [dict(what="convolution", dtype=k, kind="flops", per_s=rates[k]) for k in ("bf16", "fp8") if k in ("bf16", dtype)]
        roofline(a, points, [*roofs, dict(what="copy", dtype="fp32", kind="bytes", per_s=H100.copy)], predicted=True)
        a.set_title(f"CIFAR-10 network, batch 256, {dtype}, on one H100: every launch, predicted", loc="left", fontsize=9)
    save(picture, out)


def _shares(axes: Any, rows: Series) -> None:
    """What a step's time goes into, by batch."""
    from ddpm_fast.plotting.style import BLUE, GREY, ORANGE

    names, colors = ("gaps", "memory", "products"), (GREY, ORANGE, BLUE)
    shares = [[r["by"][n] / sum(r["by"].values()) for r in rows] for n in names]
    labels = ["gaps between launches", "launches bound by memory", "launches bound by products"]
    axes.stackplot([r["x"] for r in rows], shares, labels=labels, colors=colors, alpha=0.8)
    axes.set(xscale="log", xlabel="images in a batch, 32x32", ylabel="share of a step in bf16, predicted", ylim=(0, 1))
    _ticks([axes], list(BATCHES))


def _hours(axes: Any) -> None:
    from bench.report import fifty_thousand
    from ddpm_fast.plotting.style import BLUE, GREEN, GREY, ORANGE, PINK

    steps = np.array([10, 50, 100, 250, 1000])
    for (name, rate, kind), color in zip(fifty_thousand(), (GREEN, BLUE, ORANGE, PINK, GREY), strict=True):
        axes.plot(steps, 50_000 * steps / rate / 3600, "-o", markersize=3, color=color, label=f"{name}, {kind}")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="hours for 50,000 CIFAR-10 images")
    _ticks([axes], list(steps))


def draw(folder: Path) -> None:
    draw_cpu(json.loads(MEASURED.read_text()), folder / "scaling-cpu.png")
    draw_h100(folder / "scaling-h100.png")
    draw_roofline(folder / "roofline-h100.png")


if __name__ == "__main__":
    write(MEASURED, measured())
