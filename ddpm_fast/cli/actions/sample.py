"""Implementation of ddpm-fast sample."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from ...checkpoints.checkpoint import Checkpoint, load_pretrained
from ...diffusion.presets import preset_of
from ...engines.fused.calibration import load_calibration
from ...sampling.paths import images_in
from ...sampling.request import SamplingParams, check_labels
from ...sampling.sampler import Sampler
from ...sampling.sinks import open_sink
from ...utils.environment import peak_memory
from ...utils.memory import check_fits
from ...utils.signals import graceful_shutdown
from ..common import mebibytes, pick_device, print_report


def sample(
    weights: Path,
    indices: range,
    out: str,
    *,
    steps: int | str | None,
    size: tuple[int, int] | None,
    show: bool,
    seed: int,
    solver: str,
    spacing: str | None,
    eta: float,
    variance: str | None,
    preset: str,
    batch_size: int,
    label: int | None,
    device: str | None,
    dtype: str,
    engine: str,
    as_json: bool,
) -> None:
    """Draws images and prints a report."""
    params = SamplingParams(seed, solver, steps, spacing, eta, preset)
    target = pick_device(device)
    _log(show, f"loading {weights}")
    checkpoint = load_pretrained(weights)
    shape = _check_size(checkpoint, size, min(batch_size, len(indices)))
    check_labels(label, len(indices), checkpoint.unet.config.num_classes)
    preset_of(preset).timesteps(len(checkpoint.schedule), solver, steps, spacing)
    try:
        sink = open_sink(out, indices, shape)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from None
    others = sum(index not in indices for index in images_in(out))
    if others:
        message = f"{out} already has {others} images of other indices; they are not changed"
        click.echo(f"ddpm-fast: {message}", err=True)
    calibration = load_calibration(weights, checkpoint.unet) if dtype == "fp8" else None
    _log(show, "preparing the engine")
    sampler = Sampler.from_checkpoint(
        checkpoint, target, dtype, size, variance, engine, calibration
    )
    step_count = len(sampler.table(params))
    _log(show, f"drawing {len(indices)} images in {step_count} steps")
    start = time.perf_counter()
    with graceful_shutdown() as shutdown, sink:
        for first, batch in sampler.stream(
            indices, params, labels=label, batch_size=batch_size, progress=show, stop=shutdown
        ):
            sink.write(first, batch)
    seconds = time.perf_counter() - start
    report = dict(
        out=out,
        images=sink.count,
        seed=seed,
        solver=solver,
        steps=step_count,
        preset=preset,
        device=_device_name(sampler.device),
        dtype=dtype,
        engine=sampler.engine.name,
        reason=sampler.engine.reason,
        invariant=sampler.engine.invariant,
        peak_memory_bytes=peak_memory(sampler.device),
        seconds=round(seconds, 3),
        images_per_second=round(sink.count / seconds, 3),
        milliseconds_per_image_step=round(1e3 * seconds / (max(sink.count, 1) * step_count), 4),
        other_images=others,
        notes=_notes(sampler, dtype),
    )
    print_report(report, as_json, _text_of(report))
    if sink.count < len(indices):
        click.echo(f"ddpm-fast: stopped after {sink.count} of {len(indices)} images", err=True)
        sys.exit(shutdown.exit_code)


def _log(show: bool, line: str) -> None:
    if show:
        click.echo(f"ddpm-fast: {line} ...", err=True)


def _check_size(c: Checkpoint, size: tuple[int, int] | None, batch: int) -> tuple[int, int, int]:
    """Returns (C, H, W). ValueError for sides that the network cannot halve, or too much memory."""
    config = c.unet.config
    sides = size or config.size
    if sides is None:
        raise ValueError("the configuration has no sample_size; give --size HEIGHTxWIDTH")
    divisor = 2 ** (len(config.channels) - 1)
    if any(side % divisor for side in sides):
        name = "--size" if size else "sample_size of the checkpoint"
        raise ValueError(
            f"{name} is {sides[0]}x{sides[1]}; expected a height and a width divisible by {divisor}"
            + ("" if size else "; give --size HEIGHTxWIDTH")
        )
    state = 4 * config.in_channels * sides[0] * sides[1]  # bytes per image
    try:
        check_fits(batch, state, torch.device("cpu"), "give a smaller --size or --batch-size")
    except ValueError as error:
        raise ValueError(f"--size {sides[0]}x{sides[1]}: {error}") from None
    return config.in_channels, *sides


def _notes(sampler: Sampler, dtype: str) -> list[str]:
    """Notes on fp16 and bf16 on a CPU."""
    if sampler.device.type != "cpu" or dtype == "fp32" or sampler.engine.invariant:
        return []
    notes = [f"{dtype} on a CPU is not batch-invariant; --dtype fp32 is"]
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")():
        notes.append(
            f"this CPU has no {dtype} units: {dtype} is slower than fp32; use --dtype fp32"
        )
    return notes


def _text_of(r: dict[str, Any]) -> str:
    run = "{images} images of seed {seed}, {steps} {solver} steps, {dtype} on {device}".format_map(
        r
    )
    rates = (
        f"{r['images_per_second']:.2f} images/s, "
        f"{r['milliseconds_per_image_step']:.2f} ms per image per step"
    )
    invariance = "batch-invariant" if r["invariant"] else "not batch-invariant"
    memory = f"peak memory {mebibytes(r['peak_memory_bytes'])}"
    lines = [
        f"{run}: {r['seconds']:.1f} s, {rates} -> {r['out']}",
        f"engine {r['engine']} ({r['reason']}), {invariance}, {memory}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in r["notes"])])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
