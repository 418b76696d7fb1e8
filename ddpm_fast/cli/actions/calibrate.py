"""Implementation of ddpm-fast calibrate."""

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
            f"{folder} is not a directory; expected a checkpoint, or --out FILE in an existing "
            "directory"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is not writable; give --out FILE in another directory")
    return path


def _lines(c: Calibration, report: dict[str, Any]) -> list[str]:
    lines = [f"{'convolution':46} {'largest input':>13} {'error in e4m3':>13}"]
    for name, layer in c.layers.items():
        dtype = "  stays in bf16" if layer.keep_bf16 else ""
        lines.append(f"{name:46} {layer.amax:13.4g} {layer.error:13.4f}{dtype}")
    count = f"{len(c.keep_bf16)} of {len(c.layers)} convolutions stay in bf16"
    rule = f"the larger of {TIMES_MEDIAN:g} times the median and {FLOOR:g}"
    lines.append(f"{count}: error above {c.allowed:.4f}, {rule}")
    run = "{images} images of seed {seed}, {steps} {solver} steps, two runs, {seconds} s -> {out}"
    return [*lines, run.format_map(report)]
