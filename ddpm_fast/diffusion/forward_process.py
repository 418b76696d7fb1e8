"""The forward process, step by step and in one jump, and what it implies backwards (Ho et al. 2020, section 2).

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                       (eq. 2)     `q_step`, `q_chain`
    q(x_t | x_0)     = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)               (eq. 4)     `q_jump`
    q(x_{t-1} | x_t, x_0) = N(mu~_t(x_t, x_0), beta~_t I)                          (eqs. 6, 7) `q_posterior`

These are for reading, checking and small experiments, in whatever dtype the images have; training and sampling use
`kernels.q_sample` and `kernels.ddpm_step`, which are tested against the same formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedule import NoiseSchedule


def q_step(schedule: NoiseSchedule, x: Tensor, t: int, eps: Tensor) -> Tensor:
    """x_{t-1}, eps -> x_t, one step of the chain (Ho et al. 2020, eq. 2). At t = 0, `x` is the clean image."""
    beta = float(schedule.beta[t])
    return math.sqrt(1 - beta) * x + math.sqrt(beta) * eps


def exploding_step(schedule: NoiseSchedule, x: Tensor, t: int, eps: Tensor) -> Tensor:
    """The same without the factor sqrt(1 - beta): the variance then grows by beta_t each step instead of tending to 1.

    This is the chain of Song & Ermon 2019, whose image never fades but drowns; no network input stays in one range.
    """
    return x + math.sqrt(float(schedule.beta[t])) * eps


def q_chain(schedule: NoiseSchedule, x_0: Tensor, eps: Tensor, exploding: bool = False) -> Tensor:
    """The whole trajectory: x_0 [...], eps [N, ...] one noise per step, N <= T -> x_0 ... x_{N-1} of the schedule, [N, ...]."""
    step, x, xs = exploding_step if exploding else q_step, x_0, []
    for t, noise in enumerate(_checked(schedule, eps)):
        x = step(schedule, x, t, noise)
        xs.append(x)
    return torch.stack(xs)


def merged_noise(schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    """The single noise that takes x_0 to where the chain arrives: eps [N, ...] of the steps -> [N, ...], standard normal each.

    Two independent Gaussians add up to one: sqrt(alpha_t) n_{t-1} + sqrt(beta_t) eps_t has variance 1 - alpha_bar_t if n_{t-1}
    has 1 - alpha_bar_{t-1}. Divided by its deviation, it is the eps of `q_jump`.
    """
    n, merged = torch.zeros_like(eps[0]), []
    for t, noise in enumerate(_checked(schedule, eps)):
        n = q_step(schedule, n, t, noise)
        merged.append(n / math.sqrt(schedule.noise_var[t]))
    return torch.stack(merged)


def q_jump(schedule: NoiseSchedule, x_0: Tensor, t: int, eps: Tensor) -> Tensor:
    """x_0, eps -> x_t in one step (Ho et al. 2020, eq. 4)."""
    return math.sqrt(schedule.alpha_bar[t]) * x_0 + math.sqrt(schedule.noise_var[t]) * eps


def q_posterior(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eqs. 6 and 7); at t = 0 the image itself and 0."""
    mean = float(schedule.posterior_mean_x_0[t]) * x_0 + float(schedule.posterior_mean_x_t[t]) * x_t
    return mean, float(schedule.posterior_var[t])


def _checked(schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    if not 1 <= len(eps) <= len(schedule):
        raise ValueError(
            f"noise for {len(eps)} steps; expected 1 to {len(schedule)}, one for each of the schedule's"
        )
    return eps
