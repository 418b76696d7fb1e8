"""Implementation of ddpm-fast plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ...checkpoints.checkpoint import load_pretrained
from ...data.animation import KINDS, MIN_FRAMES, find_av, save_animation
from ...data.datasets import load_images
from ...diffusion.schedule import NoiseSchedule
from ...plotting.diffusion import (
    ZERO_SNR,
    frames_of,
    plot_forward,
    plot_reverse,
    plot_schedules,
    reverse_trajectory,
)
from ...plotting.style import check_out
from ...plotting.training import plot_course, plot_loss
from ...sampling.sampler import Sampler
from ..common import pick_device

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": lambda timesteps: NoiseSchedule.linear(timesteps=timesteps),
    "scaled-linear": lambda timesteps: NoiseSchedule.scaled_linear(timesteps=timesteps),
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
}


def schedule(
    names: tuple[str, ...], weights: Path | None, timesteps: int, zero_snr: bool, out: Path
) -> None:
    """Plots noise schedules."""
    check_out(out)
    if weights is not None:
        plotted = {weights.resolve().name: load_pretrained(weights).schedule}
    else:
        plotted = {name: SCHEDULES[name](timesteps) for name in names}
    if zero_snr:
        plotted |= {f"{name}{ZERO_SNR}": s.zero_terminal_snr() for name, s in plotted.items()}
    plot_schedules(plotted, out)
    click.echo(f"{', '.join(plotted)} -> {out}")


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
    """Plots the forward process."""
    check_out(out)
    data = load_images(data_dir, resolution, fit)
    if max(numbers) >= len(data):
        raise ValueError(
            f"--image is {max(numbers)}; expected 0 to {len(data) - 1}, the images of {data_dir}"
        )
    plot_forward(SCHEDULES[name](1000), data.images[np.array(numbers)], out, seed, steps)
    click.echo(f"{data_dir} -> {out}")


def reverse(
    indices: range,
    *,
    weights: Path,
    seed: int,
    label: int | None,
    columns: int,
    device: str | None,
    variance: str | None,
    out: Path,
    show: bool,
    **options: Any,
) -> None:
    """Plots the reverse process as a figure or as an animation."""
    check_out(out, (".png", ".svg", ".pdf", *KINDS))
    if out.suffix == ".mp4":
        find_av()
    sampler = Sampler.from_pretrained(weights, pick_device(device), variance=variance)
    if sampler.shape[0] not in (1, 3):
        raise ValueError(f"cannot plot {sampler.shape[0]}-channel images; expected 1 or 3 channels")
    animated = out.suffix in KINDS
    trajectory = reverse_trajectory(
        sampler, indices, seed, label, MIN_FRAMES if animated else columns, show, **options
    )
    if animated:
        width = len(indices) * (sampler.shape[2] + 2)
        target = 240 if out.suffix == ".gif" else 480  # GIF does not compress noise
        save_animation(frames_of(trajectory, max(1, math.ceil(target / width))), out)
    else:
        plot_reverse(trajectory, out)
    steps = f"{len(sampler.table(**options))} {options['solver']} steps"
    click.echo(f"{len(indices)} images of seed {seed}, {steps} -> {out}")


def loss(run: Path, out: Path) -> None:
    """Plots the losses of a training run."""
    plot_loss(run, out)
    click.echo(f"{run} -> {out}")


def course(run: Path, out: Path, rows: int) -> None:
    """Plots samples over the course of training."""
    plot_course(run, out, rows)
    click.echo(f"{run} -> {out}")
