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

PROGRESS = click.option(
    "--progress/--quiet", default=None, help="Show a progress bar.  [default: on a terminal]"
)


def action(name: str) -> Any:
    """The module of `cli.actions` with the work of a command; imports torch."""
    return import_interruptibly(f".actions.{name}", __package__)


def shows_progress(progress: bool | None) -> bool:
    """Whether progress is shown: as requested, by default if stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def solver_options(default: str) -> Callable[[Any], Any]:
    """--solver, --steps, --spacing, --eta, --variance and --preset."""
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
            help="A count, or sections such as 10,20,30 or ddim50.  [default: all for ddpm, 50 for ddim, else 20]",
        ),
        click.option(
            "--spacing",
            type=click.Choice(SPACINGS),
            help="Selection of timesteps, if not all.  [default: the preset's, linspace]",
        ),
        click.option(
            "--eta",
            type=float,
            default=0.0,
            show_default=True,
            help="Noise of ddim: 0 is deterministic, 1 as much as ddpm.",
        ),
        click.option(
            "--variance",
            type=click.Choice(VARIANCES),
            help="Noise of ddpm.  [default: the checkpoint's]",
        ),
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            default="exact",
            show_default=True,
            help="Conventions of this codebase.",
        ),
    ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_images(text: str) -> range:
    """ "64" -> images 0..63; "100-199" -> images 100..199. ValueError for anything else."""
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
    """ "50" -> 50; "10,20,30" and "ddim50" are sections, which `choose_timesteps` validates."""
    if text is None or not text.removeprefix("-").isdecimal():
        return text
    if len(text) > 18:
        raise ValueError(f"--steps {text:.60}: expected at most the timesteps of the checkpoint")
    return int(text)


def pick_device(name: str | None) -> torch.device | None:
    """A device that works; None for the default. ValueError for any other."""
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # the type of the error depends on the backend
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def print_report(report: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints the result of a command, as one JSON object or as text."""
    text = json.dumps(report) if as_json else text
    click.echo(printable(text))


def printable(text: str) -> str:
    """The text with escapes for what is not Unicode: file names are bytes."""
    return text.encode(errors="backslashreplace").decode()


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "32x48" -> (32, 48). ValueError for anything else."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    sides = [int(side) for side in (height, width) if side.isdecimal() and len(side) <= 6]
    if len(sides) != 2 or not all(sides):
        raise ValueError(f"--size {text:.60}: expected HEIGHTxWIDTH in pixels, such as 32x48")
    return sides[0], sides[1]


def mebibytes(n: int) -> str:
    """A size in MiB, a small one in KiB."""
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB" if n else "0 KiB"
