"""ddpm-fast plot schedule | forward | reverse | loss | course: figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..utils.validation import seed_bits
from .choices import FITS, SCHEDULES
from .common import (
    PATH,
    PROGRESS,
    action,
    parse_images,
    parse_steps,
    shows_progress,
    solver_options,
)

_PICTURE = "FILE.png, .svg or .pdf"
_MOST_IMAGES = 256


@click.group()
def plot() -> None:
    """Plot schedules, diffusion processes and training runs."""


@plot.command()
@click.option(
    "--schedule",
    "names",
    type=click.Choice(SCHEDULES),
    multiple=True,
    help="Again for several.  [default: all there are]",
)
@click.option("--weights", type=PATH, help="The schedule of this checkpoint instead.")
@click.option("--timesteps", type=click.IntRange(2, 1_000_000), help="T.  [default: 1000]")
@click.option(
    "--zero-snr", is_flag=True, help="Beside each, the same rescaled to end in pure noise."
)
@click.option("--out", type=PATH, default="schedule.png", show_default=True, help=_PICTURE)
def schedule(
    names: tuple[str, ...], weights: Path | None, timesteps: int | None, zero_snr: bool, out: Path
) -> None:
    """beta, alpha_bar and signal-to-noise ratio over t."""
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
    help="Which; again for several rows.",
)
@click.option("--resolution", type=click.IntRange(1, 8192), default=32, show_default=True)
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True)
@click.option(
    "--schedule", "name", type=click.Choice(SCHEDULES), default="linear", show_default=True
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How many moments are shown.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option("--out", type=PATH, default="forward.png", show_default=True, help=_PICTURE)
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
    """Images noised by the forward chain, step by step until nothing is left."""
    seed_bits(seed)
    action("plot").forward(data_dir, numbers, resolution, fit, name, steps, seed, out)


@plot.command()
@click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder.")
@click.option(
    "--images",
    default="4",
    show_default=True,
    help="How many, or a range of image indices such as 8-11.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@click.option("--label", type=int, help="Class of every image.  [default: random classes]")
@click.option(
    "--moments", type=click.IntRange(1), default=10, show_default=True, help="Columns of a figure."
)
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]")
@solver_options("ddpm")
@click.option(
    "--out",
    type=PATH,
    default="reverse.png",
    show_default=True,
    help=f"{_PICTURE}; .gif or .mp4 for a film",
)
@PROGRESS
def reverse(images: str, progress: bool | None, **options: Any) -> None:
    """Noise on its way to images, and below it what image the network sees in it: as a strip or as a film."""
    indices = parse_images(images)
    if len(indices) > _MOST_IMAGES:
        raise ValueError(f"--images {images}: expected at most {_MOST_IMAGES} images in a plot")
    seed_bits(options["seed"])
    options |= dict(steps=parse_steps(options["steps"]), show=shows_progress(progress))
    action("plot").reverse(indices, **options)


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="loss.png", show_default=True, help=_PICTURE)
def loss(run: Path, out: Path) -> None:
    """Losses over images seen, from the log in RUN."""
    action("plot").loss(run, out)


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="course.png", show_default=True, help=_PICTURE)
@click.option(
    "--rows", type=click.IntRange(1), default=10, show_default=True, help="How many moments."
)
def course(run: Path, out: Path, rows: int) -> None:
    """The same images drawn over the course of training, from the grids in RUN."""
    action("plot").course(run, out, rows)
