"""ddpm-fast plot schedule | forward | reverse | loss | course: figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..checkpoints.checkpoint import load_pretrained
from ..data.animation import KINDS, LEAST, find_av, save_animation
from ..data.datasets import FITS, load_images
from ..diffusion.schedule import NoiseSchedule
from ..plotting.diffusion import (
    ZERO_SNR,
    frames_of,
    plot_forward,
    plot_reverse,
    plot_schedules,
    reverse_trajectory,
)
from ..plotting.style import check_out
from ..plotting.training import plot_course, plot_loss
from ..sampling.sampler import Sampler
from .common import PATH, parse_images, parse_steps, pick_device, solver_options

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": lambda timesteps: NoiseSchedule.linear(timesteps=timesteps),
    "scaled-linear": lambda timesteps: NoiseSchedule.scaled_linear(timesteps=timesteps),
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
}
_PICTURE = "FILE.png, .svg or .pdf"


@click.group()
def plot() -> None:
    """Plot schedules, diffusion processes and training runs."""


@plot.command()
@click.option(
    "--schedule",
    "names",
    type=click.Choice(list(SCHEDULES)),
    multiple=True,
    help="Again for several.  [default: all there are]",
)
@click.option("--weights", type=PATH, help="The schedule of this checkpoint instead.")
@click.option("--timesteps", type=click.IntRange(2), help="T.  [default: 1000]")
@click.option(
    "--zero-snr", is_flag=True, help="Beside each, the same rescaled to end in pure noise."
)
@click.option("--out", type=PATH, default="schedule.png", show_default=True, help=_PICTURE)
def schedule(
    names: tuple[str, ...], weights: Path | None, timesteps: int | None, zero_snr: bool, out: Path
) -> None:
    """beta, alpha_bar and signal-to-noise ratio over t."""
    check_out(out)
    if weights is not None and (names or timesteps):
        raise ValueError("give --schedule and --timesteps or --weights, not both")
    if weights is not None:
        chosen = {weights.resolve().name: load_pretrained(weights).schedule}
    else:
        chosen = {name: SCHEDULES[name](timesteps or 1000) for name in names or SCHEDULES}
    if zero_snr:
        chosen |= {f"{name}{ZERO_SNR}": s.zero_terminal_snr() for name, s in list(chosen.items())}
    plot_schedules(chosen, out)
    click.echo(f"{', '.join(chosen)} -> {out}")


@plot.command()
@click.option(
    "--data-dir", type=PATH, required=True, help="Images: a folder, .npz, .npy or IDX files."
)
@click.option(
    "--image",
    "numbers",
    type=click.IntRange(0),
    multiple=True,
    default=(0,),
    help="Which; again for several rows.",
)
@click.option("--resolution", type=click.IntRange(1), default=32, show_default=True)
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True)
@click.option(
    "--schedule", "name", type=click.Choice(list(SCHEDULES)), default="linear", show_default=True
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How many moments are shown.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option("--out", type=PATH, default="forward.png", show_default=True, help=_PICTURE)
def forward(
    data_dir: Path,
    numbers: tuple[int, ...],
    resolution: int,
    fit: str,
    name: str,
    steps: int,
    seed: int,
    out: Path,
) -> None:
    """Images noised by the forward chain, step by step until nothing is left."""
    check_out(out)
    data = load_images(data_dir, resolution, fit)
    if max(numbers) >= len(data):
        raise ValueError(
            f"--image {max(numbers)}: {data_dir} holds {len(data)} images, counted from 0"
        )
    plot_forward(SCHEDULES[name](1000), data.images[np.array(numbers)], out, seed, steps)
    click.echo(f"{data_dir} -> {out}")


@plot.command()
@click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder.")
@click.option(
    "--images",
    default="4",
    show_default=True,
    help="How many, or a range of image indices such as 8-11.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@click.option("--label", type=int, help="Class of every image.  [default: random classes]")
@click.option(
    "--moments", type=click.IntRange(1), default=10, show_default=True, help="Columns of a figure."
)
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]")
@solver_options("ddpm")
@click.option(
    "--out",
    type=PATH,
    default="reverse.png",
    show_default=True,
    help=f"{_PICTURE}; .gif or .mp4 for a film",
)
def reverse(
    weights: Path,
    images: str,
    seed: int,
    label: int | None,
    moments: int,
    device: str | None,
    variance: str | None,
    out: Path,
    **options: Any,
) -> None:
    """Noise on its way to images, and below it what image the network sees in it: as a strip or as a film."""
    check_out(out, (".png", ".svg", ".pdf", *KINDS))
    if out.suffix == ".mp4":
        find_av()
    indices = parse_images(images)
    sampler = Sampler.from_pretrained(weights, pick_device(device), variance=variance)
    if sampler.shape[0] not in (1, 3):
        raise ValueError(f"cannot plot {sampler.shape[0]}-channel images; expected 1 or 3 channels")
    film = out.suffix in KINDS
    options["steps"] = parse_steps(options["steps"])
    trajectory = reverse_trajectory(
        sampler, indices, seed, label, LEAST if film else moments, **options
    )
    if film:
        width, target = (
            len(indices) * (sampler.shape[2] + 2),
            240 if out.suffix == ".gif" else 480,
        )  # GIF cannot compress noise
        save_animation(frames_of(trajectory, max(1, math.ceil(target / width))), out)
    else:
        plot_reverse(trajectory, out)
    click.echo(
        f"{len(indices)} images of seed {seed}, {len(sampler.table(**options))} {options['solver']} steps -> {out}"
    )


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="loss.png", show_default=True, help=_PICTURE)
def loss(run: Path, out: Path) -> None:
    """Losses over images seen, from the log in RUN."""
    plot_loss(run, out)
    click.echo(f"{run} -> {out}")


@plot.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, default="course.png", show_default=True, help=_PICTURE)
@click.option(
    "--rows", type=click.IntRange(1), default=10, show_default=True, help="How many moments."
)
def course(run: Path, out: Path, rows: int) -> None:
    """The same images drawn over the course of training, from the grids in RUN."""
    plot_course(run, out, rows)
    click.echo(f"{run} -> {out}")
