"""Sampling loops of `bench.studies.parity`: by step table, by the papers in fp64, by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.prediction import conversion
from ddpm_fast.diffusion.reverse_process import p_mean, p_sample_loop, sampler_noise
from ddpm_fast.diffusion.solvers import StepTable
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels.ddpm_step import ddpm_step

SCHEDULE = NoiseSchedule.linear()
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # not from the code under test
SHAPE, SEED = (4, 2, 6, 5), 7
T = choose_timesteps(1000, 20, "leading")  # the spacing that all schedulers of diffusers support
NAMES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
MEAN, STD = 0.2, 0.4
Net = Callable[[Tensor, int], Tensor]


def network(prediction: str, variance: str) -> Net:
    """The exact denoiser of N(MEAN, STD^2) plus a nonlinear term; its variance depends on x."""

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
    noise = sampler_noise(SEED, range(SHAPE[0]), SHAPE[1:])[1]
    return [noise(i) for i in range(count)]


def run_table(table: StepTable, net: Net, x: Tensor) -> Tensor:
    """The loop of `Sampler` without its state."""
    x, old = x.clone(), torch.zeros_like(x)
    coef, image = table.padded(len(table) + 1)[1], torch.arange(len(x))
    seed = torch.full_like(image, SEED)
    for i, t in enumerate(table.t):
        step = torch.full_like(image, i)
        ddpm_step(x, net(x, int(t)), coef, step, seed, image, table.learned, old)
    return x


# ---- the papers' formulas, fp64


def papers(
    solver: str, prediction: str, variance: str, eta: float, clip: float | None, net: Net, x: Tensor
) -> Tensor:
    """Returns x_0 of the papers' algorithms in fp64."""
    if solver == "ddpm":
        return ddpm_loop(prediction, variance, clip, net, x.double())
    if solver == "ddim":
        return ddim_loop(prediction, eta, clip, net, x.double())
    return dpm_solver_loop(prediction, solver.endswith("sde"), clip, net, x.double())


def predict(prediction: str, net: Net, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x_0, eps, variance channels or None) of the network at step i."""
    bar, out = ALPHA_BAR[T[i]], net(x, int(T[i]))
    out, second = out.chunk(2, dim=1) if out.shape[1] > x.shape[1] else (out, None)
    if prediction == "eps":
        return (x - np.sqrt(1 - bar) * out) / np.sqrt(bar), out, second
    x_0 = out if prediction == "x_0" else np.sqrt(bar) * x - np.sqrt(1 - bar) * out
    return x_0, (x - np.sqrt(bar) * x_0) / np.sqrt(1 - bar), second


def ddpm_loop(prediction: str, variance: str, clip: float | None, net: Net, x: Tensor) -> Tensor:
    """Ho et al. 2020, Algorithm 2, on a respaced chain (Nichol & Dhariwal 2021, eqs. 15 and 19)."""
    chain, zs, last = SCHEDULE.respaced(T[::-1]), noises(len(T)), len(T) - 1
    if not variance.startswith("learned"):
        eps_of = lambda x, t: predict(prediction, net, x, last - int(t[0]))[1]
        return p_sample_loop(eps_of, chain, x, zs.__getitem__, variance, clip)
    for i, z in enumerate(zs):
        _, eps, v = predict(prediction, net, x, i)
        assert v is not None
        x = p_mean(chain, x, last - i, eps, clip)
        if i < last and variance == "learned_range":
            beta, tilde = chain.beta[last - i], chain.posterior_var[last - i]
            v = (v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(tilde)
        if i < last:
            x = x + (v / 2).exp() * z.double()
    return x


def levels(i: int) -> tuple[float, float]:
    """alpha_bar before and after step i."""
    return ALPHA_BAR[T[i]], ALPHA_BAR[T[i + 1]] if i + 1 < len(T) else 1.0


def ddim_loop(prediction: str, eta: float, clip: float | None, net: Net, x: Tensor) -> Tensor:
    """Song et al. 2021, eqs. 12 and 16."""
    for i, z in enumerate(noises(len(T))):
        bar, bar_to = levels(i)
        x_0 = predict(prediction, net, x, i)[0]
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        sigma = eta * np.sqrt((1 - bar_to) / (1 - bar) * (1 - bar / bar_to))
        eps = (x - np.sqrt(bar) * x_0) / np.sqrt(1 - bar)
        x = (
            np.sqrt(bar_to) * x_0
            + np.sqrt(max(0, 1 - bar_to - sigma**2)) * eps
            + sigma * z.double()
        )
    return x


def dpm_solver_loop(prediction: str, sde: bool, clip: float | None, net: Net, x: Tensor) -> Tensor:
    """Lu et al. 2022b, algorithm 2 and section A."""
    previous = None
    for i, z in enumerate(noises(len(T))):
        bar, bar_to = levels(i)
        x_0 = predict(prediction, net, x, i)[0]
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        lam, lam_to = (np.log(b / (1 - b)) / 2 if b < 1 else np.inf for b in (bar, bar_to))
        d = x_0
        if previous is not None and bar_to < 1:
            x_0_previous, lam_previous = previous
            d = x_0 + (lam_to - lam) / (2 * (lam - lam_previous)) * (x_0 - x_0_previous)
        previous = x_0, lam
        ratio, decay = np.sqrt((1 - bar_to) / (1 - bar)), np.exp(lam - lam_to)
        if sde:
            mean = ratio * decay * x + np.sqrt(bar_to) * (1 - decay**2) * d
            x = mean + np.sqrt(1 - bar_to) * np.sqrt(1 - decay**2) * z.double()
        else:
            x = ratio * x - np.sqrt(bar_to) * (decay - 1) * d
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
    """`default`: DDIM with the network's eps and the clipped x_0, as in diffusers' pipelines."""
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
        if variance == "learned":  # diffusers takes the variance, not its logarithm
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
