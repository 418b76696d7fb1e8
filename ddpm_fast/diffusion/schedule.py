"""The noise schedule: how fast the forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) destroys an image.

Everything is fp64 and exact at both ends. Index t = 0 ... T-1 here is t = 1 ... T in Ho et al. 2020; x_0 in a formula is
always the clean image, so `alpha_bar[0]` belongs to the first noisy one and "alpha_bar before t = 0" is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """beta_t for t = 0 ... T-1 and every quantity the papers derive from it, as fp64 arrays [T].

    Make one with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_betas` or `from_alpha_bar`. ValueError for a beta
    outside (0, 1), one that is not finite, or none at all. The last beta may be 1: no signal is left then
    (`zero_terminal_snr`).
    """

    beta: Array

    def __post_init__(self) -> None:
        beta = np.array(self.beta, dtype=np.float64)
        if beta.ndim != 1 or not beta.size:
            raise ValueError(f"beta has shape {beta.shape}; expected [T] with at least one step")
        right = (beta > 0) & (beta < 1)  # NaN fails both comparisons
        right[-1] |= beta[-1] == 1
        bad = np.flatnonzero(~right)
        if bad.size:
            raise ValueError(
                f"beta[{bad[0]}] = {beta[bad[0]]}; every beta must lie strictly between 0 and 1 ({bad.size} do not)"
            )
        object.__setattr__(self, "beta", _frozen(beta))

    # ---- families

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, timesteps: int = 1000) -> NoiseSchedule:
        """beta from `start` to `end` in equal steps (Ho et al. 2020, section 4)."""
        return cls(np.linspace(start, end, _count(timesteps)))

    @classmethod
    def scaled_linear(
        cls, start: float = 1e-4, end: float = 0.02, timesteps: int = 1000
    ) -> NoiseSchedule:
        """sqrt(beta) in equal steps (Rombach et al. 2022, and "quad" in Ho et al.'s code)."""
        return cls(np.linspace(np.sqrt(start), np.sqrt(end), _count(timesteps)) ** 2)

    @classmethod
    def cosine(
        cls, timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """alpha_bar = cos^2 of a quarter turn, beta at most `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
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
        sigmoid = lambda u: 1 / (1 + np.exp(-(u * (end - start) + start) / tau))
        return cls._from_alpha_bar(
            lambda u: (sigmoid(1.0) - sigmoid(u)) / (sigmoid(1.0) - sigmoid(0.0)),
            timesteps,
            max_beta,
        )

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Array) -> NoiseSchedule:
        """Any beta [T], each in (0, 1)."""
        return cls(np.asarray(betas, dtype=np.float64))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Sequence[float] | Array) -> NoiseSchedule:
        """The chain through any alpha_bar [T], decreasing within (0, 1); the last may be 0."""
        bar = np.concatenate([[1.0], np.asarray(alpha_bar, dtype=np.float64)])
        with np.errstate(divide="ignore", invalid="ignore"):  # what follows a 0 is refused below
            return cls((bar[:-1] - bar[1:]) / bar[:-1])  # not 1 - ratio, which loses the small ones

    def zero_terminal_snr(self) -> NoiseSchedule:
        """This schedule with sqrt(alpha_bar) shifted and scaled to reach 0 at t = T-1 (Lin et al. 2024, algorithm 1).

        Then x_T is pure noise in training too, as it is in sampling. The network must predict x_0 or v.
        """
        root = np.sqrt(self.alpha_bar)
        return self.from_alpha_bar(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

    @classmethod
    def _from_alpha_bar(
        cls, alpha_bar: Callable[[Array], Array], timesteps: int, max_beta: float
    ) -> NoiseSchedule:
        """From a continuous alpha_bar(u), u = 0 (clean) ... 1."""
        bar = alpha_bar(np.arange(_count(timesteps) + 1) / timesteps)
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
    if not isinstance(timesteps, (int, np.integer)) or not 1 <= timesteps < 2**24:
        raise ValueError(
            f"timesteps = {timesteps!r}; expected an integer from 1 to 2^24 - 1"
        )  # the noise counts steps in 24 bits
    return int(timesteps)
