"""Figures of the documents: results of CPUs, scaling, and the roofline of an H100."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.report.committed import NETWORKS, cpus, h100_steps
from bench.report.fits import Fit, Series
from bench.report.predictions import BATCHES, H100, best_rates, plan_of, series
from bench.workloads import NETWORKS as CONFIGS
from ddpm_fast.benchmark.figures import draw as draw_result
from ddpm_fast.benchmark.figures import roofline
from ddpm_fast.benchmark.kernels import predicted_launches
from ddpm_fast.plotting.style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save


def draw(folder: Path) -> None:
    """Draws all figures into `folder`."""
    for machine in cpus(*NETWORKS):
        for network in NETWORKS:
            draw_result(
                machine.read(network), folder / f"bench-{machine.folder.name}-{network}.png"
            )
    draw_cpu(cpus("scaling")[0].read("scaling"), folder / "scaling-cpu.png")
    draw_h100(folder / "scaling-h100.png")
    draw_roofline(folder / "roofline-h100.png")


def draw_cpu(result: dict[str, Any], out: Path) -> None:
    """Measured time and memory of the Fashion-MNIST network, with fits of the time."""
    plot, axes = figure(width=15, height=6.5, rows=2, columns=4)
    what = dict(
        batch="batch size",
        size="pixels per side",
        channels="channels of the first level",
        steps="steps of the loop",
    )
    for (name, rows), (top, bottom) in zip(result["series"].items(), axes.T, strict=True):
        x = np.array([r["x"] for r in rows], float)
        top.plot(x, [r["ms"] for r in rows], "o", color=BLUE)
        line = Fit.of(name, rows)
        fine = np.geomspace(x[0], x[-1], 200)
        top.plot(fine, line(fine), "-", color=GREY, label=f"{line} ms")
        top.set(
            xscale="log", yscale="log", ylabel="ms per loop" if name == "steps" else "ms per step"
        )
        bottom.plot(x, [r["bytes"] / 2**20 for r in rows], "s-", color=ORANGE)
        bottom.set(
            xscale="log",
            ylim=(0, None),
            xlabel=what[name],
            ylabel="MiB: weights, feature maps of two threads",
        )
        top.legend(frameon=False, fontsize=8)
        _ticks((top, bottom), [r["x"] for r in rows])
    axes[0, 0].set_title(
        f"Fashion-MNIST network on {result['environment']['cpu']}, two threads: measured",
        loc="left",
        fontsize=9,
    )
    save(plot, out)


def _ticks(axes: Iterable[Any], at: list[int]) -> None:
    for a in axes:
        a.set_xticks(at, [str(v) for v in at], fontsize=7)
        a.minorticks_off()


def draw_h100(out: Path) -> None:
    """Predicted time and memory of the CIFAR-10 network, and measured baselines."""
    plot, axes = figure(width=15, height=8, rows=2, columns=3)
    styles = {"bf16": dict(color=BLUE, marker="o"), "fp8": dict(color=GREEN, marker="s")}
    what = dict(
        batch="batch size, 32x32",
        size="pixels per side, batch 16",
        channels="channels of the first level, batch 64",
    )
    for dtype, style in styles.items():
        for (name, rows), a in zip(series(dtype).items(), axes[0], strict=True):
            x = np.array([r["x"] for r in rows], float)
            line, fine = Fit.of(name, rows), np.geomspace(x[0], x[-1], 200)
            a.plot(
                x,
                [r["ms"] for r in rows],
                linestyle="",
                **style,
                label=f"ddpm_fast {dtype}, predicted: {line}",
            )
            a.plot(fine, line(fine), "-", color=style["color"], linewidth=0.8)
            a.set(xscale="log", yscale="log", xlabel=what[name], ylabel="ms per step")
            _ticks([a], [r["x"] for r in rows])
        rows = series(dtype)["batch"]
        axes[1, 0].plot(
            [r["x"] for r in rows],
            [r["bytes"] / 2**30 for r in rows],
            **style,
            label=f"{dtype}, predicted",
        )
    for engine, dtype, color in (
        ("torch.compile", "bf16", ORANGE),
        ("eager", "bf16", PINK),
        ("eager", "fp32", GREY),
    ):
        steps = zip(*h100_steps("cifar10", engine, dtype), strict=True)
        axes[0, 0].plot(
            *steps, "x--", color=color, linewidth=0.8, label=f"{engine} {dtype}, measured"
        )
    axes[1, 0].set(
        xscale="log", yscale="log", xlabel="batch size, 32x32", ylabel="GiB: weights, arena, state"
    )
    _ticks([axes[1, 0]], list(BATCHES))
    _shares(axes[1, 1], series("bf16")["batch"])
    _hours(axes[1, 2])
    for a in axes.flat:
        a.legend(frameon=False, fontsize=8)
    axes[0, 0].set_title("CIFAR-10 network on one H100", loc="left", fontsize=9)
    save(plot, out)


def draw_roofline(out: Path) -> None:
    """Every launch of the CIFAR-10 network, batch 256, predicted."""
    plot, axes = figure(width=15, height=5.5, columns=2)
    for dtype, a in zip(("bf16", "fp8"), axes[0], strict=True):
        rates = {"bf16": H100.product} | ({"fp8": H100.product_fp8} if dtype == "fp8" else {})
        ceilings: list[dict[str, Any]] = [
            dict(what="convolution", dtype=k, kind="flops", per_s=rate) for k, rate in rates.items()
        ]
        ceilings.append(dict(what="copy", dtype="fp32", kind="bytes", per_s=H100.copy))
        plan = plan_of(CONFIGS["cifar10"], 256, dtype)[1]
        roofline(a, predicted_launches(plan, 256, H100), ceilings, predicted=True)
        a.set_title(
            f"CIFAR-10 network, batch 256, {dtype}, on one H100: every launch, predicted",
            loc="left",
            fontsize=9,
        )
    save(plot, out)


def _shares(axes: Any, rows: Series) -> None:
    """Shares of a step by the bound of its launches, against the batch size."""
    names, colors = ("gaps", "memory", "products"), (GREY, ORANGE, BLUE)
    shares = [[r["parts"][n] / r["ms"] for r in rows] for n in names]
    labels = ["gaps between launches", "launches bound by memory", "launches bound by products"]
    axes.stackplot([r["x"] for r in rows], shares, labels=labels, colors=colors, alpha=0.8)
    axes.set(
        xscale="log",
        xlabel="batch size, 32x32",
        ylabel="share of a step in bf16, predicted",
        ylim=(0, 1),
    )
    _ticks([axes], list(BATCHES))


def _hours(axes: Any) -> None:
    """Time of 50,000 images against the number of steps."""
    steps = np.array([10, 50, 100, 250, 1000])
    for (name, rate, kind), color in zip(
        best_rates(), (GREEN, BLUE, ORANGE, PINK, GREY), strict=True
    ):
        axes.plot(
            steps,
            50_000 * steps / rate / 3600,
            "-o",
            markersize=3,
            color=color,
            label=f"{name}, {kind}",
        )
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="hours for 50,000 CIFAR-10 images")
    _ticks([axes], list(steps))
