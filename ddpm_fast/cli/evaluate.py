"""ddpm-fast eval: score drawn images against real ones, or compute bits per dimension."""

from __future__ import annotations

from typing import Any

import click

from ..utils.validation import seed_bits
from .choices import FITS, NETWORK_DTYPES
from .common import PATH, PROGRESS, action, parse_steps, shows_progress, solver_options


@click.command("eval")
@click.option("--weights", type=PATH, help="Checkpoint to draw from: a diffusers folder.")
@click.option("--samples", type=PATH, help="Score these images instead: a folder, .npz or .npy.")
@click.option(
    "--data-dir", type=PATH, required=True, help="Real images: a folder, .npz, .npy or IDX files."
)
@click.option(
    "--resolution",
    type=click.IntRange(1, 8192),
    default=32,
    show_default=True,
    help="Of --samples, in pixels.",
)
@click.option(
    "--fit", type=click.Choice(FITS), default="crop", show_default=True, help="As in training."
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
    help="Compute the bound on the likelihood of real images instead.",
)
@click.option(
    "--terms",
    type=PATH,
    help="With --bits-per-dim: FILE.npz of all terms; a stopped run resumes from it.",
)
@click.option(
    "--classifier",
    type=PATH,
    help="Classifier for class scores, such as weights/fashion-mnist-classifier.safetensors.",
)
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(NETWORK_DTYPES),
    default="fp32",
    show_default=True,
    help="Of the network.",
)
@PROGRESS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(progress: bool | None, as_json: bool, **options: Any) -> None:
    """Score drawn images against real ones: KID (FID from 10,000 images up), and what a classifier finds.

    The same distance between two sets of real images, train and test, is the floor: the score of perfect images.

    With --bits-per-dim: a bound on the likelihood of the first --images real images, of the test split if there is one.
    """
    weights, samples = options["weights"], options["samples"]
    if options["bits_per_dim"]:
        if weights is None or samples is not None:
            raise ValueError(
                "bits per dimension are those of a network: give --weights, and no --samples"
            )
    elif (weights is None) == (samples is None):
        raise ValueError("give --weights to draw from, or --samples to score")
    elif options["images"] < 4:
        raise ValueError(
            f"--images is {options['images']}; KID needs at least 4; "
            "for a likelihood of fewer, give --bits-per-dim"
        )
    seed_bits(options["seed"])
    options |= dict(steps=parse_steps(options["steps"]), show=shows_progress(progress))
    action("evaluate").evaluate(as_json, options)
