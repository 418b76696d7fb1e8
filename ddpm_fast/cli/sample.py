"""ddpm-fast sample: draw images into a grid, an array file or a folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from ..engines.base import DTYPES
from ..engines.select import ENGINES
from ..sampling.request import SamplingParams
from ..sampling.sampler import Sampler
from ..sampling.sinks import check_path, open_sink
from ..utils.environment import peak_memory
from ..utils.signals import graceful_shutdown
from .common import (
    PATH,
    megabytes,
    parse_images,
    parse_size,
    parse_steps,
    pick_device,
    print_report,
    solver_options,
)


@click.command()
@click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder.")
@click.option(
    "--images",
    default="64",
    show_default=True,
    help="A count, or a range of image indices: 64 or 100-199 (inclusive).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@solver_options("ddpm")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images per batch.")
@click.option("--label", type=int, help="Class of every image.  [default: random classes]")
@click.option(
    "--out",
    default="samples.png",
    show_default=True,
    help="FILE.png: a grid; FILE.npz or .npy: an array; a directory: one PNG per image.",
)
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Of the network; the state is always fp32. fp8: with the fused engine.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="What computes the steps.",
)
@click.option("--size", help="HEIGHTxWIDTH in pixels, such as 32x48.  [default: as trained]")
@click.option(
    "--progress/--quiet", default=None, help="Show a progress bar.  [default: on a terminal]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sample(
    weights: Path,
    images: str,
    seed: int,
    solver: str,
    steps: str | None,
    spacing: str | None,
    eta: float,
    variance: str | None,
    preset: str,
    batch_size: int,
    label: int | None,
    out: str,
    device: str | None,
    dtype: str,
    engine: str,
    size: str | None,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Draw images. Image i of a seed does not depend on the batch size.

    Ctrl-C or SIGTERM stops between two steps and keeps the images that are finished.
    """
    indices = parse_images(images)
    _checked(check_path, out)
    sampler = Sampler.from_pretrained(
        weights, pick_device(device), dtype, parse_size(size), variance, engine
    )
    sink = _checked(open_sink, out, indices, sampler.shape[0], sampler.shape[1:])
    params = SamplingParams(seed, solver, parse_steps(steps), spacing, eta, preset)
    step_count = len(sampler.table(params))
    show = sys.stderr.isatty() if progress is None else progress
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
    )
    print_report(report, as_json, _text_of(report))
    if sink.count < len(indices):
        click.echo(f"ddpm-fast: stopped after {sink.count} of {len(indices)} images", err=True)
        sys.exit(shutdown.exit_code)


def _checked(function: Any, *arguments: Any) -> Any:
    """Names the flag in the errors of a function that validates the output path."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from None


def _text_of(r: dict[str, Any]) -> str:
    run = f"{r['images']} images of seed {r['seed']}, {r['steps']} {r['solver']} steps, {r['dtype']} on {r['device']}"
    rates = f"{r['images_per_second']:.2f} images/s, {r['milliseconds_per_image_step']:.2f} ms per image per step"
    invariance = "batch-invariant" if r["invariant"] else "not batch-invariant"
    return (
        f"{run}: {r['seconds']:.1f} s, {rates} -> {r['out']}\n"
        f"engine {r['engine']} ({r['reason']}), {invariance}, peak memory {megabytes(r['peak_memory_bytes'])}"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
