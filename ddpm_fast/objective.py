"""What training minimises, and the bound on the likelihood that it comes from (Ho et al. 2020, sections 2 and 3).

    -log p(x_0) <= L_T + sum over t of L_{t-1} + L_0                                              (eq. 5)
    L_T     = KL(q(x_T | x_0) || N(0, 1))                       what is left of the image at the end
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))     one reverse step against the posterior
    L_0     = -log p(x_0 | x_1)                                 the last step, on the 256 levels of a pixel

Everything here is in bits per dimension: nats over log 2 and the number of pixels and channels, one figure for each image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .kernels.noise_mse import noise_mse
from .prediction import check_prediction, conversion
from .profile import EXACT, Profile
from .schedule import Array, NoiseSchedule
from .solver import LEARNED, VARIANCES

LOSSES = ("simple", "min_snr", "hybrid", "vlb")
LEARNING_VARIANCE = ("hybrid", "vlb")
_HALF_LEVEL = 1 / 255  # of pixels in [-1, 1]
QUARTILES = 4  # of the timesteps, for the log
HISTORY = 10  # losses kept for each timestep
UNIFORM_SHARE = 0.001


def gaussian_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) of every element, in nats."""
    log_ratio = log_var_1 - log_var_2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean_1 - mean_2).square() * (-log_var_2).exp())


def discretised_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, log_sigma: Tensor, erf: bool = True) -> Tensor:
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

    variance as `solver.ddpm_table` takes it; clip as the sampler does; the profile says what the variance at t = 0 is and how
    the decoder computes. The chain's own indices count: after `schedule.respaced`, those of the visited steps.
    """

    def __init__(
        self,
        chain: NoiseSchedule,
        prediction: str = "eps",
        variance: str = "fixed_large",
        clip: float | None = 1.0,
        profile: Profile = EXACT,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_prediction(prediction)
        if variance not in VARIANCES:
            raise ValueError(f"variance {variance!r}; expected one of {', '.join(VARIANCES)}")
        self.chain, self.variance, self.clip, self.erf = chain, variance, clip, profile.erf
        small, large = chain.posterior_var.copy(), chain.beta.copy()
        small[0] = 1e-20 if profile.first_var == "floor" else small[1] if len(chain) > 1 else large[0]
        if profile.first_var == "posterior":
            large[0] = small[0]
        fixed = large if variance == "fixed_large" else small
        of_x, of_out = conversion(prediction, "x_0", np.sqrt(chain.alpha_bar), np.sqrt(chain.noise_var))
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
        of_x, of_out, mean_x_0, mean_x, log_small, log_fixed, log_beta = self._table[t].T[:, :, None, None, None]
        predicted = of_x * x_t + of_out * out[:, :channels]
        if self.clip is not None:
            predicted = predicted.clamp(-self.clip, self.clip)
        mean, true_mean = (mean_x_0 * image + mean_x * x_t for image in (predicted, x_0))
        if self.variance not in LEARNED:
            log_var = log_fixed.expand_as(mean)
        else:
            v = out[:, channels:]
            log_var = v if self.variance == "learned" else log_small + (v + 1) / 2 * (log_beta - log_small)
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


def target_table(schedule: NoiseSchedule, prediction: str, device: torch.device | str = "cpu") -> Tensor:
    """(of_eps, of_x_0) as fp32 [T, 2]: what the network is to predict is of_eps eps + of_x_0 x_0 (`kernels.noise_mse`)."""
    check_prediction(prediction)
    one = np.ones(len(schedule))
    columns = {
        "eps": (one, 0 * one),
        "x_0": (0 * one, one),
        "v": (np.sqrt(schedule.alpha_bar), -np.sqrt(schedule.noise_var)),
    }[prediction]
    return torch.from_numpy(np.stack(columns, axis=1)).float().to(device)


def min_snr_weights(schedule: NoiseSchedule, prediction: str, gamma: float) -> Array:
    """The weights [T] of the loss of `prediction` that weigh the loss of x_0 by min(SNR, gamma) (Hang et al. 2023, eq. 8).

    A squared error of eps is SNR times, one of v SNR + 1 times that of x_0: min(SNR, gamma) over that. With eps-prediction the
    weight is 1 until SNR passes gamma; nothing else than the nearly clean images counts less.
    """
    check_prediction(prediction)
    if not gamma > 0:
        raise ValueError(f"snr_gamma = {gamma}; expected a positive number")
    snr = schedule.snr
    if prediction == "eps":
        return np.minimum(1, gamma / np.maximum(snr, np.finfo(np.float64).tiny))
    return np.minimum(snr, gamma) / (snr + 1 if prediction == "v" else 1)


class Objective:
    """The loss of every image, differentiable: fp32 [B].

    loss   simple   mean squared error of what is predicted (Ho et al. 2020, eq. 14)
           min_snr  the same, weighted by `min_snr_weights`
           hybrid   simple + 0.001 L_vlb, where L_vlb teaches the variance alone: the mean is detached (Nichol & Dhariwal 2021,
                    eq. 16); one timestep stands for all T, so its term counts T times
           vlb      L_vlb, in bits per dimension

    hybrid and vlb need a network with twice the channels, whose variance is then "learned_range".
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str = "eps",
        loss: str = "simple",
        snr_gamma: float = 5.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r}; expected one of {', '.join(LOSSES)}")
        conversion(prediction, "x_0", schedule.alpha_bar, schedule.noise_var)  # refuses what no sampler could use
        self.schedule, self.prediction, self.loss = schedule, prediction, loss
        self.learned = loss in LEARNING_VARIANCE
        self.variance = "learned_range" if self.learned else "fixed_large"
        self.target = target_table(schedule, prediction, device)
        self.weights = None
        if loss == "min_snr":
            self.weights = torch.from_numpy(min_snr_weights(schedule, prediction, snr_gamma)).float().to(device)
        self.bound = None
        if self.learned:
            self.bound = Bound(schedule, prediction, self.variance, clip=None, device=device, dtype=torch.float32)

    def losses(self, out: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, row: Tensor, seed: Tensor, image: Tensor) -> Tensor:
        """out: the network's output for x_t, which `q_sample` made of x_0 with (t, row, seed, image). Returns fp32 [B]."""
        channels, total = x_0.shape[1], len(self.schedule)
        if out.shape[1] != channels * (1 + self.learned):
            raise ValueError(
                f"the network gives {out.shape[1]} channels for {channels}; "
                f"the loss {self.loss} needs {channels * (1 + self.learned)}"
            )
        if self.loss == "vlb" and self.bound is not None:
            return total * self.bound.terms(out.float(), x_0, x_t, t)
        simple = noise_mse(out[:, :channels], None if self.prediction == "eps" else x_0, self.target, t, row, seed, image)
        if self.weights is not None:
            return self.weights[t] * simple
        if self.bound is None:
            return simple
        out = out.float()
        only_variance = torch.cat([out[:, :channels].detach(), out[:, channels:]], dim=1)
        return simple + total / 1000 * self.bound.terms(only_variance, x_0, x_t, t)


def quartile_sums(t: Tensor, losses: Tensor, timesteps: int) -> Tensor:
    """Sums of the losses, then numbers of images, in each quarter of the timesteps. Does not wait for the device.

    Args:
        t: int64 [B] in 0 ... timesteps - 1.
        losses: fp32 [B].
        timesteps: T.

    Returns:
        fp32 [8]: four sums and four counts, lowest t first; added in the order of the batch, so that they repeat to the bit.
    """
    quartile = (t * QUARTILES // timesteps)[:, None] == torch.arange(QUARTILES, device=t.device)
    return torch.cat([torch.where(quartile, losses.float()[:, None], 0).sum(0), quartile.float().sum(0)])


class LossAware:
    """Draws timesteps in proportion to sqrt(E[L_t^2]), where the loss is large and uneven (Nichol & Dhariwal 2021, eq. 18).

    The last ten losses of every timestep are kept, and all are drawn alike until every one has ten. Weighted by 1 / (T p_t), the
    losses have the expectation that they have under uniform t. Nothing here waits for the device, and all of it is integers
    and sums in a fixed order, so that a resumed run draws the same.
    """

    def __init__(self, timesteps: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(timesteps, HISTORY, dtype=torch.float64, device=device)
        self.count = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def shares(self) -> Tensor:
        """p_t in units of about 2^-30: int64 [T], at least 1."""
        root = self.squares.mean(1).sqrt()
        uniform = torch.full_like(root, 1 / len(root))
        aware = (1 - UNIFORM_SHARE) * root / root.sum().clamp(min=1e-300) + UNIFORM_SHARE / len(root)
        chosen = torch.where((self.count >= HISTORY).all() & (root.sum() > 0), aware, uniform)
        return (chosen * 2**30).long().clamp(min=1)

    def draw(self, word: Tensor) -> tuple[Tensor, Tensor]:
        """Random words int64 [B] in 0 ... 2^32-1 -> t int64 [B] and the weights fp32 [B] of their losses."""
        shares = self.shares()
        until = shares.cumsum(0)
        t = torch.searchsorted(until, (word * until[-1]) >> 32, right=True)
        return t, (until[-1] / (len(shares) * shares[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Keeps the losses [B], as they are without weights, of timesteps t [B]. Those that are not finite are left out."""
        kept = losses.isfinite()
        same = (t[:, None] == t[None, :]) & kept[None, :]
        before, after = (torch.ones_like(same).tril(-1) & same).sum(1), (torch.ones_like(same).triu(1) & same).sum(1)
        place = t * HISTORY + (self.count[t] + before) % HISTORY
        # of more than ten at once the last ten stay; what is not kept goes to a place behind the end
        place = torch.where(kept & (after < HISTORY), place, self.squares.numel())
        flat = torch.cat([self.squares.flatten(), self.squares.new_zeros(1)])
        flat[place] = losses.double().square()
        self.squares.copy_(flat[:-1].view_as(self.squares))
        self.count += torch.zeros_like(self.count).scatter_add_(0, t, kept.long())
