"""Plot style: colours, figures and file formats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically

# colours of Okabe and Ito, distinguishable with colour blindness
GREY, BLUE, ORANGE, GREEN, PINK = "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
LIGHT = "#DDDDDD"  # text on black
KINDS = (".png", ".svg", ".pdf")


def rgb(colour: str) -> tuple[int, ...]:
    """Returns the levels 0 ... 255 of a colour "#RRGGBB"."""
    return tuple(bytes.fromhex(colour[1:]))


def figure(
    width: float = 8, height: float = 4.5, rows: int = 1, columns: int = 1
) -> tuple[Any, Any]:
    """Returns an empty figure and its axes: one, or an array [rows, columns].

    Raises:
        ValueError: The extra `plot` is not installed.
    """
    empty = _matplotlib_figure()(figsize=(width, height), dpi=120, layout="constrained")
    axes = empty.subplots(rows, columns, squeeze=False)
    for a in axes.flat:
        a.spines[["top", "right"]].set_visible(False)
    return empty, axes[0, 0] if axes.size == 1 else axes


def show_image(axes: Any, image: Any) -> None:
    """Draws an image uint8 [H, W, C] without ticks and frame; None leaves the axes empty."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if image is not None:
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def save(figure: Any, out: str | Path) -> None:
    """Writes a figure atomically. ValueError for an unknown suffix."""
    out = check_out(out)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=out.suffix[1:])
    write_atomically(out, buffer.getvalue())


def check_out(out: str | Path, kinds: tuple[str, ...] = KINDS) -> Path:
    """Validates the path of a plot before the computation.

    Raises:
        ValueError: The suffix is not one of `kinds`, the directory does not exist, or the extra
            `plot` is not installed.
    """
    out = Path(out)
    if out.suffix not in kinds:
        raise ValueError(
            f"{out}: unknown kind of file; expected {', '.join(kinds[:-1])} or {kinds[-1]}"
        )
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} does not exist; create it first")
    if out.suffix in KINDS:
        _matplotlib_figure()
    return out


def _matplotlib_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need the extra plot: pip install 'ddpm-fast[plot]'") from None
    return Figure
