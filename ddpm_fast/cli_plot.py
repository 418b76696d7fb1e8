"""The command line of pictures: ddpm-fast plot loss | course."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_common import PATH
from .plot import plot_course, plot_loss


@click.group()
def plot() -> None:
    """Pictures of a training run."""


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="loss.png", show_default=True, help="FILE.png, .svg or .pdf")
def loss(run: Path, out: Path) -> None:
    """Losses over images seen, from the log in RUN."""
    plot_loss(run, out)
    click.echo(f"{run} -> {out}")


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="course.png", show_default=True, help="FILE.png, .svg or .pdf")
@click.option("--rows", type=click.IntRange(1), default=10, show_default=True, help="How many moments.")
def course(run: Path, out: Path, rows: int) -> None:
    """The same images drawn over the course of training, from the grids in RUN."""
    plot_course(run, out, rows)
    click.echo(f"{run} -> {out}")
