"""Sampling loops for `bench.studies.parity`: by a step table, by the papers' formulas in fp64, and by diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.prediction import conversion
from ddpm_fast.diffusion.solvers import StepTable
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels.ddpm_step import ddpm_step
from ddpm_fast.kernels.noise import REVERSE, noise_reference

SCHEDULE = NoiseSchedule.linear()
SHAPE = (4, 2, 6, 5)
T = choose_timesteps(1000, 20, "leading")  # the one spacing that every scheduler of diffusers takes
NAMES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
MEAN, STD = 0.2, 0.4
Net = Callable[[Tensor, int], Tensor]


def network(prediction: str, variance: str) -> Net:
    """Almost the exact denoiser of Gaussian data, bent a little so that nothing is linear; its variance varies too."""

    def call(x: Tensor, t: int) -> Tensor:
        a, n = np.sqrt(SCHEDULE.alpha_bar[t]), np.sqrt(SCHEDULE.noise_var[t])
        x64 = x.double()
        x_0 = (
            MEAN
            + a * STD**2 / (a * a * STD**2 + n * n) * (x64 - a * MEAN)
            + 0.1 * torch.sin(2 * x64)
        )
        of_x, of_out = conversion("x_0", prediction, a, n)
        out = of_x * x64 + of_out * x_0
        if variance == "learned":
            out = torch.cat([out, np.log(SCHEDULE.beta[t]) + 0.3 * torch.cos(x64)], dim=1)
        if variance == "learned_range":
            out = torch.cat([out, torch.cos(x64)], dim=1)
        return out.to(x.dtype)

    return call


def start() -> Tensor:
    return torch.randn(
        SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).float()


def noises(count: int) -> list[Tensor]:
    image = torch.arange(SHAPE[0])
    seed = torch.full_like(image, 7)
    return [
        noise_reference(seed, image, torch.full_like(image, i), REVERSE, SHAPE[1:])
        for i in range(count)
    ]


def run_table(table: StepTable, net: Net, x: Tensor) -> Tensor:
    """The loop of `Sampler` without its state."""
    x = x.clone()
    old = torch.zeros_like(x)
    coef, image = table.padded(len(table) + 1)[1], torch.arange(len(x))
    for i, t in enumerate(table.t):
        row = torch.full_like(image, i)
        ddpm_step(
            x, net(x, int(t)), coef, row, torch.full_like(image, 7), image, table.learned, old
        )
    return x


# ---- the papers' formulas, fp64


def papers(
    solver: str, prediction: str, variance: str, eta: float, clip: float | None, net: Net, x: Tensor
) -> Tensor:
    """Song et al. 2021 eq. 12; Ho et al. 2020 eqs. 7, 15 on Nichol & Dhariwal's respaced chain; Lu et al. 2022b, algorithm 2."""
    x, before = x.double(), None
    bar_of = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for i, z in enumerate(noises(len(T))):
        t, z = int(T[i]), z.double()
        bar, bar_to = bar_of[t], bar_of[T[i + 1]] if i + 1 < len(T) else 1.0
        out = net(x, t)
        out, second = out.chunk(2, dim=1) if variance.startswith("learned") else (out, None)
        if prediction == "eps":
            x_0 = (x - np.sqrt(1 - bar) * out) / np.sqrt(bar)
        else:
            x_0 = out if prediction == "x_0" else np.sqrt(bar) * x - np.sqrt(1 - bar) * out
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        last = i == len(T) - 1
        if solver == "ddpm":
            beta = 1 - bar / bar_to
            tilde = beta * (1 - bar_to) / (1 - bar)
            mean = (
                np.sqrt(bar_to) * beta / (1 - bar) * x_0
                + np.sqrt(bar / bar_to) * (1 - bar_to) / (1 - bar) * x
            )
            if variance == "learned" and second is not None:
                var: Any = second.exp()
            elif second is not None and not last:
                var = torch.exp((second + 1) / 2 * np.log(beta) + (1 - second) / 2 * np.log(tilde))
            else:
                var = tilde if variance == "fixed_small" else beta
            x = mean if last else mean + torch.as_tensor(var).sqrt() * z
        elif solver == "ddim":
            sigma = eta * np.sqrt((1 - bar_to) / (1 - bar) * (1 - bar / bar_to))
            eps = (x - np.sqrt(bar) * x_0) / np.sqrt(1 - bar)
            x = np.sqrt(bar_to) * x_0 + np.sqrt(max(0, 1 - bar_to - sigma**2)) * eps + sigma * z
        else:
            lam, lam_to = (np.log(b / (1 - b)) / 2 if b < 1 else np.inf for b in (bar, bar_to))
            d = x_0
            if before is not None and not last:
                x_0_before, lam_before = before
                d = x_0 + (lam_to - lam) / (2 * (lam - lam_before)) * (x_0 - x_0_before)
            before = x_0, lam
            noise, noise_to, decay = np.sqrt(1 - bar), np.sqrt(1 - bar_to), np.exp(lam - lam_to)
            if solver == "dpm++2m":
                x = noise_to / noise * x - np.sqrt(bar_to) * (decay - 1) * d
            else:
                x = (
                    noise_to / noise * decay * x
                    + np.sqrt(bar_to) * (1 - decay**2) * d
                    + noise_to * np.sqrt(1 - decay**2) * z
                )
    return x


# ---- diffusers


def diffusers_loop(
    solver: str,
    prediction: str,
    variance: str,
    eta: float,
    clip: float | None,
    net: Net,
    x: Tensor,
    default: bool = False,
) -> Tensor:
    """`default`: DDIM with the network's eps and the clipped x_0, as diffusers' pipelines run it."""
    import diffusers

    common: dict[str, Any] = dict(prediction_type=NAMES[prediction])
    scheduler: Any
    if solver == "ddpm":
        scheduler = diffusers.DDPMScheduler(
            variance_type=variance, clip_sample=clip is not None, **common
        )
    elif solver == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=clip is not None, **common)
    else:
        kind = "sde-dpmsolver++" if solver.endswith("sde") else "dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type=kind, lower_order_final=False, **common
        )
    if solver.startswith("dpm"):
        scheduler.set_timesteps(timesteps=T.tolist())
    else:
        scheduler.set_timesteps(len(T))
    for i, z in enumerate(noises(len(T))):
        out = net(x, int(T[i]))
        if variance == "learned":  # it takes the variance itself, not its logarithm
            mean, log_var = out.chunk(2, dim=1)
            out = torch.cat([mean, log_var.exp()], dim=1)
        options: dict[str, Any] = {}
        if solver == "ddim":
            options = dict(eta=eta, use_clipped_model_output=not default, variance_noise=z)
        elif solver.endswith("sde"):
            options = dict(variance_noise=z)
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: z):
            x = scheduler.step(out, int(T[i]), x, **options).prev_sample
    return x


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).abs().max() / exact.double().abs().max())
