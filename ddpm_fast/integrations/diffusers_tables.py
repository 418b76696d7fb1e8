"""Step tables of diffusers' scheduler objects, in fp64.

A table reproduces what `scheduler.step` computes after `set_timesteps`, with the conventions of
diffusers where they differ from the papers: the previous timestep of DDIM, the clipped posterior
variance of DDPM, the lower order of the last steps of DPM-Solver++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diffusion.prediction import conversion
from ..diffusion.schedule import Array
from ..diffusion.solvers import StepTable
from ..kernels.ddpm_step import COLUMNS

PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
MIN_VARIANCE = 1e-20  # diffusers' lower bound of the posterior variance


class UnsupportedError(ValueError):
    """A scheduler, network or pipeline that ddpm_fast cannot run as diffusers does."""


@dataclass(frozen=True, eq=False)
class SchedulerTable:
    """Step table of a scheduler.

    Attributes:
        steps: The table.
        draws: [R] bool, the steps in which the scheduler draws noise from the generator.
        draws_fp32: Whether it draws fp32 noise, instead of noise in the dtype of the network.
    """

    steps: StepTable
    draws: NDArray[np.bool_]
    draws_fp32: bool = False


def check_scheduler(scheduler: Any) -> type:
    """The class of diffusers whose steps the scheduler computes.

    Raises:
        UnsupportedError: It is of another class, or a subclass with another `step`.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    for kind in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        step = type(scheduler).step if isinstance(scheduler, kind) else None
        if step is not None and getattr(step, "computes", step) is kind.step:
            return kind
    raise UnsupportedError(
        f"the scheduler is {type(scheduler).__name__}; expected DDPMScheduler, DDIMScheduler or "
        "DPMSolverMultistepScheduler"
    )


def scheduler_table(
    scheduler: Any, eta: float = 0.0, use_clipped_model_output: bool = False
) -> SchedulerTable:
    """Step table of a DDPM, DDIM or DPMSolverMultistep scheduler after `set_timesteps`.

    Args:
        scheduler: The scheduler object. Its timesteps, betas (or sigmas) and configuration are read.
        eta: Noise scale of DDIM (Song et al. 2021, eq. 16), 0 to 1.
        use_clipped_model_output: DDIM derives eps from the clipped x_0.

    Raises:
        UnsupportedError: The scheduler is of another class, or uses an option without a step table.
    """
    kind = check_scheduler(scheduler)
    if scheduler.config.thresholding:
        raise UnsupportedError("the scheduler has thresholding=True; expected False")
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise UnsupportedError(
            f"the scheduler has prediction_type={scheduler.config.prediction_type!r}; "
            f"expected one of {', '.join(PREDICTIONS)}"
        )
    try:
        if kind.__name__ == "DDIMScheduler":
            table = _ddim(scheduler, eta, use_clipped_model_output)
        else:
            table = (_ddpm if kind.__name__ == "DDPMScheduler" else _dpm_solver)(scheduler)
    except UnsupportedError:
        raise
    except ValueError as error:  # no signal at a timestep
        raise UnsupportedError(str(error)) from None
    coef = np.delete(table.steps.coef, COLUMNS.index("clip"), axis=1)  # may be infinite
    if not np.isfinite(coef).all():
        raise UnsupportedError("the coefficients of the scheduler contain NaN or Inf")
    return table


def _timesteps(scheduler: Any) -> NDArray[np.int64]:
    return np.asarray(scheduler.timesteps.cpu(), dtype=np.int64)


def _alpha_bar(scheduler: Any) -> Array:
    return np.cumprod(1 - scheduler.betas.double().numpy())


def _table(t: NDArray[np.int64], columns: dict[str, Any], learned: bool = False) -> StepTable:
    values = dict(noise_row=np.arange(len(t)), clip=np.inf) | columns
    coef = np.zeros((len(t), len(COLUMNS)))
    for k, name in enumerate(COLUMNS):
        coef[:, k] = values.get(name, 0)
    return StepTable(t, coef, learned)


def _x_0_columns(scheduler: Any, signal: Array, noise: Array) -> dict[str, Any]:
    of_x, of_out = conversion(PREDICTIONS[scheduler.config.prediction_type], "x_0", signal, noise)
    return dict(x_0_x=of_x, x_0_out=of_out)


def _clip(scheduler: Any) -> float:
    c = scheduler.config
    return float(c.clip_sample_range) if c.clip_sample else np.inf


def _ddpm(scheduler: Any) -> SchedulerTable:
    """Ancestral sampling (Ho et al. 2020, eq. 7); each step leads to the next visited timestep."""
    t, bar = _timesteps(scheduler), _alpha_bar(scheduler)
    kind = scheduler.variance_type
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        raise UnsupportedError(
            f"the scheduler has variance_type={kind!r}; expected fixed_small, fixed_small_log, "
            "fixed_large or learned_range"
        )
    abar, abar_prev = bar[t], np.append(bar[t[1:]], 1.0)
    beta = 1 - abar / abar_prev
    draws = t > 0
    variance = np.maximum((1 - abar_prev) / (1 - abar) * beta, MIN_VARIANCE)
    columns = _x_0_columns(scheduler, np.sqrt(abar), np.sqrt(1 - abar))
    columns |= dict(
        clip=_clip(scheduler),
        mean_x_0=np.sqrt(abar_prev) * beta / (1 - abar),
        mean_x=np.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar),
    )
    if kind == "learned_range":
        columns |= dict(
            sigma=draws * 1.0, log_sigma_min=np.log(variance) / 2, log_sigma_max=np.log(beta) / 2
        )
    else:
        columns["sigma"] = draws * np.sqrt(beta if kind == "fixed_large" else variance)
    return SchedulerTable(_table(t, columns, kind == "learned_range"), draws)


def _ddim(scheduler: Any, eta: float, use_clipped_model_output: bool) -> SchedulerTable:
    """DDIM (Song et al. 2021, eqs. 12 and 16); each step leads to timestep t - T // N."""
    if not 0 <= eta <= 1:
        raise UnsupportedError(f"eta is {eta}; expected 0 to 1")
    t, bar = _timesteps(scheduler), _alpha_bar(scheduler)
    prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = bar[0] if not scheduler.config.set_alpha_to_one else 1.0
    abar, abar_prev = bar[t], np.where(prev >= 0, bar[prev], final)
    with np.errstate(invalid="ignore"):
        sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        toward_eps = np.sqrt(np.maximum(1 - abar_prev - sigma**2, 0))
    columns = _x_0_columns(scheduler, np.sqrt(abar), np.sqrt(1 - abar))
    columns |= dict(clip=_clip(scheduler), sigma=sigma)
    if use_clipped_model_output:  # eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)
        columns["mean_x_0"] = np.sqrt(abar_prev) - toward_eps * np.sqrt(abar / (1 - abar))
        columns["mean_x"] = toward_eps / np.sqrt(1 - abar)
    else:
        prediction = PREDICTIONS[scheduler.config.prediction_type]
        eps_x, eps_out = conversion(prediction, "eps", np.sqrt(abar), np.sqrt(1 - abar))
        columns["mean_x_0"] = np.sqrt(abar_prev)
        columns["mean_x"], columns["mean_out"] = toward_eps * eps_x, toward_eps * eps_out
    return SchedulerTable(_table(t, columns), np.full(len(t), eta > 0))


def _dpm_solver(scheduler: Any) -> SchedulerTable:
    """DPM-Solver++ of order 1 or 2 (Lu et al. 2022b), from the scheduler's sigmas = noise / signal."""
    c, t = scheduler.config, _timesteps(scheduler)
    if c.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++") or c.solver_order > 2:
        raise UnsupportedError(
            f"the scheduler has algorithm_type={c.algorithm_type!r} and "
            f"solver_order={c.solver_order}; expected (sde-)dpmsolver++ of order 1 or 2"
        )
    if c.use_flow_sigmas:
        raise UnsupportedError("the scheduler has use_flow_sigmas=True; expected False")
    if len(t) > 1 and t[0] == t[1]:
        raise UnsupportedError(f"the scheduler visits timestep {t[0]} twice at the start")
    ratio = scheduler.sigmas.double().cpu().numpy()
    signal = 1 / np.sqrt(1 + ratio**2)
    noise = ratio * signal
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(signal[1:] / noise[1:]) - np.log(signal[:-1] / noise[:-1])
    columns = _x_0_columns(scheduler, signal[:-1], noise[:-1])
    sde = c.algorithm_type.startswith("sde")
    decay = np.exp(-h)
    gain = -signal[1:] * np.expm1(-2 * h if sde else -h)
    columns["mean_x"] = noise[1:] / noise[:-1] * (decay if sde else 1)
    if sde:
        columns["sigma"] = noise[1:] * np.sqrt(-np.expm1(-2 * h))
    second = _second_order_weight(scheduler, signal[1:], gain, h, sde)
    columns["mean_x_0"], columns["mean_old"] = gain + second, -second
    return SchedulerTable(_table(t, columns), np.full(len(t), sde), draws_fp32=True)


def _second_order_weight(
    scheduler: Any, signal_to: Array, gain: Array, h: Array, sde: bool
) -> Array:
    """Weight of x_0 - (x_0 of the step before); 0 in steps of first order."""
    c, count = scheduler.config, len(h)
    second = np.full(count, c.solver_order == 2)
    second[:1] = False
    if c.euler_at_final or c.final_sigmas_type == "zero" or (c.lower_order_final and count < 15):
        second[-1] = False
    weight = np.zeros(count)
    i = np.flatnonzero(second)
    if c.solver_type == "heun":
        exponent = 2 * h[i] if sde else h[i]
        weight[i] = signal_to[i] * (np.expm1(-exponent) / exponent + 1)
    else:
        weight[i] = gain[i] / 2
    weight[i] *= h[i] / h[i - 1]
    return weight
