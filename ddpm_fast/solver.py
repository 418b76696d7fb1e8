"""Solvers as tables of coefficients: which timesteps are visited, and what `kernels.ddpm_step` does at each.

A solver is first-order here when x_{t-1} is linear in x_t, the clipped x_0, the network's output and fresh noise. Then one
row of nine numbers says everything about a step, and one kernel and one loop serve every solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .kernels.ddpm_step import COLUMNS
from .schedule import Array, NoiseSchedule

PREDICTIONS = ("eps", "x_0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
SPACINGS = ("linspace", "leading", "trailing")


@dataclass(frozen=True, eq=False)
class StepTable:
    """t [R] int64, the timestep the network sees at each step, noisiest first; coef [R, 9] fp64, columns `COLUMNS`.

    `learned`: the network's second half of channels sets the variance.
    """

    t: NDArray[np.int64]
    coef: Array
    learned: bool

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(t int64 [R], coef fp32 [R, 9]) on `device`: what the sampling loop reads there."""
        return torch.from_numpy(self.t).to(device), torch.from_numpy(self.coef).float().to(device)


def choose_timesteps(total: int, steps: int | Sequence[int] | None, spacing: str = "linspace") -> NDArray[np.int64]:
    """The timesteps to visit, decreasing, each in 0..total-1.

    steps: how many; or the timesteps themselves, decreasing; or None for all of them. With n of T steps
      linspace  from T-1 to 0, both visited, rounded to the nearest; one step: T-1
      leading   0, k, 2k, ... with k = T // n: starts below T-1 unless k = 1 (diffusers' default)
      trailing  T-1, T-1 - T/n, ...: ends above 0 (Lin et al. 2024)

    ValueError for a count outside 1..total, a list that does not decrease or leaves 0..total-1, an unknown spacing.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r}; expected one of {', '.join(SPACINGS)}")
    if isinstance(steps, (Sequence, np.ndarray, torch.Tensor)):
        chosen = np.asarray(steps)
        if (
            not chosen.size
            or chosen.dtype.kind not in "iu"
            or chosen.max() >= total
            or chosen.min() < 0
            or (np.diff(chosen) >= 0).any()
        ):
            raise ValueError(f"steps {chosen.tolist()[:8]} ...; expected decreasing timesteps within 0..{total - 1}")
        return chosen.astype(np.int64)
    if steps is None:
        steps = total
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool):
        raise ValueError(f"steps = {steps!r}; expected a number of steps, or a list of timesteps")
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} steps; expected 1 to {total}, the length of the training chain")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps)
    if spacing == "trailing":
        return np.round(total - np.arange(steps) * total / steps).astype(np.int64) - 1
    return np.round(np.linspace(total - 1, 0, steps)).astype(np.int64)


def ddpm_table(
    schedule: NoiseSchedule, t: NDArray[np.int64], prediction: str = "eps", variance: str = "fixed_large", clip: float | None = 1.0
) -> StepTable:
    """Ancestral sampling, x_{t-1} ~ N(mean of q(x_{t-1} | x_t, x_0), sigma^2) (Ho et al. 2020, eq. 7 and algorithm 2).

    On a subset of steps the chain is the respaced one (Nichol & Dhariwal 2021, eq. 19). variance:
      fixed_small    sigma^2 = beta tilde, right when the data is one point (Ho, section 3.2)
      fixed_large    sigma^2 = beta, right when the data is a standard normal
      learned_range  the network interpolates log sigma^2 between the two (Nichol & Dhariwal 2021, eq. 15)
    The last step adds no noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r}; expected one of {', '.join(VARIANCES)}")
    chain = schedule.respaced(t[::-1])
    columns = _predicted_x_0(schedule, t, prediction, clip)
    columns |= dict(mean_x_0=chain.posterior_mean_x_0[::-1], mean_x=chain.posterior_mean_x_t[::-1])
    if variance == "learned_range":
        sigma = np.ones(len(t))
        with np.errstate(divide="ignore"):  # the last step's posterior variance is 0; its logarithm is not used
            columns["log_sigma_min"] = _but_last(np.log(chain.posterior_var[::-1]) / 2)
        columns["log_sigma_max"] = _but_last(np.log(chain.beta[::-1]) / 2)
    else:
        sigma = np.sqrt((chain.posterior_var if variance == "fixed_small" else chain.beta)[::-1])
    return _table(t, columns | dict(sigma=_but_last(sigma)), learned=variance == "learned_range")


def ddim_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    eta: float = 0.0,
    clip: float | None = 1.0,
    eps_from: str = "x_0",
) -> StepTable:
    """DDIM, x_{t-1} = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z (Song et al. 2021, eqs. 12 and 16).

    eta in 0..1: 0 is deterministic, 1 is DDPM's fixed_small. eps is derived from x_t and the clipped x_0, so that the two
    belong together (OpenAI), or, with eps_from="network", from the network's output as it came (diffusers' default).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}; expected 0 (deterministic) to 1 (as noisy as DDPM)")
    chain = schedule.respaced(t[::-1])
    columns = _predicted_x_0(schedule, t, prediction, clip)
    signal, noise = np.sqrt(schedule.alpha_bar[t]), np.sqrt(schedule.noise_var[t])
    sigma = eta * np.sqrt(chain.posterior_var[::-1])
    toward_eps = np.sqrt(np.maximum(chain.noise_var_prev[::-1] - sigma**2, 0))  # rounding may pass 0 at eta = 1
    signal_prev = np.sqrt(chain.alpha_bar_prev[::-1])
    if eps_from == "x_0":  # eps = (x_t - signal x_0) / noise
        columns |= dict(mean_x_0=signal_prev - toward_eps * signal / noise, mean_x=toward_eps / noise)
    elif eps_from == "network":  # the same, with the unclipped x_0 = x_0_x x_t + x_0_out out
        eps_x = np.zeros_like(noise) if prediction == "eps" else (1 - signal * columns["x_0_x"]) / noise
        eps_out = -signal * columns["x_0_out"] / noise
        columns |= dict(mean_x_0=signal_prev, mean_x=toward_eps * eps_x, mean_out=toward_eps * eps_out)
    else:
        raise ValueError(f'eps_from {eps_from!r}; expected "x_0" or "network"')
    return _table(t, columns | dict(sigma=sigma), learned=False)


SOLVERS = ("ddpm", "ddim")


def step_table(
    schedule: NoiseSchedule,
    solver: str,
    t: NDArray[np.int64],
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: float | None = 1.0,
    eta: float = 0.0,
) -> StepTable:
    """The table of a solver by name: "ddpm" reads `variance`, "ddim" reads `eta`."""
    if solver == "ddpm":
        if eta:
            raise ValueError(f'eta = {eta} belongs to solver="ddim"; "ddpm" takes its noise from variance={variance!r}')
        return ddpm_table(schedule, t, prediction, variance, clip)
    if solver == "ddim":
        return ddim_table(schedule, t, prediction, eta, clip)
    raise ValueError(f"solver {solver!r}; expected one of {', '.join(SOLVERS)}")


def _predicted_x_0(schedule: NoiseSchedule, t: NDArray[np.int64], prediction: str, clip: float | None) -> dict[str, Array]:
    """The columns of x_0 = clamp(x_0_x x_t + x_0_out out, -clip, clip), from x_t = signal x_0 + noise eps."""
    signal, noise = np.sqrt(schedule.alpha_bar[t]), np.sqrt(schedule.noise_var[t])
    if prediction == "eps":
        of_x, of_out = 1 / signal, -noise / signal
    elif prediction == "x_0":
        of_x, of_out = np.zeros_like(signal), np.ones_like(signal)
    elif prediction == "v":  # v = signal eps - noise x_0 (Salimans & Ho 2022)
        of_x, of_out = signal, -noise
    else:
        raise ValueError(f"prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip = {clip}; expected a positive bound for |x_0|, or None")
    return dict(x_0_x=of_x, x_0_out=of_out, clip=np.full(len(t), np.inf if clip is None else clip))


def _table(t: NDArray[np.int64], columns: dict[str, Array], learned: bool) -> StepTable:
    """Columns by name, absent ones zero."""
    return StepTable(t.copy(), np.stack([columns.get(name, np.zeros(len(t))) for name in COLUMNS], axis=1), learned)


def _but_last(values: Array) -> Array:
    """The same with 0 for the last step."""
    return np.append(values[:-1], 0.0)
