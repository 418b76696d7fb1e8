"""ddpm-fast eval: compare samples with real images, or compute bits per dimension."""

from __future__ import annotations

from typing import Any

import click

from ..utils.validation import seed_bits
from .choices import FITS, NETWORK_DTYPES
from .common import (
    DEVICE,
    JSON,
    PATH,
    PROGRESS,
    action,
    parse_steps,
    shows_progress,
    solver_options,
)


@click.command("eval")
@click.option("--weights", type=PATH, help="Checkpoint to draw from: a diffusers folder.")
@click.option("--samples", type=PATH, help="Samples to compare: a folder, .npz or .npy.")
@click.option(
    "--data-dir", type=PATH, required=True, help="Real images: a folder, .npz, .npy or IDX files."
)
@click.option(
    "--resolution",
    type=click.IntRange(1, 8192),
    default=32,
    show_default=True,
    help="Size of --samples in pixels.",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    default="crop",
    show_default=True,
    help="How images that are not square are made square, as in training.",
)
@click.option(
    "--images",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Number of images; at least 4 without --bits-per-dim.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@solver_options("ddim")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per batch."
)
@click.option(
    "--bits-per-dim",
    is_flag=True,
    help="Compute bits per dimension of real images.",
)
@click.option(
    "--terms",
    type=PATH,
    help="With --bits-per-dim: FILE.npz for all terms; a stopped run resumes from it.",
)
@click.option(
    "--classifier",
    type=PATH,
    help="Classifier for class scores, such as weights/fashion-mnist-classifier.safetensors.",
)
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(NETWORK_DTYPES),
    default="fp32",
    show_default=True,
    help="Dtype of the network.",
)
@PROGRESS
@JSON
def evaluate(progress: bool | None, as_json: bool, **options: Any) -> None:
    """Compare samples with real images: KID, FID (for at least 10,000 images), class scores.

    The floor is the same distance between two sets of real images, from the training and test
    splits: the score of perfect samples.

    With --bits-per-dim: an upper bound on the negative log-likelihood of the first --images real
    images, from the test split if there is one.
    """
    weights, samples = options["weights"], options["samples"]
    if options["bits_per_dim"]:
        if weights is None or samples is not None:
            raise ValueError("--bits-per-dim needs a network: give --weights, and no --samples")
    elif (weights is None) == (samples is None):
        raise ValueError("give --weights to draw from, or --samples to compare")
    elif options["images"] < 4:
        raise ValueError(
            f"--images is {options['images']}; expected at least 4 for KID; for the likelihood of "
            "fewer images, give --bits-per-dim"
        )
    seed_bits(options["seed"])
    options |= dict(steps=parse_steps(options["steps"]), show=shows_progress(progress))
    action("evaluate").evaluate(as_json, options)
