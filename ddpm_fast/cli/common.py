"""Options, parsers and output shared by the commands. Imports neither torch nor numpy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .choices import PRESETS, SOLVERS, SPACINGS, VARIANCES
from .interrupts import import_interruptibly

if TYPE_CHECKING:
    import torch

PATH = click.Path(path_type=Path)

WEIGHTS = click.option(
    "--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder."
)
DEVICE = click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if available]")
PROGRESS = click.option(
    "--progress/--quiet", default=None, help="Show a progress bar.  [default: on a terminal]"
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def action(name: str) -> Any:
    """Imports a module of `cli.actions`, the implementation of a command, and torch."""
    return import_interruptibly(f".actions.{name}", __package__)


def shows_progress(progress: bool | None) -> bool:
    """Returns whether to show progress: as requested, by default if stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def solver_options(default: str) -> Callable[[Any], Any]:
    """Decorator that adds --solver, --steps, --spacing, --eta, --variance and --preset."""
    options = [
        click.option(
            "--solver",
            type=click.Choice(SOLVERS),
            default=default,
            show_default=True,
            help="Update rule.",
        ),
        click.option(
            "--steps",
            help="A count, or sections such as 10,20,30 or ddim50.  "
            "[default: all for ddpm, 50 for ddim, else 20]",
        ),
        click.option(
            "--spacing",
            type=click.Choice(SPACINGS),
            help="Selection of timesteps.  [default: the preset's; linspace for exact]",
        ),
        click.option(
            "--eta",
            type=float,
            default=0.0,
            show_default=True,
            help="Noise of ddim: 0 is deterministic, 1 is as much as ddpm.",
        ),
        click.option(
            "--variance",
            type=click.Choice(VARIANCES),
            help="Variance of ddpm.  [default: the checkpoint's]",
        ),
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            default="exact",
            show_default=True,
            help="Exact, or the conventions of another codebase.",
        ),
    ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_images(text: str) -> range:
    """Parses a count or a range: "64" -> 0 ... 63; "100-199" -> 100 ... 199."""
    expected = "expected a count such as 64, or a range such as 100-199"
    first, dash, last = text.partition("-")
    try:
        indices = range(int(first), int(last) + 1) if dash else range(int(first))
    except ValueError:
        raise ValueError(f"--images {text:.60}: {expected}") from None
    if not indices or indices[0] < 0:
        raise ValueError(f"--images {text:.60}: no image selected; {expected}")
    if indices[-1] >= 2**63 - 1:  # a range of 2^63 images has no length in Python
        raise ValueError(f"--images {text:.60}: expected image indices from 0 to 2^63 - 2")
    return indices


def parse_steps(text: str | None) -> int | str | None:
    """Parses a count: "50" -> 50. Returns sections as text; `choose_timesteps` validates them."""
    if text is None or not text.removeprefix("-").isdecimal():
        return text
    if len(text) > 18:
        raise ValueError(
            f"--steps {text:.60}: expected at most the number of timesteps of the checkpoint"
        )
    return int(text)


def pick_device(name: str | None) -> torch.device | None:
    """Returns the device of --device; None for the default. ValueError for an unavailable one."""
    from ..engines.base import check_device

    try:
        return None if name is None else check_device(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def print_report(report: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints the result of a command, as one JSON object or as text."""
    text = json.dumps(report) if as_json else text
    click.echo(printable(text))


def printable(text: str) -> str:
    """Escapes bytes that are not Unicode, such as in file names."""
    return text.encode(errors="backslashreplace").decode()


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parses a height and width: "32x48" -> (32, 48)."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    sides = [int(side) for side in (height, width) if side.isdecimal() and len(side) <= 6]
    if len(sides) != 2 or not all(sides):
        raise ValueError(f"--size {text:.60}: expected HEIGHTxWIDTH in pixels, such as 32x48")
    return sides[0], sides[1]


def mebibytes(n: int) -> str:
    """Formats a size in MiB, or in KiB below 1 MiB."""
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB" if n else "0 KiB"
