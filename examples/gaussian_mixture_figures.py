"""Figures of gaussian_mixture.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# colour-blind safe palette of Okabe and Ito
GREY, BLUE, ORANGE, GREEN = "#999999", "#0072B2", "#D55E00", "#009E73"
GRID = np.linspace(-5, 5, 401)
BINS = np.linspace(-5, 5, 51)


def draw(
    out: Path,
    data: Any,
    chain: Any,
    stages: tuple[int, ...],
    mixture: Any,
    spread: dict[str, Any],
    schedule: Any,
    samples: dict[str, Any],
    rows: list[dict[str, Any]],
    paths: Any,
    jumped: dict[str, Any],
) -> None:
    """Writes five figures to `out`."""
    forward(chain, stages, mixture).savefig(out / "gaussian-forward.png")
    density(chain.numpy(), paths.numpy()).savefig(out / "gaussian-density.png", dpi=80)
    reverse(data, samples, rows, mixture).savefig(out / "gaussian-reverse.png")
    one_jump(data, jumped).savefig(out / "gaussian-one-jump.png")
    variance(spread, schedule).savefig(out / "gaussian-variance.png")


def blank(rows: int, columns: int, width: float, height: float, **more: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    for a in axes.flat:
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def forward(chain: Any, stages: tuple[int, ...], mixture: Any) -> Figure:
    """Histograms of the points at some timesteps, with the exact densities."""
    figure, axes = blank(2, len(stages) // 2, 9, 4, sharex=True, sharey=True)
    for a, t in zip(axes.flat, stages, strict=True):
        a.hist(chain[t].numpy(), BINS, density=True, color=GREY, label="800 points")
        a.plot(GRID, mixture(t).pdf(GRID), color=BLUE, label="exact")
        a.plot(
            GRID,
            np.exp(-(GRID**2) / 2) / np.sqrt(2 * np.pi),
            color=ORANGE,
            linestyle="--",
            linewidth=1,
            label="N(0, 1)",
        )
        a.set_title(f"t = {t}", fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.supxlabel("x_t", fontsize=10)
    figure.supylabel("density", fontsize=10)
    return figure


def density(chain: Any, paths: Any) -> Figure:
    """Density of the points over time, forward by the chain and back by DDPM, with trajectories."""
    figure, axes = blank(1, 2, 9, 3.6, sharey=True)
    for a, x, t, title in (
        (axes[0, 0], chain, np.arange(len(chain)), "forward: the chain"),
        (axes[0, 1], paths, np.arange(len(paths))[::-1], "back: DDPM"),
    ):
        counts = np.stack(
            [np.histogram(row, np.linspace(-5, 5, 101), density=True)[0] for row in x]
        )
        order = np.argsort(t)
        a.imshow(
            counts[order].T,
            aspect="auto",
            origin="lower",
            extent=(0, len(x), -5, 5),
            cmap="cividis",
            vmax=0.45,
        )
        for i in range(6):
            a.plot(t, x[:, i], color="white", linewidth=0.4)
        a.set(title=title, xlabel="t")
    axes[0, 1].invert_xaxis()
    axes[0, 0].set_ylabel("x_t")
    figure.colorbar(axes[0, 1].images[0], ax=axes, label="density")
    return figure


def reverse(data: Any, samples: dict[str, Any], rows: list[dict[str, Any]], mixture: Any) -> Figure:
    """Samples of each solver and the training points."""
    figure, axes = blank(1, len(samples), 9, 3, sharex=True, sharey=True)
    for a, (name, x), row in zip(axes.flat, samples.items(), rows, strict=False):
        a.hist(data.numpy(), BINS, density=True, color=GREY, alpha=0.6, label="800 points")
        a.hist(
            x.numpy(),
            BINS,
            density=True,
            histtype="step",
            color=ORANGE,
            linewidth=1.4,
            label="samples",
        )
        a.plot(GRID, mixture().pdf(GRID), color=BLUE, linewidth=1, label="true density")
        a.set(
            title=f"{name}, {row['steps']} steps\nW1 to the points {row['w1_data']:.3f}",
            xlabel="x_0",
        )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    axes[0, 0].set(ylabel="density", ylim=(0, 0.4))
    return figure


def one_jump(data: Any, jumped: dict[str, Any]) -> Figure:
    """x_0 computed from x_T in one step."""
    figure, axes = blank(1, 2, 9, 3)
    for a, (name, x), colour in zip(axes.flat, jumped.items(), (ORANGE, GREEN), strict=True):
        wide = max(5.0, float(np.quantile(np.abs(x.numpy()), 0.99)))
        bins = np.linspace(-wide, wide, 81)
        a.hist(data.numpy(), bins, density=True, color=GREY, alpha=0.6, label="data")
        a.hist(
            x.numpy(), bins, density=True, color=colour, alpha=0.8, label="x_0 from x_T in one jump"
        )
        a.set(
            title=f"eps of the {name}" if name == "network" else "optimal eps",
            xlabel="x_0",
            yscale="log",
        )
        a.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("density")
    return figure


def variance(spread: dict[str, Any], schedule: Any) -> Figure:
    """Variance of both chains, measured and exact."""
    figure, axes = blank(1, 1, 6.5, 3.4)
    a, t = axes[0, 0], np.arange(len(schedule))
    of_data = 4.5  # modes at -2 and 2, each with variance 0.5
    a.plot(
        t,
        spread["exploding"],
        color=ORANGE,
        linewidth=3,
        alpha=0.5,
        label="x + sqrt(beta) eps, measured",
    )
    a.plot(
        t,
        of_data + np.cumsum(schedule.beta),
        color=ORANGE,
        linewidth=1,
        linestyle="--",
        label="4.5 + sum of beta",
    )
    a.plot(
        t,
        spread["preserving"],
        color=BLUE,
        linewidth=3,
        alpha=0.5,
        label="sqrt(1 - beta) x + sqrt(beta) eps, measured",
    )
    a.plot(
        t,
        1 + (of_data - 1) * schedule.alpha_bar,
        color=BLUE,
        linewidth=1,
        linestyle="--",
        label="1 + 3.5 alpha_bar",
    )
    a.set(xlabel="t", ylabel="variance of x_t", ylim=(0, None))
    a.legend(frameon=False, fontsize=9)
    return figure
