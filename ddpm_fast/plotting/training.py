"""Plots of a training run, made from its directory: loss curves and sample grids over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_io import Pixels, first_row
from ..training.log import LOG, read_log
from ..training.monitor import SAMPLES
from .style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save

_MARGIN, _NARROWEST = 0.9, 1.6  # inches, of a sheet of grids


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
            _values(checked, "raw_loss"),
            "s-",
            color=ORANGE,
            markersize=4,
            label=f"weights, on {which}",
        )
        axes.plot(
            at,
            _values(checked, "ema_loss"),
            "o-",
            color=GREEN,
            markersize=4,
            label=f"averaged weights, on {which}",
        )
    axes.set(xlabel="images seen", ylabel="loss (mean squared error)", yscale="log")
    _cover(axes)
    axes.set_title(_title(last), loc="left")
    axes.xaxis.set_major_formatter(_count)
    axes.legend(frameon=False)
    save(picture, out)


def _title(last: dict[str, Any]) -> str:
    """Length of a run in the units that suit it."""
    minutes = last["seconds"] / 60
    time = (
        f"{minutes / 60:.1f} hours"
        if minutes >= 90
        else f"{minutes:.{1 if minutes < 10 else 0}f} minutes"
    )
    epochs = f"{last['epoch']:.1f} epochs" if last["epoch"] < 10 else f"{last['epoch']:,.0f} epochs"
    return f"{last['step']:,} steps, {epochs}, {time} of training"


def _cover(axes: Any) -> None:
    """Limits of a logarithmic axis that hold every point of its lines, with labels at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        axes.set_ylim(0.9 * values.min(), 1.1 * values.max())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _values(lines: list[dict[str, Any]], key: str) -> Any:
    """One number per line of the log; NaN, which leaves a gap, where it is null."""
    return np.array([line.get(key) for line in lines], float)


def _draw_quartiles(axes: Any, lines: list[dict[str, Any]]) -> None:
    """The training loss of each quarter of the timesteps, as logged; an empty interval leaves a gap."""
    seen = [line["images"] for line in lines]
    for i, color in enumerate((BLUE, GREEN, ORANGE, PINK)):
        losses = _values(lines, f"loss_q{i}")
        axes.plot(seen, losses, color=color, linewidth=0.8, label=f"t from {i}/4 to {i + 1}/4 of T")
    axes.set(xlabel="images seen", ylabel="training loss", yscale="log")
    _cover(axes)
    axes.xaxis.set_major_formatter(_count)
    axes.legend(frameon=False)


def _count(x: float, _: Any = None) -> str:
    return f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x >= 1e3 else f"{x:g}"


def plot_course(run: str | Path, out: str | Path, rows: int = 10) -> None:
    """The same images drawn over the course of training, one row for each of up to `rows` moments."""
    grids = sorted((Path(run) / SAMPLES).glob("*.png"))
    if not grids:
        raise ValueError(f"{Path(run) / SAMPLES} holds no grids; train with --save-images-epochs")
    # moments grow geometrically, as learning does
    chosen = sorted({round(i) for i in np.geomspace(1, len(grids), min(rows, len(grids)))})
    strips: list[Pixels] = [first_row(grids[i - 1]) for i in chosen]
    height, width = strips[0].shape[:2]
    inches = 0.62  # of a row; the sheet is as wide as its rows, with a margin for the steps
    picture, axes = figure(
        width=max(_NARROWEST, inches * width / height + _MARGIN), height=inches * len(strips) + 0.3
    )
    axes.imshow(
        np.concatenate(strips).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    axes.set_anchor("W")
    axes.set_yticks(
        [height * (i + 0.5) for i in range(len(strips))],
        [f"{int(grids[i - 1].stem):,}" for i in chosen],
    )
    axes.set_xticks([])
    axes.set_ylabel("step")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    save(picture, out)
