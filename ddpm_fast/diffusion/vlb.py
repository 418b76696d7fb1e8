"""Variational bound on the negative log-likelihood (Ho et al. 2020, sections 2 and 3).

    -log p(x_0) <= L_T + sum over t of L_{t-1} + L_0                                       (eq. 5)
    L_T     = KL(q(x_T | x_0) || N(0, 1))                     prior
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))   reverse step and posterior
    L_0     = -log p(x_0 | x_1)                               decoder: 256 levels per pixel

Terms are in bits per dimension: nats over log 2 and over the number of values of an image.
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
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) of each element, in nats."""
    log_ratio = log_var_1 - log_var_2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean_1 - mean_2).square() * (-log_var_2).exp())


def discretised_gaussian_log_likelihood(
    x_0: Tensor, mean: Tensor, log_sigma: Tensor, erf: bool = True
) -> Tensor:
    """Log-probability of the level of x_0 under N(mean, sigma^2), in nats (Ho et al. 2020, eq. 13).

    Args:
        x_0: Pixels, multiples of 2/255 in [-1, 1]. A level is the interval within 1/255 of its
            value; the first and the last level extend to infinity.
        mean, log_sigma: Of the shape of x_0.
        erf: Use the exact distribution function; False: OpenAI's tanh, with probabilities of at
            least 1e-12.

    Returns:
        A tensor of the shape of x_0.
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
    """log P(lower < z < upper), accurate in both tails: it is computed in the left one."""
    right = lower > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    high, low = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    # a lower bound where rounding has made the two equal
    return high + (-torch.expm1((low - high).clamp(max=-1e-12))).log()


def _tanh_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Bound:
    """Terms of the variational bound.

    Args:
        chain: The noise schedule, of T steps, or a respaced one; timesteps are indices of it.
        prediction: What the network predicts: "eps", "x_0" or "v".
        variance: As in `solvers.ddpm_table`.
        clip: Bound on the predicted |x_0|; None: no clipping.
        preset: Decides the decoder's variance and distribution function.
        device, dtype: Of the tables; terms are computed in `dtype`.

    Raises:
        ValueError: The prediction or the variance is unknown, or x_0 is undetermined.
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
        small[0] = small[1] if len(chain) > 1 else large[0]
        if preset.decoder_variance == "floor":
            small[0] = 1e-20
        if preset.decoder_variance == "posterior":
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
        """Returns L_{t-1} of each image, or L_0 where t = 0: [B] bits per dimension.

        Args:
            out: The network's output for x_t, [B, C, H, W]; [B, 2C, H, W] with a learned variance.
            x_0: Images [B, C, H, W].
            x_t: Noisy images [B, C, H, W].
            t: Timesteps [B] in 0 ... T-1.
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
            log_var = out[:, channels:]
            if self.variance == "learned_range":
                log_var = log_small + (log_var + 1) / 2 * (log_beta - log_small)
        kl = gaussian_kl(true_mean, log_small, mean, log_var)
        first = (t == 0)[:, None, None, None]
        # where the decoder is not selected, it gets x_0 as the mean, so that its gradient is finite
        decoder = discretised_gaussian_log_likelihood(
            x_0, torch.where(first, mean, x_0), torch.where(first, log_var / 2, 0), self.erf
        )
        return torch.where(first, -decoder, kl).mean((1, 2, 3)) / math.log(2)

    def prior(self, x_0: Tensor) -> Tensor:
        """Returns L_T of images x_0 [B, C, H, W]: [B] bits per dimension."""
        signal, var = self._end
        mean = signal * x_0.double()
        log_var = torch.full_like(mean, math.log(var))
        kl = gaussian_kl(mean, log_var, torch.zeros_like(mean), torch.zeros_like(mean))
        return kl.mean((1, 2, 3)) / math.log(2)
