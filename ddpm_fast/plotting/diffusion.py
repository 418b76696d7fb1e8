"""Plots of noise schedules, the forward process and the reverse process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.image_io import Pixels
from ..data.pixels import from_uint8, to_uint8
from ..diffusion.forward_process import q_step
from ..diffusion.presets import preset_of
from ..diffusion.schedule import NoiseSchedule
from ..kernels import noise
from ..sampling.callbacks import progress_bar
from ..sampling.request import Indices, Labels, check_indices, check_labels, indices_tensor
from ..sampling.sampler import Sampler
from ..utils.validation import seed_bits
from .style import BLUE, GREEN, GREY, LIGHT, ORANGE, PINK, figure, rgb, save, show_image

_COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)
CAPTION = 20  # height of a line of text in an animation, in pixels
_BAR, _BAR_BACKGROUND = 6, 64  # height of the progress bar in pixels; its grey level
ZERO_SNR = ", zero terminal SNR"  # suffix of the name of a rescaled schedule


def plot_schedules(schedules: Mapping[str, NoiseSchedule], out: str | Path) -> None:
    """Plots beta, alpha_bar and the signal-to-noise ratio over t.

    Args:
        schedules: Schedules by name. A name that ends in `ZERO_SNR` is a rescaled schedule, drawn
            dashed in the colour of the original one.
        out: A .png, .svg or .pdf file.
    """
    plot, axes = figure(10, 3.6, columns=3)
    originals = [name for name in schedules if not name.endswith(ZERO_SNR)]
    for name, schedule in schedules.items():
        colour = _COLOURS[originals.index(name.removesuffix(ZERO_SNR)) % len(_COLOURS)]
        line = dict(color=colour, linestyle="-" if name in originals else "--", label=name)
        t = np.arange(len(schedule)) / len(schedule)
        for a, values in zip(
            axes.flat, (schedule.beta, schedule.alpha_bar, schedule.snr), strict=True
        ):
            a.plot(t, np.where(values > 0, values, np.nan), **line)  # no 0 on a logarithmic axis
    titles = (r"$\beta_t$", r"$\bar\alpha_t$", "signal-to-noise ratio")
    for a, title, scale in zip(axes.flat, titles, ("log", "linear", "log"), strict=True):
        a.set(title=title, yscale=scale, xlabel="t / T")
    axes[0, 2].set_ylim(1e-6, 3e4)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    layout = dict(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    plot.legend(handles, labels, **layout)
    save(plot, out)


def forward_trajectory(
    schedule: NoiseSchedule, images: Pixels, seed: int, steps: int
) -> tuple[list[int], Tensor]:
    """Computes all T steps of the forward chain and records the states after `steps` of them.

    Every image is one trajectory, with the noise of image indices 0, 1, ...; the last record is the
    end of the chain. Equal to `q_chain`, without T states and noises in memory.

    Args:
        schedule: Noise schedule.
        images: uint8 [N, H, W, C].
        seed: Seed of the noise, 0 ... 2^64-1.
        steps: Number of records, 1 ... T.

    Returns:
        (t, x): the recorded timesteps and states, fp32 [steps, N, C, H, W].
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"{steps} steps; expected 1 to {len(schedule)}")
    x = from_uint8(torch.from_numpy(images))
    n, c, h, w = x.shape
    image = torch.arange(n)
    seeds = torch.full_like(image, seed_bits(seed))
    recorded, states = [round(t) for t in np.linspace(0, len(schedule), steps + 1)[1:] - 1], []
    for t in range(len(schedule)):
        rows = torch.full_like(image, t)
        x = q_step(schedule, x, t, noise.noise(seeds, image, rows, noise.Q_SAMPLE, c, h, w))
        if t in recorded:
            states.append(x)
    return recorded, torch.stack(states)


def plot_forward(
    schedule: NoiseSchedule, images: Pixels, out: str | Path, seed: int = 0, steps: int = 10
) -> None:
    """Plots a row per image uint8 [N, H, W, C]: the image, then `steps` states of the chain."""
    recorded, x = forward_trajectory(schedule, images, seed, steps)
    rows = [[image, *to_uint8(x[:, i]).numpy()] for i, image in enumerate(images)]
    titles = (
        f"t = {t}\n$\\bar\\alpha_t$ = {_short(schedule.alpha_bar[t])}\n"
        f"SNR {_short(schedule.snr[t])}"
        for t in recorded
    )
    plot = _image_table(rows, ["$x_0$", *titles], [""] * len(rows))
    plot.suptitle("Forward process $q(x_t | x_{t-1})$, one trajectory per row", fontsize=10)
    save(plot, out)


@dataclass(frozen=True)
class ReverseTrajectory:
    """Records of the reverse process. Record 0 is the start, without a prediction (mid-grey).

    Attributes:
        t: Timestep of every record [K]; -1 for the final image.
        x: States, uint8 [K, N, H, W, C].
        x_0: Predictions of x_0 in the step that led to the state, uint8 [K, N, H, W, C].
    """

    t: list[int]
    x: Pixels
    x_0: Pixels

    @property
    def titles(self) -> list[str]:
        """Title of every record."""
        return ["noise", *("image" if t < 0 else f"t = {t}" for t in self.t[1:])]


def reverse_trajectory(
    sampler: Sampler,
    indices: Indices,
    seed: int = 0,
    labels: Labels = None,
    records: int = 10,
    progress: bool = False,
    **options: Any,
) -> ReverseTrajectory:
    """Records the states of `sampler.sample(indices, seed=seed, labels=labels, **options)`.

    Args:
        sampler: The sampler.
        indices: As in `Sampler.sample`.
        seed: 0 ... 2^64-1.
        labels: As in `Sampler.sample`.
        records: Number of records after the start, evenly spaced; at most one per step.
        progress: Show a progress bar.
        **options: Solver, steps, spacing, eta and preset, as in `SamplingParams`.

    Raises:
        RuntimeError: An image contains NaN or Inf.
    """
    table, level = sampler.table(**options), preset_of(options.get("preset", "exact")).level
    image = indices_tensor(check_indices(indices))
    count = min(records, len(table))
    recorded = {round(i) for i in np.linspace(0, len(table), count + 1)[1:] - 1}
    classes = check_labels(labels, len(image), sampler.num_classes)
    sampler.refresh()
    with sampler.begin(image, seed_bits(seed), classes) as state:
        state.x_0 = torch.zeros_like(state.x) if state.x_0 is None else state.x_0
        t, x = [len(sampler.schedule)], [to_uint8(state.x, level)]
        x_0 = [to_uint8(state.x_0, level)]

        def record(step: int, _: int, x_t: Tensor) -> None:
            bar.update(len(image))
            if step in recorded:
                t.append(int(table.t[step + 1]) if step + 1 < len(table) else -1)
                x.append(to_uint8(x_t, level))
                x_0.append(to_uint8(state.x_0 if state.x_0 is not None else x_t, level))

        with progress_bar(progress, len(table) * len(image)) as bar:
            sampler.run(state, table, callback=record)
        if not state.x.isfinite().all():
            raise RuntimeError("the images contain NaN or Inf; check the weights")
    return ReverseTrajectory(t, *(torch.stack(v).cpu().numpy() for v in (x, x_0)))


def plot_reverse(trajectory: ReverseTrajectory, out: str | Path) -> None:
    """Plots two rows per image: the state x_t, and the prediction of x_0 one step before."""
    rows: list[list[Any]] = []
    for i in range(trajectory.x.shape[1]):
        rows += [[*trajectory.x[:, i]], [None, *trajectory.x_0[1:, i]]]
    labels = ["$x_t$", r"predicted $x_0$"] * trajectory.x.shape[1]
    save(_image_table(rows, trajectory.titles, labels), out)


def frames_of(trajectory: ReverseTrajectory, scale: int) -> list[Pixels]:
    """Returns an animation frame per record, uint8 [H', W', 3], with even H' and W'.

    A frame has the states with their t, the predictions of x_0, and a progress bar.
    """
    frames = []
    for k, title in enumerate(trajectory.titles):
        states, predictions = (_side_by_side(v[k], scale) for v in (trajectory.x, trajectory.x_0))
        width = states.shape[1]
        bar = np.full((_BAR, width, 3), _BAR_BACKGROUND, np.uint8)
        bar[:, : round(width * k / max(1, len(trajectory.t) - 1))] = rgb(GREEN)
        captions = (_caption(text, width) for text in (f"x_t, {title}", "predicted x_0"))
        frame = np.concatenate([next(captions), states, next(captions), predictions, bar])
        frames.append(frame[: len(frame) // 2 * 2, : width // 2 * 2].copy())  # for MP4
    return frames


def _side_by_side(images: Pixels, scale: int) -> Pixels:
    """Images uint8 [N, H, W, C] in a row with borders, enlarged: [H', W', 3]."""
    row = np.concatenate(list(np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))), axis=1)
    row = row.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.broadcast_to(row, (*row.shape[:2], 3)) if row.shape[2] == 1 else row[..., :3]


def _caption(text: str, width: int) -> Pixels:
    """A line of light text on black, uint8 [CAPTION, width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    line, font = Image.new("RGB", (width, CAPTION)), ImageFont.load_default(14)
    ImageDraw.Draw(line).text((4, CAPTION // 2), text, LIGHT, font, anchor="lm")
    return np.asarray(line)


def _image_table(rows: list[list[Any]], titles: Iterable[str], labels: list[str]) -> Any:
    """A figure with a table of small images, a title per column and a label per row."""
    height, width = len(rows), len(rows[0])
    plot, axes = figure(0.95 * width + 0.4, 0.95 * height + 0.5, height, width)
    table = np.asarray(axes).reshape(height, width)
    for a, image in zip(table.flat, (image for row in rows for image in row), strict=True):
        show_image(a, image)
    for a, title in zip(table[0], titles, strict=True):
        a.set_title(title, fontsize=8)
    for a, label in zip(table[:, 0], labels, strict=True):
        a.set_ylabel(label, fontsize=8)
    return plot


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else f"{value:.0e}"
