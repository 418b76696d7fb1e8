"""Plots of a training run from its directory: loss curves, and samples over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_io import Pixels, first_row
from ..training.log import LOG, read_log
from ..training.monitor import SAMPLES
from .style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save, show_image

_ROW, _MARGIN, _MIN_WIDTH = 0.62, 0.9, 1.6  # inches: row height, width of the labels, least width


def plot_loss(run: str | Path, out: str | Path) -> None:
    """Plots training loss, and validation loss of raw and averaged weights, over images seen.

    A log with losses by quartile of t adds a second panel. Only the first average is drawn.

    Args:
        run: Directory of a training run.
        out: A .png, .svg or .pdf file.

    Raises:
        ValueError: `run` has no log with losses, or the extra `plot` is not installed.
    """
    lines = read_log(Path(run) / LOG)
    training = [line for line in lines if line.get("loss") is not None]
    validation = [line for line in lines if line.get("ema_loss") is not None]
    if not training:
        raise ValueError(
            f"{Path(run) / LOG} has no losses; expected the directory of a training run"
        )
    last = training[-1]
    images_per_step = last["images"] / last["step"]
    seen, loss = _values(training, "images"), _values(training, "loss")
    quartiles = [line for line in training if "loss_q0" in line]
    plot, panels = figure(height=8, rows=2) if quartiles else figure()
    axes = panels[0, 0] if quartiles else panels
    if quartiles:
        _plot_quartiles(panels[1, 0], quartiles)
    axes.plot(seen, loss, color=GREY, linewidth=0.8, label="training, as logged")
    if len(loss) >= 20:
        n = max(2, len(loss) // 20)
        mean, label = np.convolve(loss, np.ones(n) / n, mode="valid"), f"mean of {n} log entries"
        axes.plot(seen[n - 1 :], mean, color=BLUE, linewidth=1.8, label=f"training, {label}")
    if validation:
        x = images_per_step * _values(validation, "step")
        images = "held-out images" if validation[-1]["held_out"] else "training images"
        for key, name, marker, colour in (
            ("raw_loss", "raw weights", "s-", ORANGE),
            ("ema_loss", "averaged weights", "o-", GREEN),
        ):
            y, label = _values(validation, key), f"{name}, on {images}"
            axes.plot(x, y, marker, color=colour, markersize=4, label=label)
    _format(axes, "loss (mean squared error)")
    axes.set_title(_title(last), loc="left")
    save(plot, out)


def _title(last: dict[str, Any]) -> str:
    """Steps, epochs and time of a run."""
    minutes = last["seconds"] / 60
    time = f"{minutes:.{1 if minutes < 10 else 0}f} minutes"
    if minutes >= 90:
        time = f"{minutes / 60:.1f} hours"
    epochs = f"{last['epoch']:.1f} epochs" if last["epoch"] < 10 else f"{last['epoch']:,.0f} epochs"
    return f"{last['step']:,} steps, {epochs}, {time} of training"


def _format(axes: Any, ylabel: str) -> None:
    """Labels, a legend, and a logarithmic y-axis that covers all points, with ticks at 1, 2, 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xlabel="images seen", ylabel=ylabel, yscale="log")
    axes.xaxis.set_major_formatter(_count)
    axes.legend(frameon=False)

    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        axes.set_ylim(0.9 * values.min(), 1.1 * values.max())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _values(lines: list[dict[str, Any]], key: str) -> Any:
    """One number per line of the log; NaN for null."""
    return np.array([line.get(key) for line in lines], float)


def _plot_quartiles(axes: Any, lines: list[dict[str, Any]]) -> None:
    """Plots the logged training loss of each quarter of the timesteps; NaN leaves a gap."""
    for i, colour in enumerate((BLUE, GREEN, ORANGE, PINK)):
        seen, loss = _values(lines, "images"), _values(lines, f"loss_q{i}")
        axes.plot(seen, loss, color=colour, linewidth=0.8, label=f"t from {i}/4 to {i + 1}/4 of T")
    _format(axes, "training loss by timestep")


def _count(x: float, _: Any = None) -> str:
    return f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x >= 1e3 else f"{x:g}"


def plot_course(run: str | Path, out: str | Path, rows: int = 10) -> None:
    """Plots the same samples after up to `rows` training steps, in geometric progression.

    Args:
        run: Directory of a training run.
        out: A .png, .svg or .pdf file.
        rows: Largest number of rows.

    Raises:
        ValueError: `run` has no sample grids, or the extra `plot` is not installed.
    """
    grids = sorted((Path(run) / SAMPLES).glob("*.png"))
    if not grids:
        raise ValueError(f"{Path(run) / SAMPLES} has no grids; train with --save-images-epochs")
    numbers = sorted({round(i) for i in np.geomspace(1, len(grids), min(rows, len(grids)))})
    grids = [grids[i - 1] for i in numbers]
    images: list[Pixels] = [first_row(grid) for grid in grids]
    height, width = images[0].shape[:2]
    inches = max(_MIN_WIDTH, _ROW * width / height + _MARGIN), _ROW * len(grids) + 0.3
    plot, axes = figure(*inches)
    show_image(axes, np.concatenate(images))
    axes.set_anchor("W")
    axes.set_yticks(
        [height * (i + 0.5) for i in range(len(grids))], [f"{int(g.stem):,}" for g in grids]
    )
    axes.set_ylabel("step")
    axes.tick_params(length=0)
    save(plot, out)
