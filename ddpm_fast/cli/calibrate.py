"""ddpm-fast calibrate: measure activation ranges for FP8."""

from __future__ import annotations

from typing import Any

import click

from ..utils.validation import seed_bits
from .common import JSON, PATH, PROGRESS, WEIGHTS, action, shows_progress


@click.command("calibrate")
@WEIGHTS
@click.option(
    "--images", type=click.IntRange(1), default=16, show_default=True, help="Number of images."
)
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="DDIM steps.")
@click.option("--seed", type=int, default=1, show_default=True, help="0 to 2^64 - 1.")
@click.option(
    "--out", type=PATH, help="FILE.json.  [default: calibration.json in the checkpoint's folder]"
)
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: cpu]")
@PROGRESS
@JSON
def calibrate_command(progress: bool | None, **options: Any) -> None:
    """Calibrate activation ranges for FP8.

    Draws images twice with the reference network in fp32. Writes, for every 3x3 convolution that
    can compute in fp8 (e4m3), its largest input, its error in fp8, and whether it stays in bf16.
    Sampler.from_pretrained, FusedUNet.from_pretrained and info --plan read the file from the
    checkpoint's folder.
    """
    seed_bits(options["seed"])
    action("calibrate").calibrate_command(show=shows_progress(progress), **options)
