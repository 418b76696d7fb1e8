"""Training losses: simple, min-SNR, hybrid and the variational bound (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels.noise_mse import noise_mse
from .prediction import check_prediction, conversion
from .schedule import Array, NoiseSchedule
from .vlb import Bound

LOSSES = ("simple", "min_snr", "hybrid", "vlb")
LEARNING_VARIANCE = ("hybrid", "vlb")


def target_table(
    schedule: NoiseSchedule, prediction: str, device: torch.device | str = "cpu"
) -> Tensor:
    """(of_eps, of_x_0) as fp32 [T, 2]: what the network is to predict is of_eps eps + of_x_0 x_0 (`kernels.noise_mse`)."""
    check_prediction(prediction)
    ones = np.ones(len(schedule))
    columns = {
        "eps": (ones, 0 * ones),
        "x_0": (0 * ones, ones),
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
        conversion(
            prediction, "x_0", schedule.alpha_bar, schedule.noise_var
        )  # refuses what no sampler could use
        self.schedule, self.prediction, self.loss = schedule, prediction, loss
        self.learned = loss in LEARNING_VARIANCE
        self.variance = "learned_range" if self.learned else "fixed_large"
        self.target = target_table(schedule, prediction, device)
        self.weights = None
        if loss == "min_snr":
            self.weights = (
                torch.from_numpy(min_snr_weights(schedule, prediction, snr_gamma))
                .float()
                .to(device)
            )
        self.bound = None
        if self.learned:
            self.bound = Bound(
                schedule, prediction, self.variance, clip=None, device=device, dtype=torch.float32
            )

    def losses(
        self,
        out: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise_row: Tensor,
        seed: Tensor,
        image: Tensor,
    ) -> Tensor:
        """out: the network's output for x_t, which `q_sample` made of x_0 with (t, noise_row, seed, image). Returns fp32 [B]."""
        channels, total = x_0.shape[1], len(self.schedule)
        if out.shape[1] != channels * (1 + self.learned):
            raise ValueError(
                f"the network gives {out.shape[1]} channels for {channels}; "
                f"the loss {self.loss} needs {channels * (1 + self.learned)}"
            )
        if self.loss == "vlb" and self.bound is not None:
            return total * self.bound.terms(out.float(), x_0, x_t, t)
        simple = noise_mse(
            out[:, :channels],
            None if self.prediction == "eps" else x_0,
            self.target,
            t,
            noise_row,
            seed,
            image,
        )
        if self.weights is not None:
            return self.weights[t] * simple
        if self.bound is None:
            return simple
        out = out.float()
        only_variance = torch.cat([out[:, :channels].detach(), out[:, channels:]], dim=1)
        return simple + total / 1000 * self.bound.terms(only_variance, x_0, x_t, t)
