"""Start images for sampling: the forward process (SDEdit) and DDIM inversion."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.solvers import ddim_inversion_table
from ..diffusion.timesteps import Steps, choose_timesteps
from ..engines.base import default_numerics
from ..kernels.q_sample import q_sample
from ..utils.validation import integer, seed_bits
from .batch_sampler import BatchSampler
from .callbacks import progress_bar
from .request import Indices, Labels, check_indices, check_labels, indices_tensor, rows_of


def diffuse(
    sampler: BatchSampler, x_0: Tensor, t: int, indices: Indices | None = None, seed: int = 0
) -> Tensor:
    """Samples x_t of x_0 by the forward process.

    `sample(..., start=(x_t, t))` then draws variations of the images (SDEdit, Meng et al. 2022).

    Args:
        sampler: Determines schedule, shape and device.
        x_0: Images [N, C, H, W] in [-1, 1].
        t: Timestep, 0 ... T-1.
        indices: Image indices of the noise; default: 0 ... N-1.
        seed: Seed of the noise, 0 ... 2^64-1.

    Returns:
        fp32 [N, C, H, W] on the sampler's device.
    """
    device = sampler.device
    image = indices_tensor(check_indices(len(x_0) if indices is None else indices)).to(device)
    x_0, t = sampler.check_start((x_0, t), len(image))
    times, seeds = torch.full_like(image, t), torch.full_like(image, seed_bits(seed))
    coef = sampler.schedule.q_sample_table(device)
    return q_sample(x_0.to(device), coef, times, times, seeds, image)


def invert(
    sampler: BatchSampler,
    x_0: Tensor,
    steps: Steps = 50,
    labels: Labels = None,
    spacing: str = "linspace",
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[Tensor, int]:
    """DDIM inversion (Song et al. 2021, section 4.3): integrates the ODE from images to noise.

    `sample(..., solver="ddim", steps=steps, start=(x_t, t))` reconstructs x_0, up to the solver's
    error. Clipping cannot be inverted: use a sampler with clip=None.

    Args:
        sampler: A sampler without clipping.
        x_0: Images [N, C, H, W] in [-1, 1].
        steps: As in `SamplingParams`.
        labels: As in `Sampler.sample`; required if the network is class-conditional.
        spacing: As in `SamplingParams`.
        batch_size: Images per batch.
        progress: Show a progress bar.

    Returns:
        (x_t fp32 [N, C, H, W], t).
    """
    if integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size = {batch_size}; expected at least 1")
    x_0, _ = sampler.check_start((x_0, 0), len(x_0))
    if sampler.num_classes is not None and labels is None:
        raise ValueError(
            "labels is None; expected the images' classes, because the network is class-conditional"
        )
    t = choose_timesteps(len(sampler.schedule), steps, spacing)
    table = ddim_inversion_table(sampler.schedule, t, sampler.prediction)
    classes = check_labels(labels, len(x_0), sampler.num_classes)
    inverted = []
    sampler.refresh()
    with default_numerics(sampler.device):
        sampler.engine.prepare(min(batch_size, len(x_0)))
    with progress_bar(progress, len(x_0) * len(table)) as bar:
        # without a callback, an engine may compute several steps per call
        callback = (lambda step, t, x: bar.update(len(x))) if progress else None
        for rows in torch.arange(len(x_0), device="cpu").split(batch_size):
            with sampler.begin(rows, 0, rows_of(classes, rows), rows_of(x_0, rows)) as state:
                sampler.run(state, table, callback)
                inverted.append(state.x.clone())
    return torch.cat(inverted), int(t[0])
