"""ddpm-fast calibrate: measure activation ranges for FP8."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..checkpoints.checkpoint import load_pretrained
from ..engines.fused.calibration import FILE, FLOOR, TIMES_MEDIAN, Calibration
from ..sampling.calibrate import calibrate
from ..utils.files import write_atomically
from .common import PATH, pick_device, print_report


@click.command("calibrate")
@click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder.")
@click.option(
    "--images", type=click.IntRange(1), default=16, show_default=True, help="Number of images."
)
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="DDIM steps.")
@click.option("--seed", type=int, default=1, show_default=True, help="0 to 2^64 - 1.")
@click.option("--out", type=PATH, help=f"FILE.json.  [default: {FILE} in the checkpoint's folder]")
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: cpu]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate_command(
    weights: Path,
    images: int,
    steps: int,
    seed: int,
    out: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Calibrate activation ranges for FP8.

    Draws images by the reference network in fp32, twice, and writes down the largest input of every 3x3 convolution that may
    multiply in fp8 (e4m3), the error that it would make by itself, and whether it stays in bf16 therefore. The file lies in the
    checkpoint's folder, where FusedUNet.from_pretrained and info --plan look for it.
    """
    target = _check_target(weights / FILE if out is None else out)
    checkpoint = load_pretrained(weights)
    start = time.perf_counter()
    calibration = calibrate(checkpoint, images, steps, seed, pick_device(device))
    write_atomically(target, calibration.to_json())
    report = dict(
        out=str(target),
        allowed=calibration.allowed,
        seconds=round(time.perf_counter() - start, 1),
        keep_bf16=calibration.keep_bf16,
    )
    report |= dict(
        layers={name: asdict(layer) for name, layer in calibration.layers.items()},
        **calibration.made,
    )
    print_report(report, as_json, "\n".join(_lines(calibration, report)))


def _check_target(path: Path) -> Path:
    """Validates the output path before the run."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory; expected a file name")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a directory; expected a checkpoint, or --out FILE in a directory that exists"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; give --out FILE in one that can")
    return path


def _lines(c: Calibration, report: dict[str, Any]) -> list[str]:
    lines = [f"{'convolution':46} {'largest input':>13} {'error in e4m3':>13}"]
    for name, layer in c.layers.items():
        lines.append(
            f"{name:46} {layer.amax:13.4g} {layer.error:13.4f}{'  stays bf16' if layer.keep_bf16 else ''}"
        )
    rule = (
        f"{c.allowed:.4f} is allowed, the larger of {TIMES_MEDIAN:g} times the median and {FLOOR:g}"
    )
    lines.append(f"{len(c.keep_bf16) or 'none'} of {len(c.layers)} stay bf16: {rule}")
    drawn = f"{report['images']} images of seed {report['seed']} in {report['steps']} {report['solver']} steps"
    return [*lines, f"{drawn}, twice, {report['seconds']} s -> {report['out']}"]
