"""Pictures of a training run, made from its directory, and what all plots share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_io import Pixels, first_row
from ..training.checkpoints import LOG, read_log
from ..training.run import SAMPLES
from ..utils.files import write_atomically

# Okabe and Ito's colours, which the colour-blind can tell apart
GREY, BLUE, ORANGE, GREEN, PINK = "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
KINDS = (".png", ".svg", ".pdf")


def plot_loss(run: str | Path, out: str | Path) -> None:
    """Training loss, and the losses of averaged and raw weights on fixed images, over images seen: `out`, a .png, .svg or .pdf.

    ValueError if `run` has no log, or without the extra `plot`.
    """
    lines = read_log(Path(run) / LOG)
    trained = [line for line in lines if line.get("loss") is not None]
    checked = [line for line in lines if line.get("ema_loss") is not None]
    if not trained:
        raise ValueError(f"{Path(run) / LOG} holds no losses; expected the directory of a training run")
    last = trained[-1]
    per_step = last["images"] / last["step"]
    seen, loss = (np.array([line[k] for line in trained], float) for k in ("images", "loss"))
    picture, axes = figure()
    axes.plot(seen, loss, color=GREY, linewidth=0.8, label="training, as logged")
    if len(loss) >= 20:
        width = max(2, len(loss) // 20)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        axes.plot(seen[width - 1 :], smooth, color=BLUE, linewidth=1.8, label=f"training, mean over {width} entries")
    if checked:
        at = [line["step"] * per_step for line in checked]
        which = "held-out images" if checked[-1]["held_out"] else "training images"
        axes.plot(at, [line["raw_loss"] for line in checked], "s-", color=ORANGE, markersize=4, label=f"weights, on {which}")
        axes.plot(
            at, [line["ema_loss"] for line in checked], "o-", color=GREEN, markersize=4, label=f"averaged weights, on {which}"
        )
    low = min([*loss, *(line["ema_loss"] for line in checked)])
    axes.set(xlabel="images seen", ylabel="loss (mean squared error)", yscale="log", ylim=(0.9 * low, 5 * low))
    axes.set_title(f"{last['step']:,} steps, {last['epoch']:.1f} epochs, {last['seconds'] / 3600:.1f} hours", loc="left")
    axes.yaxis.set_major_formatter("{x:.3f}")
    axes.yaxis.set_minor_formatter("{x:.3f}")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k")
    axes.legend(frameon=False)
    save(picture, out)


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
    axes.imshow(np.concatenate(strips).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks([height * (i + 0.5) for i in range(len(strips))], [f"{int(found[i - 1].stem):,}" for i in chosen])
    axes.set_xticks([])
    axes.set_ylabel("step")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    save(picture, out)


def figure(width: float = 8, height: float = 4.5, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """An empty figure and its axes: one, or an array [rows, columns]. ValueError without the extra `plot`."""
    empty = _find_figure()(figsize=(width, height), dpi=120, layout="constrained")
    axes = empty.subplots(rows, columns, squeeze=False)
    for a in axes.flat:
        a.spines[["top", "right"]].set_visible(False)
    return empty, axes[0, 0] if axes.size == 1 else axes


def save(figure: Any, out: str | Path) -> None:
    """Writes a figure, whole or not at all. ValueError for a kind of file that is none of .png, .svg, .pdf."""
    out = check_out(out)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=out.suffix[1:])
    write_atomically(out, buffer.getvalue())


def check_out(out: str | Path, kinds: tuple[str, ...] = KINDS) -> Path:
    """ValueError, before any long work begins, for a file of no such kind, in a directory that is not there, or a plot
    without the extra `plot`.
    """
    out = Path(out)
    if out.suffix not in kinds:
        raise ValueError(f"{out}: unknown kind of picture; expected {', '.join(kinds[:-1])} or {kinds[-1]}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} does not exist; create it first")
    if out.suffix in KINDS:
        _find_figure()
    return out


def _find_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need the extra plot: pip install 'ddpm-fast[plot]'") from None
    return Figure
