"""Forward process and Algorithm 1, training (Ho et al. 2020, sections 2 and 3).

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)         (eq. 2)     `q_step`
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)     (eq. 4)     `q_jump`
    q(x_{t-1} | x_t, x_0) = N(mu~_t(x_t, x_0), beta~_t I)            (eqs. 6, 7) `q_posterior`
    L_simple = E || eps - eps_theta(x_t, t) ||^2                     (eq. 14)    `training_loss`

t = 0 ... T-1 in code is t = 1 ... T in the paper. Everything is plain PyTorch in the dtype of the
images. `Trainer` computes the same loss with the kernels `q_sample` and `noise_mse`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .schedule import NoiseSchedule


def q_step(schedule: NoiseSchedule, x: Tensor, t: int, eps: Tensor) -> Tensor:
    """Returns x_t from x_{t-1} and eps (Ho et al. 2020, eq. 2). At t = 0, `x` is the image x_0."""
    beta = float(schedule.beta[t])
    return math.sqrt(1 - beta) * x + math.sqrt(beta) * eps


def exploding_step(schedule: NoiseSchedule, x: Tensor, t: int, eps: Tensor) -> Tensor:
    """Returns x_{t-1} + sqrt(beta_t) eps: `q_step` without the factor sqrt(1 - beta_t).

    The variance grows by beta_t per step instead of tending to 1, as in Song & Ermon 2019. The
    signal is not attenuated, so the range of the network's input grows with t.
    """
    return x + math.sqrt(float(schedule.beta[t])) * eps


def q_chain(schedule: NoiseSchedule, x_0: Tensor, eps: Tensor, exploding: bool = False) -> Tensor:
    """Returns x_t for t = 0 ... N-1, computed one step at a time.

    Args:
        schedule: A schedule of T >= N steps.
        x_0: Image of any shape [...].
        eps: Noise of each step, [N, ...].
        exploding: Use `exploding_step` instead of `q_step`.

    Returns:
        [N, ...].
    """
    step, x, states = exploding_step if exploding else q_step, x_0, []
    for t, noise in enumerate(_checked(schedule, eps)):
        x = step(schedule, x, t, noise)
        states.append(x)
    return torch.stack(states)


def merged_noise(schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    """Returns for each t the noise with which `q_jump` gives the same x_t as `q_chain` does.

    n_t = sqrt(alpha_t) n_{t-1} + sqrt(beta_t) eps_t is the total noise in x_t. Variances of
    independent Gaussians add, so n_t has variance 1 - alpha_bar_t. The result is n_t over its
    standard deviation, a standard normal variable.

    Args:
        schedule: A schedule of T >= N steps.
        eps: Noise of each step, [N, ...].

    Returns:
        [N, ...].
    """
    n, merged = torch.zeros_like(eps[0]), []
    for t, noise in enumerate(_checked(schedule, eps)):
        n = q_step(schedule, n, t, noise)
        merged.append(n / math.sqrt(schedule.noise_var[t]))
    return torch.stack(merged)


def q_jump(schedule: NoiseSchedule, x_0: Tensor, t: int, eps: Tensor) -> Tensor:
    """Returns x_t from x_0 and eps in one step (Ho et al. 2020, eq. 4)."""
    return math.sqrt(schedule.alpha_bar[t]) * x_0 + math.sqrt(schedule.noise_var[t]) * eps


def q_posterior(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, float]:
    """Returns mean and variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eqs. 6 and 7).

    At t = 0 they are x_0 and 0.
    """
    mean = float(schedule.posterior_mean_x_0[t]) * x_0 + float(schedule.posterior_mean_x_t[t]) * x_t
    return mean, float(schedule.posterior_var[t])


def training_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor | None = None,
    eps: Tensor | None = None,
) -> Tensor:
    """Returns the loss of one batch, differentiable (Ho et al. 2020, Algorithm 1).

        1: repeat
        2:   x_0 ~ q(x_0)
        3:   t ~ Uniform({1, ..., T})
        4:   eps ~ N(0, I)
        5:   gradient step on || eps - eps_theta(x_t, t) ||^2, with x_t as in eq. 4
        6: until converged

    Args:
        model: eps_theta, a callable (x_t [B, C, H, W], t int64 [B]) -> [B, C, H, W].
        schedule: The noise schedule.
        x_0: Images [B, C, H, W] in [-1, 1]; the loss is computed in their dtype.
        t: Timesteps [B] in 0 ... T-1; default: uniform.
        eps: Noise [B, C, H, W]; default: standard normal.

    Returns:
        Mean squared error over all elements, a scalar.
    """
    if t is None:  # line 3
        t = torch.randint(len(schedule), (len(x_0),), device=x_0.device)
    if eps is None:  # line 4
        eps = torch.randn_like(x_0)
    signal, noise = (
        torch.from_numpy(np.sqrt(v)).to(x_0)[t][:, None, None, None]
        for v in (schedule.alpha_bar, schedule.noise_var)
    )
    return (eps - model(signal * x_0 + noise * eps, t)).square().mean()  # line 5


def _checked(schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    if not 1 <= len(eps) <= len(schedule):
        raise ValueError(
            f"eps has noise for {len(eps)} steps; expected 1 to {len(schedule)}, one per step"
        )
    return eps
