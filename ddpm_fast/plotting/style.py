"""Plot style: colours, figures, and how a figure is saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically

# Okabe and Ito's colours, which the colour-blind can tell apart
GREY, BLUE, ORANGE, GREEN, PINK = "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
KINDS = (".png", ".svg", ".pdf")


def figure(
    width: float = 8, height: float = 4.5, rows: int = 1, columns: int = 1
) -> tuple[Any, Any]:
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
        raise ValueError(
            f"{out}: unknown kind of picture; expected {', '.join(kinds[:-1])} or {kinds[-1]}"
        )
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
