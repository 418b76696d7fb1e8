"""ddpm-fast sample: draw images into a grid, an array file or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..sampling.paths import check_path
from ..utils.validation import seed_bits
from .choices import DTYPES, ENGINES
from .common import (
    DEVICE,
    JSON,
    PROGRESS,
    WEIGHTS,
    action,
    parse_images,
    parse_size,
    parse_steps,
    shows_progress,
    solver_options,
)


@click.command()
@WEIGHTS
@click.option(
    "--images",
    default="64",
    show_default=True,
    help="A count, or a range of image indices: 64 or 100-199 (inclusive).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@solver_options("ddpm")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per batch."
)
@click.option("--label", type=int, help="Class of every image.  [default: random classes]")
@click.option(
    "--out",
    default="samples.png",
    show_default=True,
    help="FILE.png: a grid; FILE.npz or .npy: an array; both need memory for all images and are "
    "written at the end. A directory: one PNG per image, written as soon as it is finished.",
)
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="fp32",
    show_default=True,
    help="Dtype of the network; the state is always fp32. fp8 needs the fused engine.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="Implementation of the steps.",
)
@click.option("--size", help="HEIGHTxWIDTH in pixels, such as 32x48.  [default: as trained]")
@PROGRESS
@JSON
def sample(
    weights: Path,
    images: str,
    steps: str | None,
    out: str,
    size: str | None,
    progress: bool | None,
    **options: Any,
) -> None:
    """Draw images. Image i of a seed does not depend on the batch size.

    Ctrl-C or SIGTERM stops between two steps and writes the finished images; the exit code is 130
    or 143. In an existing directory, images of the same indices are overwritten; others are not
    changed, and a line on stderr reports them.
    """
    indices = parse_images(images)
    seed_bits(options["seed"])
    try:
        check_path(out)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from None
    parsed = dict(steps=parse_steps(steps), size=parse_size(size))
    show = shows_progress(progress)
    action("sample").sample(weights, indices, out, show=show, **parsed, **options)
