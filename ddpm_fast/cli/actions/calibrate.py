"""The work of ddpm-fast calibrate."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint import load_pretrained
from ...engines.fused.calibration import FILE, FLOOR, TIMES_MEDIAN, Calibration
from ...sampling.calibrate import calibrate
from ...utils.files import write_atomically
from ..common import pick_device, print_report


def calibrate_command(
    *,
    weights: Path,
    images: int,
    steps: int,
    seed: int,
    out: Path | None,
    device: str | None,
    show: bool,
    as_json: bool,
) -> None:
    """Calibrates, writes the ranges and prints a report."""
    target = _check_target(weights / FILE if out is None else out)
    checkpoint = load_pretrained(weights)
    start = time.perf_counter()
    calibration = calibrate(checkpoint, images, steps, seed, pick_device(device), show)
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
