"""ddpm-fast calibrate: measure activation ranges for FP8."""

from __future__ import annotations

from typing import Any

import click

from ..utils.validation import seed_bits
from .common import PATH, PROGRESS, action, shows_progress


@click.command("calibrate")
@click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder.")
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate_command(progress: bool | None, **options: Any) -> None:
    """Calibrate activation ranges for FP8.

    Draws images by the reference network in fp32, twice, and writes down the largest input of every 3x3 convolution that may
    multiply in fp8 (e4m3), the error that it would make by itself, and whether it stays in bf16 therefore. The file lies in the
    checkpoint's folder, where FusedUNet.from_pretrained and info --plan look for it.
    """
    seed_bits(options["seed"])
    action("calibrate").calibrate_command(show=shows_progress(progress), **options)
