"""Options, parsers and output shared by the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..diffusion.presets import PRESETS
from ..diffusion.solvers import SOLVERS, VARIANCES
from ..diffusion.timesteps import SPACINGS
from ..sampling.request import check_indices

NETWORK_DTYPES = ("fp32", "fp16", "bf16")  # without the fused engine
PATH = click.Path(path_type=Path)


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
    first, dash, last = text.partition("-")
    try:
        indices = range(int(first), int(last) + 1) if dash else range(int(first))
    except ValueError:
        raise ValueError(
            f"--images {text}: expected a count such as 64, or a range such as 100-199"
        ) from None
    if not indices or indices[0] < 0:
        raise ValueError(
            f"--images {text}: no image selected; expected a count such as 64, or a range such as 100-199"
        )
    check_indices(indices)
    return indices


def parse_steps(text: str | None) -> int | str | None:
    """ "50" -> 50; "10,20,30" and "ddim50" are sections, which `choose_timesteps` validates."""
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def pick_device(name: str | None) -> torch.device | None:
    """A device that works; None for the default. ValueError for any other."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # the type of the error depends on the backend
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def print_report(report: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints the result of a command, as one JSON object or as text."""
    click.echo(json.dumps(report) if as_json else text)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "32x48" -> (32, 48). ValueError for anything else."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 32x48")
    return int(height), int(width)


def megabytes(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
