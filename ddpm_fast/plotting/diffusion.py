"""Pictures of the processes themselves: schedules, an image on its way to noise, noise on its way to an image."""

from __future__ import annotations

from collections.abc import Mapping
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
from .style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save

_COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)
CAPTION = 20  # height of a film's lines of text, in pixels
ZERO_SNR = ", zero terminal SNR"  # ends the name of a schedule that was rescaled


def plot_schedules(schedules: Mapping[str, NoiseSchedule], out: str | Path) -> None:
    """beta, alpha_bar and the signal-to-noise ratio of several schedules over t; rescaled ones beside their own, dashed."""
    picture, axes = figure(10, 3.6, columns=3)
    plain = [name for name in schedules if not name.endswith(ZERO_SNR)]
    for name, schedule in schedules.items():
        kind = plain.index(name.removesuffix(ZERO_SNR)) % len(_COLOURS)
        how = dict(color=_COLOURS[kind], linestyle="-" if name in plain else "--", label=name)
        t = np.arange(len(schedule)) / len(schedule)
        for a, values in zip(
            axes.flat, (schedule.beta, schedule.alpha_bar, schedule.snr), strict=True
        ):
            a.plot(
                t, np.where(values > 0, values, np.nan), **how
            )  # a ratio of 0 has no place on a logarithmic axis
    for a, title, scale in zip(
        axes.flat,
        ("beta", "alpha_bar", "signal-to-noise ratio"),
        ("log", "linear", "log"),
        strict=True,
    ):
        a.set(title=title, yscale=scale, xlabel="t / T")
    axes[0, 2].set_ylim(1e-6, 3e4)
    picture.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    save(picture, out)


def forward_strip(
    schedule: NoiseSchedule, images: Pixels, seed: int, steps: int
) -> tuple[list[int], Tensor]:
    """(t, x): the chain from images uint8 [N, H, W, C] through all T steps, kept at `steps` of them: x fp32 [steps, N, C, H, W].

    Neighbours belong together: it is one trajectory for each image, with the noise of image 0, 1, ... at every step. The last
    one kept is the end of the chain. Equal to `q_chain` without holding its T states and noises in memory.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"{steps} steps; expected 1 to {len(schedule)}")
    x = from_uint8(torch.from_numpy(images))
    n, c, h, w = x.shape
    image = torch.arange(n)
    seeds = torch.full_like(image, seed_bits(seed))
    kept, states = [round(t) for t in np.linspace(0, len(schedule), steps + 1)[1:] - 1], []
    for t in range(len(schedule)):
        x = q_step(
            schedule,
            x,
            t,
            noise.noise(seeds, image, torch.full_like(image, t), noise.Q_SAMPLE, c, h, w),
        )
        if t in kept:
            states.append(x)
    return kept, torch.stack(states)


def plot_forward(
    schedule: NoiseSchedule, images: Pixels, out: str | Path, seed: int = 0, steps: int = 10
) -> None:
    """Each image as a row: itself, then noised further and further by the chain."""
    kept, x = forward_strip(schedule, images, seed, steps)
    cells = [
        [images[i], *(to_uint8(x[k, i : i + 1]).numpy()[0] for k in range(len(kept)))]
        for i in range(len(images))
    ]
    words = (
        f"t = {t}\n$\\bar\\alpha_t$ = {_short(schedule.alpha_bar[t])}\nSNR {_short(schedule.snr[t])}"
        for t in kept
    )
    picture = _cells(cells, ["x_0", *words], [""] * len(cells))
    picture.suptitle(
        "q(x_t | x_{t-1}) step by step: each row is one trajectory", fontsize=10, parse_math=False
    )
    save(picture, out)


@dataclass(frozen=True)
class Reverse:
    """A trajectory: `t` [K], the states `x` and the images `x_0` that the network saw, uint8 [K, N, H, W, C].

    Number 0 is the start, where nothing has been predicted yet (mid-grey).
    """

    t: list[int]
    x: Pixels
    x_0: Pixels

    @property
    def names(self) -> list[str]:
        """What to call each moment."""
        return ["noise", *("image" if t < 0 else f"t = {t}" for t in self.t[1:])]


def reverse_trajectory(
    sampler: Sampler,
    indices: Indices,
    seed: int = 0,
    labels: Labels = None,
    moments: int = 10,
    progress: bool = False,
    **how: Any,
) -> Reverse:
    """The images that `sampler.sample(indices, seed=seed, labels=labels, **how)` draws, at `moments` steps; how: solver, steps, ...
    With `progress`, a progress bar is shown.

    RuntimeError where they come out with values that are not finite.
    """
    table, level = sampler.table(**how), preset_of(how.get("preset", "exact")).level
    image = indices_tensor(check_indices(indices))
    wanted = {round(i) for i in np.linspace(0, len(table), min(moments, len(table)) + 1)[1:] - 1}
    classes = check_labels(labels, len(image), sampler.num_classes)
    sampler.refresh()
    with sampler.begin(image, seed_bits(seed), classes) as state:
        state.x_0 = torch.zeros_like(state.x) if state.x_0 is None else state.x_0
        t, x = [len(sampler.schedule)], [to_uint8(state.x, level)]
        x_0 = [to_uint8(state.x_0, level)]

        def keep(step: int, at: int, now: Tensor) -> None:
            bar.update(len(image))
            if step in wanted:
                t.append(int(table.t[step + 1]) if step + 1 < len(table) else -1)
                x.append(to_uint8(now, level))
                x_0.append(to_uint8(state.x_0 if state.x_0 is not None else now, level))

        with progress_bar(progress, len(table) * len(image)) as bar:
            sampler.run(state, table, callback=keep)
        if not state.x.isfinite().all():
            raise RuntimeError("the images contain NaN or Inf; check the weights")
    return Reverse(t, *(torch.stack(v).cpu().numpy() for v in (x, x_0)))


def plot_reverse(trajectory: Reverse, out: str | Path) -> None:
    """Two rows for each image: the state x_t, and the image that the network saw in it one step before."""
    cells, names = [], []
    for i in range(trajectory.x.shape[1]):
        cells += [list(trajectory.x[:, i]), [None, *trajectory.x_0[1:, i]]]
        names += ["x_t", "x_0 seen"]
    save(_cells(cells, trajectory.names, names), out)


def frames_of(trajectory: Reverse, scale: int) -> list[Pixels]:
    """One picture a moment, uint8 [H', W', 3]: the states above, with their t, the predicted images below, and a bar for how far
    it is.
    """
    frames = []
    for k in range(len(trajectory.t)):
        above, below = (_row(v[k], scale) for v in (trajectory.x, trajectory.x_0))
        words = (f"x_t, {trajectory.names[k]}", "x_0 seen")
        both = np.concatenate(
            [_caption(words[0], above.shape[1]), above, _caption(words[1], above.shape[1]), below]
        )
        bar = np.full((6, both.shape[1], 3), 64, np.uint8)
        bar[:, : round(both.shape[1] * k / max(1, len(trajectory.t) - 1))] = (0, 158, 115)
        frame = np.concatenate([both, bar])
        frames.append(
            frame[: len(frame) // 2 * 2, : frame.shape[1] // 2 * 2].copy()
        )  # MP4 wants even sides
    return frames


def _row(images: Pixels, scale: int) -> Pixels:
    """uint8 [N, H, W, C] side by side with borders, enlarged: [H', W', 3]."""
    row = np.concatenate(list(np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))), axis=1)
    row = row.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.broadcast_to(row, (*row.shape[:2], 3)) if row.shape[2] == 1 else row[..., :3]


def _caption(text: str, width: int) -> Pixels:
    """A line of light text on black, uint8 [CAPTION, width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    line = Image.new("RGB", (width, CAPTION))
    ImageDraw.Draw(line).text(
        (4, CAPTION // 2), text, "#DDDDDD", ImageFont.load_default(14), anchor="lm"
    )
    return np.asarray(line)


def _cells(cells: list[list[Any]], titles: list[str], names: list[str]) -> Any:
    """A grid of small images with a title over each column and a name before each row."""
    rows, columns = len(cells), len(cells[0])
    picture, axes = figure(0.95 * columns + 0.4, 0.95 * rows + 0.5, rows, columns)
    for a, image in zip(
        np.asarray(axes).reshape(rows, columns).flat,
        (image for row in cells for image in row),
        strict=True,
    ):
        a.set_xticks([]), a.set_yticks([])
        for side in a.spines.values():
            side.set_visible(False)
        if image is not None:
            a.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    grid = np.asarray(axes).reshape(rows, columns)
    for a, title in zip(grid[0], titles, strict=True):
        a.set_title(title, fontsize=8)
    for a, name in zip(grid[:, 0], names, strict=True):
        a.set_ylabel(name, fontsize=8)
    return picture


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else f"{value:.0e}"
