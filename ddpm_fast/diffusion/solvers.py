"""Solvers as tables of coefficients for `kernels.ddpm_step`, one row per step.

A step of any solver is linear in x_t, the clipped x_0, the network's output, the x_0 of the
previous step and the noise. One kernel and one loop therefore serve all solvers.
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
LEARNED = ("learned", "learned_range")  # predicted in the second half of the output channels
SOLVERS = ("ddpm", "ddim", "dpm++2m", "dpm++2m-sde")
ENDS = ("x_0", "t=0")


@dataclass(frozen=True, eq=False)
class StepTable:
    """Coefficients of a solver.

    Args:
        t: Timestep of each step for the network, int64 [R].
        coef: fp64 [R, 11], with the columns `kernels.ddpm_step.COLUMNS`.
        learned: The variance is predicted in the second half of the network's output channels.
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
        """True if a step uses the x_0 of the previous step."""
        return bool(self.coef[:, COLUMNS.index("mean_old")].any())

    def padded(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (t int64 [rows], coef fp32 [rows, 11]) on the CPU for a sampling loop.

        The rows after the last step leave x_t unchanged; finished images stay there.

        Raises:
            ValueError: There is no row after the last step.
        """
        if rows <= len(self):
            raise ValueError(
                f"a table of {len(self)} steps in {rows} rows; expected at least {len(self) + 1}"
            )
        identity = np.zeros((rows - len(self), len(COLUMNS)))
        identity[:, COLUMNS.index("mean_x")] = 1
        coef = torch.from_numpy(np.concatenate([self.coef, identity])).float()
        return torch.from_numpy(np.pad(self.t, (0, rows - len(self)))), coef


@dataclass(frozen=True, eq=False)
class _Steps:
    """Steps from signal x_0 + noise eps to signal_to x_0 + noise_to eps: [R] each, in order."""

    t: NDArray[np.int64]
    signal: Array
    noise: Array
    signal_to: Array
    noise_to: Array

    @classmethod
    def down(cls, chain: NoiseSchedule, t: NDArray[np.int64], end: str) -> _Steps:
        """Steps between visited timesteps; the last one leads to x_0, or to t = 0 (`end`)."""
        signal, noise, signal_to, noise_to = (
            np.sqrt(v[::-1])
            for v in (chain.alpha_bar, chain.noise_var, chain.alpha_bar_prev, chain.noise_var_prev)
        )
        if end not in ENDS:
            raise ValueError(f"end {end!r}; expected one of {', '.join(ENDS)}")
        if end == "t=0":
            if t[-1] != 0 or len(t) == 1:
                raise ValueError(
                    f'the steps end at t = {t[-1]}; expected two or more, to t = 0, for end="t=0"'
                )
            t, signal, noise, signal_to, noise_to = (
                v[:-1] for v in (t, signal, noise, signal_to, noise_to)
            )
        return cls(t, signal, noise, signal_to, noise_to)

    def predicted_x_0(self, prediction: str, clip: float | None) -> dict[str, Array]:
        """Columns of x_0 = clamp(x_0_x x_t + x_0_out out, -clip, clip)."""
        of_x, of_out = conversion(prediction, "x_0", self.signal, self.noise)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip = {clip}; expected a positive bound on |x_0|, or None")
        return dict(
            x_0_x=of_x, x_0_out=of_out, clip=np.full(len(self.t), np.inf if clip is None else clip)
        )

    def table(self, columns: dict[str, Array], learned: bool = False) -> StepTable:
        """Table of columns by name; missing columns are zero, noise rows count the steps."""
        zeros = np.zeros(len(self.t))
        columns = dict(noise_row=np.arange(len(self.t))) | columns
        coef = np.stack([columns.get(name, zeros) for name in COLUMNS], axis=1).astype(np.float64)
        return StepTable(self.t.copy(), coef, learned)


def ddpm_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: float | None = 1.0,
) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2).

    x_{t-1} ~ N(mu~_t(x_t, x_0), sigma^2) with the posterior mean mu~_t of eq. 7. A subset of the
    timesteps uses the respaced chain (Nichol & Dhariwal 2021, eq. 19). The last step adds no noise.
    `reverse_process` contains the same algorithm as a plain loop.

    Args:
        schedule: The noise schedule of training.
        t: Visited timesteps, decreasing.
        prediction: What the network predicts: "eps", "x_0" or "v".
        variance: sigma^2.
            "fixed_small": beta~_t, optimal if the data is one point (Ho et al., section 3.2);
            "fixed_large": beta_t, optimal if the data is standard normal;
            "learned": the network predicts log sigma^2;
            "learned_range": the network interpolates log sigma^2 between beta~_t and beta_t
            (Nichol & Dhariwal 2021, eq. 15).
        clip: Bound on the predicted |x_0|; None: no clipping.

    Raises:
        ValueError: An option is unknown or out of range, or x_0 is undetermined.
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
            with np.errstate(divide="ignore"):  # 0 at the last step, where it is not used
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
    """DDIM (Song et al. 2021, eqs. 12 and 16).

    x_{t-1} = sqrt(alpha_bar') x_0 + sqrt(1 - alpha_bar' - sigma^2) eps + sigma z, where alpha_bar'
    belongs to the next visited timestep.

    Args:
        schedule, t, prediction, clip: As in `ddpm_table`.
        eta: 0 (deterministic) to 1 (DDPM with fixed_small).
        eps_from: "x_0": eps is computed from x_t and the clipped x_0 (OpenAI); "network": from the
            network's output without clipping (diffusers' default).
        end: "x_0": the last step leads to the clean image; "t=0": to timestep 0.

    Raises:
        ValueError: An option is unknown or out of range, or x_0 is undetermined.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}; expected 0 (deterministic) to 1 (DDPM)")
    if eps_from not in ("x_0", "network"):
        raise ValueError(f'eps_from {eps_from!r}; expected "x_0" or "network"')
    chain = schedule.respaced(t[::-1])
    steps = _Steps.down(chain, t, end)
    sigma = eta * np.sqrt(chain.posterior_var[::-1])[: len(steps.t)]
    of_eps = np.sqrt(np.maximum(steps.noise_to**2 - sigma**2, 0))  # may round below 0 at eta = 1
    return steps.table(_ddim_mean(steps, prediction, clip, of_eps, eps_from) | dict(sigma=sigma))


def ddim_inversion_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    clip: float | None = None,
    sees: str = "source",
) -> StepTable:
    """DDIM inversion, from an image to x_t at the timestep t[0] (Song et al. 2021, section 4.3).

    Args:
        schedule, prediction: As in `ddpm_table`.
        t: Visited timesteps, decreasing as in sampling; the rows of the table increase.
        clip: As in `ddpm_table`; default: none, because clipping is not invertible.
        sees: Timestep that the network receives. "source": that of x_t, where the image counts as
            x_t at the lowest timestep; the table has one row fewer than t (OpenAI). "target": that
            of the result; the first step leads from x_0 to the lowest timestep (diffusers).

    Raises:
        ValueError: An option is unknown, eps is undetermined, or t has one timestep with "source".
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
        raise ValueError(f"t = {t.tolist()}; expected at least two timesteps for an inversion")
    return steps.table(_ddim_mean(steps, prediction, clip, steps.noise_to, "network"))


def dpm_solver_table(
    schedule: NoiseSchedule,
    t: NDArray[np.int64],
    prediction: str = "eps",
    sde: bool = False,
    clip: float | None = 1.0,
    end: str = "x_0",
) -> StepTable:
    """DPM-Solver++ 2M, a second-order multistep solver (Lu et al. 2022b, algorithm 2).

    With lambda = log(signal / noise), its step h, the previous step h_old with x_0_old, and
    D = x_0 + h / (2 h_old) (x_0 - x_0_old):

        x_{t-1} = noise'/noise x_t - signal' (e^-h - 1) D
        x_{t-1} = noise'/noise e^-h x_t - signal' (e^-2h - 1) D + noise' sqrt(1 - e^-2h) z     (sde)

    The first step, and a step to the clean image, where h is infinite, are of first order: DDIM, or
    DDPM with fixed_small if `sde`.

    Args:
        schedule, t, prediction: As in `ddpm_table`.
        sde: The stochastic form (section A of the paper).
        clip: Bound on the predicted |x_0|, which pixels need at large t; None: no clipping.
        end: As in `ddim_table`.

    Raises:
        ValueError: An option is unknown or out of range, or x_0 is undetermined.
    """
    steps = _Steps.down(schedule.respaced(t[::-1]), t, end)
    with np.errstate(divide="ignore", invalid="ignore"):  # lambda may be -inf or inf at the ends
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
    """Raises ValueError for an unknown solver, and for eta > 0 with a solver other than "ddim"."""
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if eta and solver != "ddim":
        raise ValueError(
            f'eta = {eta} with solver="{solver}"; expected 0: eta belongs to solver="ddim"'
        )


def _ddim_mean(
    steps: _Steps, prediction: str, clip: float | None, of_eps: Array, eps_from: str
) -> dict[str, Array]:
    """Columns of signal_to x_0 + of_eps eps."""
    columns = steps.predicted_x_0(prediction, clip)
    if eps_from == "network":
        eps_x, eps_out = conversion(prediction, "eps", steps.signal, steps.noise)
        return columns | dict(
            mean_x_0=steps.signal_to, mean_x=of_eps * eps_x, mean_out=of_eps * eps_out
        )
    # eps = (x_t - signal x_0) / noise
    return columns | dict(
        mean_x_0=steps.signal_to - of_eps * steps.signal / steps.noise,
        mean_x=of_eps / steps.noise,
    )


def _but_last(values: Array) -> Array:
    """`values` with 0 for the last step, which adds no noise."""
    return np.append(values[:-1], 0.0)
