"""The noise schedule: how fast the forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) destroys an image.

Everything is fp64 and exact at both ends. Index t = 0 ... T-1 here is t = 1 ... T in Ho et al. 2020; x_0 in a formula is
always the clean image, so `alpha_bar[0]` belongs to the first noisy one and "alpha_bar before t = 0" is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..utils.validation import shown

Array = NDArray[np.float64]
MAX_TIMESTEPS = 2**24 - 1  # the noise counts steps in 24 bits
MIN_BETA = float(np.finfo(np.float32).tiny)  # below it, fp32 has no normal number


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """beta_t for t = 0 ... T-1 and every quantity the papers derive from it, as fp64 arrays [T].

    Make one with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_betas` or `from_alpha_bar`. ValueError for a beta
    outside [1.2e-38, 1), one that is not finite, none at all or more than 2^24 - 1. The last beta may be 1: no signal is
    left then (`zero_terminal_snr`). Schedules with the same betas are equal and have the same hash.
    """

    beta: Array

    def __post_init__(self) -> None:
        beta = _array("beta", self.beta).copy()
        if beta.ndim != 1 or not 1 <= beta.size <= MAX_TIMESTEPS:
            raise ValueError(
                f"beta has shape {beta.shape}; expected [T] with T from 1 to {MAX_TIMESTEPS}"
            )
        right = (beta >= MIN_BETA) & (beta < 1)  # NaN fails both comparisons
        right[-1] |= beta[-1] == 1
        bad = np.flatnonzero(~right)
        if bad.size:
            raise ValueError(
                f"beta[{bad[0]}] = {beta[bad[0]]}; every beta must lie strictly between 0 and 1, "
                f"and at least at {MIN_BETA:.2g} ({bad.size} do not)"
            )
        object.__setattr__(self, "beta", _frozen(beta))

    def __repr__(self) -> str:
        first, last, left = self.beta[0], self.beta[-1], self.alpha_bar[-1]
        return (
            f"NoiseSchedule(T={len(self)}, beta={first:.4g}..{last:.4g}, alpha_bar[-1]={left:.4g})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return np.array_equal(self.beta, other.beta)

    def __hash__(self) -> int:
        return hash(self.beta.tobytes())

    def __reduce__(self) -> tuple[type[NoiseSchedule], tuple[Array]]:
        return NoiseSchedule, (
            self.beta,
        )  # NumPy would copy the array without its write protection

    # ---- families

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, timesteps: int = 1000) -> NoiseSchedule:
        """beta from `start` to `end` in equal steps (Ho et al. 2020, section 4)."""
        start, end = _beta("start", start), _beta("end", end)
        return cls(np.linspace(start, end, _count(timesteps)))

    @classmethod
    def scaled_linear(
        cls, start: float = 1e-4, end: float = 0.02, timesteps: int = 1000
    ) -> NoiseSchedule:
        """sqrt(beta) in equal steps (Rombach et al. 2022, and "quad" in Ho et al.'s code)."""
        root_start, root_end = np.sqrt(_beta("start", start)), np.sqrt(_beta("end", end))
        return cls(np.linspace(root_start, root_end, _count(timesteps)) ** 2)

    @classmethod
    def cosine(
        cls, timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """alpha_bar = cos^2 of a quarter turn, beta at most `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
        offset = _number("offset", offset, 0, 1)
        return cls._from_alpha_bar(
            lambda u: np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2, timesteps, max_beta
        )

    @classmethod
    def sigmoid(
        cls,
        timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
    ) -> NoiseSchedule:
        """alpha_bar falls as a sigmoid from `start` to `end` at temperature `tau` (Jabri et al. 2022, algorithm 1)."""
        start, end = _number("start", start, -1e3, 1e3), _number("end", end, -1e3, 1e3)
        tau = _number("tau", tau, 1e-6, 1e6)
        sigmoid = lambda u: 1 / (1 + np.exp(-(u * (end - start) + start) / tau))
        return cls._from_alpha_bar(
            lambda u: (sigmoid(1.0) - sigmoid(u)) / (sigmoid(1.0) - sigmoid(0.0)),
            timesteps,
            max_beta,
        )

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Array) -> NoiseSchedule:
        """Any beta [T], each in (0, 1)."""
        return cls(_array("betas", betas))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Sequence[float] | Array) -> NoiseSchedule:
        """The chain through any alpha_bar [T], decreasing within (0, 1); the last may be 0."""
        bar = np.concatenate([[1.0], _array("alpha_bar", alpha_bar)])
        with np.errstate(all="ignore"):  # what follows a 0 is refused below
            return cls((bar[:-1] - bar[1:]) / bar[:-1])  # not 1 - ratio, which loses the small ones

    def zero_terminal_snr(self) -> NoiseSchedule:
        """This schedule with sqrt(alpha_bar) shifted and scaled to reach 0 at t = T-1 (Lin et al. 2024, algorithm 1).

        Then x_T is pure noise in training too, as it is in sampling. The network must predict x_0 or v.
        """
        root = np.sqrt(self.alpha_bar)
        if root[0] == root[-1]:
            raise ValueError(
                f"the schedule has T = {len(self)} and a constant alpha_bar; "
                "expected at least two steps to rescale to zero terminal SNR"
            )
        return self.from_alpha_bar(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

    @classmethod
    def _from_alpha_bar(
        cls, alpha_bar: Callable[[Array], Array], timesteps: int, max_beta: float
    ) -> NoiseSchedule:
        """From a continuous alpha_bar(u), u = 0 (clean) ... 1."""
        count, max_beta = _count(timesteps), _number("max_beta", max_beta, MIN_BETA, 1)
        with np.errstate(all="ignore"):  # a beta that is not finite is refused below
            bar = alpha_bar(np.arange(count + 1) / count)
            return cls(np.minimum(1 - bar[1:] / bar[:-1], max_beta))

    # ---- what follows from beta

    def __len__(self) -> int:
        """T"""
        return len(self.beta)

    @cached_property
    def alpha(self) -> Array:
        """alpha_t = 1 - beta_t"""
        return _frozen(1 - self.beta)

    @cached_property
    def alpha_bar(self) -> Array:
        """alpha_bar_t = prod of alpha up to t: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho eq. 4)."""
        return _frozen(np.cumprod(self.alpha, dtype=np.float64))

    @cached_property
    def alpha_bar_prev(self) -> Array:
        """alpha_bar_{t-1}, 1 at t = 0."""
        return _frozen(np.concatenate([[1.0], self.alpha_bar[:-1]]))

    @cached_property
    def noise_var(self) -> Array:
        """1 - alpha_bar_t, the variance of the noise in x_t.

        Added up as beta_t + alpha_t (1 - alpha_bar_{t-1}), every term positive: subtracting alpha_bar from 1 would
        lose four digits at t = 0.
        """
        noise, total = np.empty_like(self.beta), 0.0
        for t, (beta, alpha) in enumerate(zip(self.beta, self.alpha, strict=True)):
            total = beta + alpha * total
            noise[t] = total
        return _frozen(noise)

    @cached_property
    def noise_var_prev(self) -> Array:
        """1 - alpha_bar_{t-1}, 0 at t = 0."""
        return _frozen(np.concatenate([[0.0], self.noise_var[:-1]]))

    @cached_property
    def posterior_mean_x_0(self) -> Array:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Ho eq. 7); 1 at t = 0."""
        return _frozen(np.sqrt(self.alpha_bar_prev) * self.beta / self.noise_var)

    @cached_property
    def posterior_mean_x_t(self) -> Array:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0) (Ho eq. 7); 0 at t = 0."""
        return _frozen(np.sqrt(self.alpha) * self.noise_var_prev / self.noise_var)

    @cached_property
    def posterior_var(self) -> Array:
        """Variance of q(x_{t-1} | x_t, x_0), beta tilde (Ho eq. 7); 0 at t = 0."""
        return _frozen(self.beta * self.noise_var_prev / self.noise_var)

    @cached_property
    def snr(self) -> Array:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) (Kingma et al. 2021, eq. 3)."""
        return _frozen(self.alpha_bar / self.noise_var)

    def q_sample_table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) as fp32 [T, 2]: what `kernels.q_sample` reads."""
        return (
            torch.from_numpy(np.sqrt(np.stack([self.alpha_bar, self.noise_var], axis=1)))
            .float()
            .to(device)
        )

    def respaced(self, timesteps: Sequence[int] | NDArray[np.int64]) -> NoiseSchedule:
        """The schedule of the chain that visits only `timesteps` (increasing), with the same alpha_bar there.

        Nichol & Dhariwal 2021, eq. 19. ValueError for a list that is empty, not increasing, or leaves 0..T-1.
        """
        visited = np.asarray(timesteps)
        if (
            not visited.size
            or visited.dtype.kind not in "iu"
            or visited[0] < 0
            or visited[-1] >= len(self)
            or (np.diff(visited) <= 0).any()
        ):
            raise ValueError(
                f"timesteps {list(timesteps)[:8]} ...; expected an increasing list within 0..{len(self) - 1}"
            )
        if len(visited) == len(self):
            return self  # so that "all steps" is this schedule to the bit
        betas, noise = [], 0.0
        wanted = set(visited.tolist())
        for t, (beta, alpha) in enumerate(zip(self.beta, self.alpha, strict=True)):
            noise = (
                beta + alpha * noise
            )  # 1 - product of alpha since the last visited step, as in noise_var
            if t in wanted:
                betas.append(noise)
                noise = 0.0
        return NoiseSchedule(np.array(betas))


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _count(timesteps: int) -> int:
    if (
        not isinstance(timesteps, (int, np.integer))
        or isinstance(timesteps, bool)
        or not 1 <= timesteps <= MAX_TIMESTEPS
    ):
        raise ValueError(f"timesteps = {shown(timesteps)}; expected an integer from 1 to 2^24 - 1")
    return int(timesteps)


def _array(name: str, values: Any) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {shown(values)}; expected numbers [T]") from None


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float("nan") if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not low <= number <= high:
        raise ValueError(f"{name} = {shown(value)}; expected a number from {low:g} to {high:g}")
    return number


def _beta(name: str, value: Any) -> float:
    return _number(f"{name} (a beta)", value, MIN_BETA, 1)
