"""Plots of a training run, made from its directory: loss curves and sample grids over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_io import Pixels, first_row
from ..training.log import LOG, read_log
from ..training.monitor import SAMPLES
from .style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save


def plot_loss(run: str | Path, out: str | Path) -> None:
    """Training loss, and the losses of averaged and raw weights on fixed images, over images seen: `out`, a .png, .svg or .pdf.

    A log with losses by quartile of t gives a second panel. Only the main average is drawn.

    ValueError if `run` has no log, or without the extra `plot`.
    """
    lines = read_log(Path(run) / LOG)
    trained = [line for line in lines if line.get("loss") is not None]
    checked = [line for line in lines if line.get("ema_loss") is not None]
    if not trained:
        raise ValueError(
            f"{Path(run) / LOG} holds no losses; expected the directory of a training run"
        )
    last = trained[-1]
    per_step = last["images"] / last["step"]
    seen, loss = (np.array([line[k] for line in trained], float) for k in ("images", "loss"))
    quartiles = [line for line in trained if "loss_q0" in line]
    picture, panels = figure(height=8, rows=2) if quartiles else figure()
    axes = panels[0, 0] if quartiles else panels
    if quartiles:
        _draw_quartiles(panels[1, 0], quartiles)
    axes.plot(seen, loss, color=GREY, linewidth=0.8, label="training, as logged")
    if len(loss) >= 20:
        width = max(2, len(loss) // 20)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        axes.plot(
            seen[width - 1 :],
            smooth,
            color=BLUE,
            linewidth=1.8,
            label=f"training, mean over {width} entries",
        )
    if checked:
        at = [line["step"] * per_step for line in checked]
        which = "held-out images" if checked[-1]["held_out"] else "training images"
        axes.plot(
            at,
            [line["raw_loss"] for line in checked],
            "s-",
            color=ORANGE,
            markersize=4,
            label=f"weights, on {which}",
        )
        axes.plot(
            at,
            [line["ema_loss"] for line in checked],
            "o-",
            color=GREEN,
            markersize=4,
            label=f"averaged weights, on {which}",
        )
    low = min([*loss, *(line["ema_loss"] for line in checked)])
    axes.set(
        xlabel="images seen",
        ylabel="loss (mean squared error)",
        yscale="log",
        ylim=(0.9 * low, 5 * low),
    )
    axes.set_title(
        f"{last['step']:,} steps, {last['epoch']:.1f} epochs, {last['seconds'] / 3600:.1f} hours",
        loc="left",
    )
    axes.yaxis.set_major_formatter("{x:.3f}")
    axes.yaxis.set_minor_formatter("{x:.3f}")
    axes.xaxis.set_major_formatter(_count)
    axes.legend(frameon=False)
    save(picture, out)


def _draw_quartiles(axes: Any, lines: list[dict[str, Any]]) -> None:
    """The training loss of each quarter of the timesteps, as logged; an empty interval leaves a gap."""
    seen = [line["images"] for line in lines]
    for i, color in enumerate((BLUE, GREEN, ORANGE, PINK)):
        losses = np.array([line[f"loss_q{i}"] for line in lines], float)  # None becomes NaN
        axes.plot(seen, losses, color=color, linewidth=0.8, label=f"t from {i}/4 to {i + 1}/4 of T")
    axes.set(xlabel="images seen", ylabel="training loss", yscale="log")
    axes.xaxis.set_major_formatter(_count)
    axes.legend(frameon=False)


def _count(x: float, _: Any = None) -> str:
    return f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k"


def plot_course(run: str | Path, out: str | Path, rows: int = 10) -> None:
    """The same images drawn over the course of training, one row for each of up to `rows` moments."""
    found = sorted((Path(run) / SAMPLES).glob("*.png"))
    if not found:
        raise ValueError(f"{Path(run) / SAMPLES} holds no grids; train with --save-images-epochs")
    # moments grow geometrically, as learning does
    chosen = sorted({round(i) for i in np.geomspace(1, len(found), min(rows, len(found)))})
    strips: list[Pixels] = [first_row(found[i - 1]) for i in chosen]
    picture, axes = figure(height=0.62 * len(strips) + 0.5)
    height = len(strips[0])
    axes.imshow(
        np.concatenate(strips).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    axes.set_yticks(
        [height * (i + 0.5) for i in range(len(strips))],
        [f"{int(found[i - 1].stem):,}" for i in chosen],
    )
    axes.set_xticks([])
    axes.set_ylabel("step")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    save(picture, out)
