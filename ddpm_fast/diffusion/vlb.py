"""The variational bound on the negative log-likelihood and its terms (Ho et al. 2020, sections 2 and 3).

    -log p(x_0) <= L_T + sum over t of L_{t-1} + L_0                                              (eq. 5)
    L_T     = KL(q(x_T | x_0) || N(0, 1))                       what is left of the image at the end
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))     one reverse step against the posterior
    L_0     = -log p(x_0 | x_1)                                 the last step, on the 256 levels of a pixel

All terms are in bits per dimension: nats over log 2 and the number of pixels and channels, one value per image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .prediction import check_prediction, conversion
from .presets import EXACT, Preset
from .schedule import NoiseSchedule
from .solvers import LEARNED, VARIANCES

_HALF_LEVEL = 1 / 255  # of pixels in [-1, 1]


def gaussian_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) of every element, in nats."""
    log_ratio = log_var_1 - log_var_2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean_1 - mean_2).square() * (-log_var_2).exp())


def discretised_gaussian_log_likelihood(
    x_0: Tensor, mean: Tensor, log_sigma: Tensor, erf: bool = True
) -> Tensor:
    """Log of the probability, in nats, that N(mean, sigma^2) gives the level of x_0 (Ho et al. 2020, eq. 13).

    x_0: multiples of 2/255 in [-1, 1]; its level reaches half a level down and up, and to infinity from the first and the last.
    erf: the exact distribution function; else OpenAI's approximation by tanh, cut off at 1e-12 as there.
    """
    inverse = (-log_sigma).exp()
    lower, upper = inverse * (x_0 - mean - _HALF_LEVEL), inverse * (x_0 - mean + _HALF_LEVEL)
    if not erf:
        below, above = _tanh_cdf(lower), _tanh_cdf(upper)
        inner = (above - below).clamp(min=1e-12).log()
        first, last = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    else:
        inner = _log_normal_between(lower, upper)
        first, last = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(x_0 < -0.999, first, torch.where(x_0 > 0.999, last, inner))


def _log_normal_between(lower: Tensor, upper: Tensor) -> Tensor:
    """log P(lower < z < upper), precise far out: both are moved to the left tail, where probabilities are small numbers."""
    right = lower > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    high, low = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    # what rounding has made equal is worth the density at least: the width times it
    return high + (-torch.expm1((low - high).clamp(max=-1e-12))).log()


def _tanh_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Bound:
    """The terms of the bound, for a network that predicts `prediction` with `variance`, in fp64 or the dtype given.

    variance as `solvers.ddpm_table` takes it; clip as the sampler does; the preset says what the variance at t = 0 is and how
    the decoder computes. The chain's own indices count: after `schedule.respaced`, those of the visited steps.
    """

    def __init__(
        self,
        chain: NoiseSchedule,
        prediction: str = "eps",
        variance: str = "fixed_large",
        clip: float | None = 1.0,
        preset: Preset = EXACT,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_prediction(prediction)
        if variance not in VARIANCES:
            raise ValueError(f"variance {variance!r}; expected one of {', '.join(VARIANCES)}")
        self.chain, self.variance, self.clip, self.erf = chain, variance, clip, preset.erf
        small, large = chain.posterior_var.copy(), chain.beta.copy()
        small[0] = (
            1e-20 if preset.first_var == "floor" else small[1] if len(chain) > 1 else large[0]
        )
        if preset.first_var == "posterior":
            large[0] = small[0]
        fixed = large if variance == "fixed_large" else small
        of_x, of_out = conversion(
            prediction, "x_0", np.sqrt(chain.alpha_bar), np.sqrt(chain.noise_var)
        )
        columns = [of_x, of_out, chain.posterior_mean_x_0, chain.posterior_mean_x_t]
        columns += [np.log(small), np.log(fixed), np.log(chain.beta)]
        self._table = torch.from_numpy(np.stack(columns, axis=1)).to(device, dtype)
        self._end = math.sqrt(chain.alpha_bar[-1]), float(chain.noise_var[-1])

    def terms(self, out: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_{t-1}, or L_0 at t = 0, for every image at its own t: [B] bits per dimension.

        out [B, C or 2C, H, W], the network's output for x_t; x_0, x_t [B, C, H, W]; t [B] in 0 ... len(chain) - 1.
        """
        dtype, channels = self._table.dtype, x_0.shape[1]
        x_0, x_t, out = x_0.to(dtype), x_t.to(dtype), out.to(dtype)
        of_x, of_out, mean_x_0, mean_x, log_small, log_fixed, log_beta = self._table[t].T[
            :, :, None, None, None
        ]
        predicted = of_x * x_t + of_out * out[:, :channels]
        if self.clip is not None:
            predicted = predicted.clamp(-self.clip, self.clip)
        mean, true_mean = (mean_x_0 * image + mean_x * x_t for image in (predicted, x_0))
        if self.variance not in LEARNED:
            log_var = log_fixed.expand_as(mean)
        else:
            v = out[:, channels:]
            log_var = (
                v
                if self.variance == "learned"
                else log_small + (v + 1) / 2 * (log_beta - log_small)
            )
        kl = gaussian_kl(true_mean, log_small, mean, log_var)
        first = (t == 0)[:, None, None, None]
        # what is not chosen must not have a gradient that is not finite, so the decoder sees the image itself there
        decoder = discretised_gaussian_log_likelihood(
            x_0, torch.where(first, mean, x_0), torch.where(first, log_var / 2, 0), self.erf
        )
        return torch.where(first, -decoder, kl).mean((1, 2, 3)) / math.log(2)

    def prior(self, x_0: Tensor) -> Tensor:
        """L_T: [B] bits per dimension."""
        signal, var = self._end
        mean = signal * x_0.double()
        log_var = torch.full_like(mean, math.log(var))
        kl = gaussian_kl(mean, log_var, torch.zeros_like(mean), torch.zeros_like(mean))
        return kl.mean((1, 2, 3)) / math.log(2)
