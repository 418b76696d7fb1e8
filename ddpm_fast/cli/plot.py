"""ddpm-fast plot: figures of schedules, diffusion processes and training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..utils.validation import seed_bits
from .choices import FITS, SCHEDULES
from .common import (
    DEVICE,
    PATH,
    PROGRESS,
    WEIGHTS,
    action,
    parse_images,
    parse_steps,
    shows_progress,
    solver_options,
)

_OUT = "FILE.png, .svg or .pdf."
_MAX_IMAGES = 256


@click.group()
def plot() -> None:
    """Plot schedules, diffusion processes and training runs."""


@plot.command()
@click.option(
    "--schedule",
    "names",
    type=click.Choice(SCHEDULES),
    multiple=True,
    help="Schedule; repeat the option for several.  [default: all]",
)
@click.option("--weights", type=PATH, help="Plot the schedule of this checkpoint.")
@click.option(
    "--timesteps", type=click.IntRange(2, 1_000_000), help="Number of timesteps.  [default: 1000]"
)
@click.option("--zero-snr", is_flag=True, help="Also plot schedules rescaled to zero terminal SNR.")
@click.option("--out", type=PATH, default="schedule.png", show_default=True, help=_OUT)
def schedule(
    names: tuple[str, ...], weights: Path | None, timesteps: int | None, zero_snr: bool, out: Path
) -> None:
    """Plot noise schedules: beta, alpha_bar, SNR."""
    if weights is not None and (names or timesteps):
        raise ValueError("give --schedule and --timesteps or --weights, not both")
    action("plot").schedule(names or SCHEDULES, weights, timesteps or 1000, zero_snr, out)


@plot.command()
@click.option(
    "--data-dir", type=PATH, required=True, help="Images: a folder, .npz, .npy or IDX files."
)
@click.option(
    "--image",
    "numbers",
    type=click.IntRange(0),
    multiple=True,
    default=(0,),
    help="Index of an image; repeat the option for several rows.  [default: 0]",
)
@click.option(
    "--resolution",
    type=click.IntRange(1, 8192),
    default=32,
    show_default=True,
    help="Size of the images in pixels.",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    default="crop",
    show_default=True,
    help="How images that are not square are made square.",
)
@click.option(
    "--schedule",
    "name",
    type=click.Choice(SCHEDULES),
    default="linear",
    show_default=True,
    help="Noise schedule of 1000 timesteps.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=10, show_default=True, help="Columns of the figure."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--out", type=PATH, default="forward.png", show_default=True, help=_OUT)
def forward(
    data_dir: Path,
    numbers: tuple[int, ...],
    resolution: int,
    fit: str,
    name: str,
    steps: int,
    seed: int,
    out: Path,
) -> None:
    """Plot the forward process, from images to noise."""
    seed_bits(seed)
    action("plot").forward(data_dir, numbers, resolution, fit, name, steps, seed, out)


@plot.command()
@WEIGHTS
@click.option(
    "--images",
    default="4",
    show_default=True,
    help="A count, or a range of image indices such as 8-11.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@click.option("--label", type=int, help="Class of every image.  [default: random classes]")
@click.option(
    "--columns",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Columns of the figure, after the first.",
)
@DEVICE
@solver_options("ddpm")
@click.option(
    "--out",
    type=PATH,
    default="reverse.png",
    show_default=True,
    help="FILE.png, .svg or .pdf; .gif or .mp4 for an animation.",
)
@PROGRESS
def reverse(images: str, progress: bool | None, **options: Any) -> None:
    """Plot the reverse process, from noise to images.

    The figure or animation has the states x_t and the predictions of x_0.
    """
    indices = parse_images(images)
    if len(indices) > _MAX_IMAGES:
        raise ValueError(f"--images {images}: expected at most {_MAX_IMAGES} images in a plot")
    seed_bits(options["seed"])
    options |= dict(steps=parse_steps(options["steps"]), show=shows_progress(progress))
    action("plot").reverse(indices, **options)


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="loss.png", show_default=True, help=_OUT)
def loss(run: Path, out: Path) -> None:
    """Plot the losses of a training run.

    RUN is the directory of the run, which has the log.
    """
    action("plot").loss(run, out)


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="course.png", show_default=True, help=_OUT)
@click.option(
    "--rows", type=click.IntRange(1), default=10, show_default=True, help="Rows of the figure."
)
def course(run: Path, out: Path, rows: int) -> None:
    """Plot samples over the course of training.

    RUN is the directory of a training run with sample grids.
    """
    action("plot").course(run, out, rows)
