"""Solvers as tables of coefficients: what `kernels.ddpm_step` does at each visited timestep.

One step makes x_{t-1} from x_t, the clipped x_0, the network's output, the x_0 of the step before and fresh noise, and it is
linear in all of them. So one row of numbers says everything about a step, and one kernel and one loop serve every solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.ddpm_step import COLUMNS
from .prediction import conversion
from .schedule import Array, NoiseSchedule

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
LEARNED = (
    "learned",
    "learned_range",
)  # the network's second half of channels says what the variance is
SOLVERS = ("ddpm", "ddim", "dpm++2m", "dpm++2m-sde")
ENDS = ("x_0", "t=0")


@dataclass(frozen=True, eq=False)
class StepTable:
    """t [R] int64, the timestep the network sees at each step; coef [R, 11] fp64, columns `COLUMNS`.

    `learned`: the network's second half of channels sets the variance.
    """

    t: NDArray[np.int64]
    coef: Array
    learned: bool = False

    def __len__(self) -> int:
        return len(self.t)

    def __repr__(self) -> str:
        ends = f", t = {self.t[0]} ... {self.t[-1]}" if len(self) else ""
        learned = ", learned variance" if self.learned else ""
        return f"StepTable({len(self)} steps{ends}{learned})"

    @property
    def multistep(self) -> bool:
        """Does any step look back at the x_0 of the step before?"""
        return bool(self.coef[:, COLUMNS.index("mean_old")].any())

    def padded(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a sampling loop reads: (t int64 [rows], coef fp32 [rows, 11]), on the CPU.

        After the last step follow rows that leave x_t as it is, where finished images rest.

        Raises:
            ValueError: `rows` leaves no place for such a row.
        """
        if rows <= len(self):
            raise ValueError(
                f"a table of {len(self)} steps in {rows} rows; expected at least {len(self) + 1}"
            )
        rest = np.zeros((rows - len(self), len(COLUMNS)))
        rest[:, COLUMNS.index("mean_x")] = 1
        coef = torch.from_numpy(np.concatenate([self.coef, rest])).float()
        return torch.from_numpy(np.pad(self.t, (0, rows - len(self)))), coef


@dataclass(frozen=True, eq=False)
class _Steps:
    """From signal x_0 + noise eps at every step to signal_to x_0 + noise_to eps: [R] each, in the order of sampling."""

    t: NDArray[np.int64]
    signal: Array
    noise: Array
    signal_to: Array
    noise_to: Array

    @classmethod
    def down(cls, chain: NoiseSchedule, t: NDArray[np.int64], end: str) -> _Steps:
        """Each step to the next visited timestep; the last to the clean image, or to timestep 0 of the chain."""
        signal, noise, signal_to, noise_to = (
            np.sqrt(v[::-1])
            for v in (chain.alpha_bar, chain.noise_var, chain.alpha_bar_prev, chain.noise_var_prev)
        )
        if end not in ENDS:
            raise ValueError(f"end {end!r}; expected one of {', '.join(ENDS)}")
        if end == "t=0":
            if t[-1] != 0 or len(t) == 1:
                raise ValueError(
                    f'the steps end at t = {t[-1]}; with end="t=0" they must go on to timestep 0'
                )
            t, signal, noise, signal_to, noise_to = (
                v[:-1] for v in (t, signal, noise, signal_to, noise_to)
            )
        return cls(t, signal, noise, signal_to, noise_to)

    def predicted_x_0(self, prediction: str, clip: float | None) -> dict[str, Array]:
        """The columns of x_0 = clamp(x_0_x x_t + x_0_out out, -clip, clip)."""
        of_x, of_out = conversion(prediction, "x_0", self.signal, self.noise)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip = {clip}; expected a positive bound for |x_0|, or None")
        return dict(
            x_0_x=of_x, x_0_out=of_out, clip=np.full(len(self.t), np.inf if clip is None else clip)
        )

    def table(self, columns: dict[str, Array], learned: bool = False) -> StepTable:
        """Columns by name; noise rows count the steps, other absent columns are zero."""
        none = np.zeros(len(self.t))
        columns = dict(noise_row=np.arange(len(self.t))) | columns
        coef = np.stack([columns.get(name, none) for name in COLUMNS], axis=1).astype(np.float64)
        return StepTable(self.t.copy(), coef, learned)


def ddpm_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: float | None = 1.0,
) -> StepTable:
    """Ancestral sampling, x_{t-1} ~ N(mean of q(x_{t-1} | x_t, x_0), sigma^2) (Ho et al. 2020, eq. 7 and algorithm 2).

    On a subset of steps the chain is the respaced one (Nichol & Dhariwal 2021, eq. 19). variance:
      fixed_small    sigma^2 = beta tilde, right when the data is one point (Ho, section 3.2)
      fixed_large    sigma^2 = beta, right when the data is a standard normal
      learned        the network says log sigma^2
      learned_range  it interpolates log sigma^2 between beta tilde and beta (Nichol & Dhariwal 2021, eq. 15)
    The last step adds no noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r}; expected one of {', '.join(VARIANCES)}")
    chain = schedule.respaced(t[::-1])
    steps = _Steps.down(chain, t, "x_0")
    columns = steps.predicted_x_0(prediction, clip)
    columns |= dict(mean_x_0=chain.posterior_mean_x_0[::-1], mean_x=chain.posterior_mean_x_t[::-1])
    if variance in LEARNED:
        sigma = np.ones(len(t))
        if variance == "learned":  # v = -1 ... 1 interpolates -1/2 ... 1/2: log sigma = v / 2
            columns |= dict(log_sigma_min=_but_last(-sigma / 2), log_sigma_max=_but_last(sigma / 2))
        else:
            with np.errstate(
                divide="ignore"
            ):  # the last step's posterior variance is 0; its logarithm is not used
                columns["log_sigma_min"] = _but_last(np.log(chain.posterior_var[::-1]) / 2)
            columns["log_sigma_max"] = _but_last(np.log(chain.beta[::-1]) / 2)
    else:
        sigma = np.sqrt((chain.posterior_var if variance == "fixed_small" else chain.beta)[::-1])
    return steps.table(columns | dict(sigma=_but_last(sigma)), learned=variance in LEARNED)


def ddim_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    eta: float = 0.0,
    clip: float | None = 1.0,
    eps_from: str = "x_0",
    end: str = "x_0",
) -> StepTable:
    """DDIM, x_{t-1} = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z (Song et al. 2021, eqs. 12 and 16).

    eta in 0..1: 0 is deterministic, 1 is DDPM's fixed_small. eps is derived from x_t and the clipped x_0, so that the two
    belong together (OpenAI), or, with eps_from="network", from the network's output as it came (diffusers' default).
    end="t=0": the last step leads to the noise of timestep 0, not to the clean image.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}; expected 0 (deterministic) to 1 (as noisy as DDPM)")
    if eps_from not in ("x_0", "network"):
        raise ValueError(f'eps_from {eps_from!r}; expected "x_0" or "network"')
    chain = schedule.respaced(t[::-1])
    steps = _Steps.down(chain, t, end)
    sigma = eta * np.sqrt(chain.posterior_var[::-1])[: len(steps.t)]
    toward_eps = np.sqrt(
        np.maximum(steps.noise_to**2 - sigma**2, 0)
    )  # rounding may pass 0 at eta = 1
    return steps.table(_toward(steps, prediction, clip, toward_eps, eps_from) | dict(sigma=sigma))


def ddim_inversion_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    clip: float | None = None,
    sees: str = "source",
) -> StepTable:
    """DDIM backwards, from an image up to t[0], the noisiest of the visited timesteps (Song et al. 2021, section 4.3).

    t is decreasing, as in sampling; the table's rows go up. sees="source": the image counts as one at the lowest timestep, and
    every step shows the network x_t with its own t (OpenAI); one row fewer than t has. sees="target": the first step leads
    from the clean image to the lowest timestep, and every step shows the network the t that it leads to (diffusers).
    Clipping x_0 makes it impossible to go back, so there is none by default.
    """
    if sees not in ("source", "target"):
        raise ValueError(f'sees {sees!r}; expected "source" or "target"')
    up = t[::-1]
    chain = schedule.respaced(up)
    level = (
        np.sqrt(np.concatenate([[1.0], chain.alpha_bar])),
        np.sqrt(np.concatenate([[0.0], chain.noise_var])),
    )
    first = 0 if sees == "target" else 1
    (signal, signal_to), (noise, noise_to) = ((v[first:-1], v[first + 1 :]) for v in level)
    steps = _Steps(up[:-1] if sees == "source" else up, signal, noise, signal_to, noise_to)
    if not len(steps.t):
        raise ValueError("one timestep leads nowhere; invert with at least two")
    return steps.table(_toward(steps, prediction, clip, steps.noise_to, "network"))


def dpm_solver_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    sde: bool = False,
    clip: float | None = 1.0,
    end: str = "x_0",
) -> StepTable:
    """DPM-Solver++ 2M: second order from two evaluations in a row (Lu et al. 2022b, algorithm 2); `sde`: its stochastic form.

    With lambda = log(signal / noise), h its step and D = x_0 + h / (2 h_before) (x_0 - x_0 of the step before),
      x_{t-1} = noise'/noise x_t - signal' (e^-h - 1) D
      x_{t-1} = noise'/noise e^-h x_t - signal' (e^-2h - 1) D + noise' sqrt(1 - e^-2h) z      (sde: section A of the paper)
    The first step is of first order, and so is one to the clean image, where h is infinite: DDIM's, or DDPM's with fixed_small
    variance. x_0 is clipped, which pixels need at large t and which none of the baselines does. end as in `ddim_table`.
    """
    steps = _Steps.down(schedule.respaced(t[::-1]), t, end)
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # lambda is -inf without signal and inf without noise
        h = np.log(steps.signal_to / steps.noise_to) - np.log(steps.signal / steps.noise)
        back = np.concatenate([[0.0], h[1:] / (2 * h[:-1])])
    back[np.isinf(h)] = 0
    gain = -steps.signal_to * np.expm1(-2 * h if sde else -h)
    columns = steps.predicted_x_0(prediction, clip)
    columns |= dict(
        mean_x_0=gain * (1 + back), mean_old=-gain * back, mean_x=steps.noise_to / steps.noise
    )
    if sde:
        columns["mean_x"] = columns["mean_x"] * np.exp(-h)
        columns["sigma"] = steps.noise_to * np.sqrt(-np.expm1(-2 * h))
    return steps.table(columns)


def check_eta(solver: str, eta: float) -> None:
    """ValueError for an unknown solver, or one that has no eta."""
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if eta and solver != "ddim":
        raise ValueError(
            f'eta = {eta} belongs to solver="ddim"; "ddpm" takes its noise from variance, "dpm++2m-sde" has its own'
        )


def _toward(
    steps: _Steps, prediction: str, clip: float | None, toward_eps: Array, eps_from: str
) -> dict[str, Array]:
    """The columns of signal_to x_0 + toward_eps eps."""
    columns = steps.predicted_x_0(prediction, clip)
    if eps_from == "network":
        eps_x, eps_out = conversion(prediction, "eps", steps.signal, steps.noise)
        return columns | dict(
            mean_x_0=steps.signal_to, mean_x=toward_eps * eps_x, mean_out=toward_eps * eps_out
        )
    # eps = (x_t - signal x_0) / noise
    return columns | dict(
        mean_x_0=steps.signal_to - toward_eps * steps.signal / steps.noise,
        mean_x=toward_eps / steps.noise,
    )


def _but_last(values: Array) -> Array:
    """The same with 0 for the last step."""
    return np.append(values[:-1], 0.0)
