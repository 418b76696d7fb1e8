"""Noise schedule of the forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

All values are fp64 and exact at both ends. t = 0 ... T-1 in code is t = 1 ... T in Ho et al. 2020.
In a formula x_0 is always the clean image, so `alpha_bar[0]` belongs to the first noisy image and
alpha_bar_{t-1} at t = 0 is 1.
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
    """Noise schedule: beta_t for t = 0 ... T-1 and the quantities derived from it, fp64 arrays [T].

    Constructors: `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_betas` and `from_alpha_bar`.
    Schedules with the same betas are equal and have the same hash.

    Args:
        beta: [T] with T from 1 to 2^24 - 1, each in [1.2e-38, 1). The last beta may be 1: x_T then
            contains no signal (`zero_terminal_snr`).

    Raises:
        ValueError: A beta is out of range or not finite, or the shape is another.
    """

    beta: Array

    def __post_init__(self) -> None:
        beta = _array("beta", self.beta).copy()
        if beta.ndim != 1 or not 1 <= beta.size <= MAX_TIMESTEPS:
            raise ValueError(
                f"beta has shape {beta.shape}; expected [T] with T from 1 to {MAX_TIMESTEPS}"
            )
        valid = (beta >= MIN_BETA) & (beta < 1)  # NaN fails both comparisons
        valid[-1] |= beta[-1] == 1
        invalid = np.flatnonzero(~valid)
        if invalid.size:
            raise ValueError(
                f"beta[{invalid[0]}] = {beta[invalid[0]]}; expected at least {MIN_BETA:.2g} and "
                f"less than 1 ({invalid.size} of {beta.size} are out of range)"
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
        return NoiseSchedule, (self.beta,)  # pickled arrays lose their write protection

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
        """sqrt(beta) in equal steps (Rombach et al. 2022; "quad" in the code of Ho et al.)."""
        root_start, root_end = np.sqrt(_beta("start", start)), np.sqrt(_beta("end", end))
        return cls(np.linspace(root_start, root_end, _count(timesteps)) ** 2)

    @classmethod
    def cosine(
        cls, timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """alpha_bar(u) = cos^2((u + offset) / (1 + offset) pi/2) over its value at u = 0.

        u = (t + 1) / T, and beta is at most `max_beta` (Nichol & Dhariwal 2021, eq. 17).
        """
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
        """alpha_bar is a sigmoid from `start` to `end` (Jabri et al. 2022, algorithm 1).

        `tau` is its temperature, and beta is at most `max_beta`.
        """
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
        """Schedule of given beta [T]."""
        return cls(_array("betas", betas))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Sequence[float] | Array) -> NoiseSchedule:
        """Schedule of given alpha_bar [T], decreasing in (0, 1); the last may be 0."""
        bar = np.concatenate([[1.0], _array("alpha_bar", alpha_bar)])
        with np.errstate(all="ignore"):  # the constructor refuses what follows a 0
            return cls((bar[:-1] - bar[1:]) / bar[:-1])  # 1 - ratio would cancel for a small beta

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Rescales sqrt(alpha_bar) to reach 0 at t = T-1 (Lin et al. 2024, algorithm 1).

        x_T is then pure noise in training as in sampling. The network must predict x_0 or v.
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
        with np.errstate(all="ignore"):  # the constructor refuses a beta that is not finite
            bar = alpha_bar(np.arange(count + 1) / count)
            return cls(np.minimum(1 - bar[1:] / bar[:-1], max_beta))

    # ---- derived from beta

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.beta)

    @cached_property
    def alpha(self) -> Array:
        """alpha_t = 1 - beta_t"""
        return _frozen(1 - self.beta)

    @cached_property
    def alpha_bar(self) -> Array:
        """alpha_bar_t, the product of alpha up to t (Ho eq. 4)."""
        return _frozen(np.cumprod(self.alpha, dtype=np.float64))

    @cached_property
    def alpha_bar_prev(self) -> Array:
        """alpha_bar_{t-1}, 1 at t = 0."""
        return _frozen(np.concatenate([[1.0], self.alpha_bar[:-1]]))

    @cached_property
    def noise_var(self) -> Array:
        """1 - alpha_bar_t, the variance of the noise in x_t.

        Computed as beta_t + alpha_t (1 - alpha_bar_{t-1}), a sum of positive terms: subtracting
        alpha_bar from 1 would lose four digits at t = 0.
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
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) as fp32 [T, 2], for `kernels.q_sample`."""
        columns = np.sqrt(np.stack([self.alpha_bar, self.noise_var], axis=1))
        return torch.from_numpy(columns).float().to(device)

    def respaced(self, timesteps: Sequence[int] | NDArray[np.int64]) -> NoiseSchedule:
        """Schedule that visits only some timesteps, with the same alpha_bar there.

        Nichol & Dhariwal 2021, eq. 19.

        Args:
            timesteps: Increasing, in 0 ... T-1.

        Raises:
            ValueError: `timesteps` is empty, does not increase, or leaves 0 ... T-1.
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
                f"timesteps = {list(timesteps)[:8]} ...; expected an increasing list "
                f"in 0..{len(self) - 1}"
            )
        if len(visited) == len(self):
            return self  # bit-exact
        betas, noise, selected = [], 0.0, set(visited.tolist())
        for t, (beta, alpha) in enumerate(zip(self.beta, self.alpha, strict=True)):
            # 1 - product of alpha since the last visited timestep, summed as in noise_var
            noise = beta + alpha * noise
            if t in selected:
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
