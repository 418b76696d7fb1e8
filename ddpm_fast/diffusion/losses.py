"""Training losses: simple, min-SNR, hybrid and the variational bound."""

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
    """Coefficients of the training target of_eps eps + of_x_0 x_0, for `kernels.noise_mse`.

    Args:
        schedule: The noise schedule, of T steps.
        prediction: What the network predicts: "eps", "x_0" or "v".
        device: Device of the table.

    Returns:
        (of_eps, of_x_0) as fp32 [T, 2].
    """
    check_prediction(prediction)
    ones = np.ones(len(schedule))
    columns = {
        "eps": (ones, 0 * ones),
        "x_0": (0 * ones, ones),
        "v": (np.sqrt(schedule.alpha_bar), -np.sqrt(schedule.noise_var)),
    }[prediction]
    return torch.from_numpy(np.stack(columns, axis=1)).float().to(device)


def min_snr_weights(schedule: NoiseSchedule, prediction: str, gamma: float) -> Array:
    """Returns loss weights [T] that weight the error of x_0 by min(SNR, gamma) (Hang et al. 2023).

    Equation 8: the squared error of eps is SNR times that of x_0, that of v is SNR + 1 times, and
    min(SNR, gamma) is divided by this factor. For eps, the weight is 1 where SNR <= gamma.

    Raises:
        ValueError: gamma is not positive, or the prediction is unknown.
    """
    check_prediction(prediction)
    if not gamma > 0:
        raise ValueError(f"snr_gamma = {gamma}; expected a positive number")
    snr = schedule.snr
    if prediction == "eps":
        return np.minimum(1, gamma / np.maximum(snr, np.finfo(np.float64).tiny))
    return np.minimum(snr, gamma) / (snr + 1 if prediction == "v" else 1)


class Objective:
    """Training loss of each image.

    Args:
        schedule: The noise schedule, of T steps.
        prediction: What the network predicts: "eps", "x_0" or "v".
        loss: One of
            "simple": mean squared error of the prediction (Ho et al. 2020, eq. 14);
            "min_snr": "simple" weighted by `min_snr_weights`;
            "hybrid": "simple" + 0.001 L_vlb, with the mean detached in L_vlb, which trains the
            variance only (Nichol & Dhariwal 2021, eq. 16). L_vlb is estimated as T times one term;
            "vlb": L_vlb in bits per dimension.
            "hybrid" and "vlb" need a network with 2C output channels and the variance
            "learned_range".
        snr_gamma: gamma of "min_snr".
        device: Device of the loss tables.

    Raises:
        ValueError: The loss or the prediction is unknown, or the schedule does not support it.
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
        )  # raises if impossible
        self.schedule, self.prediction, self.loss = schedule, prediction, loss
        self.learned = loss in LEARNING_VARIANCE
        self.variance = "learned_range" if self.learned else "fixed_large"
        self.target = target_table(schedule, prediction, device)
        self.weights = None
        if loss == "min_snr":
            weights = min_snr_weights(schedule, prediction, snr_gamma)
            self.weights = torch.from_numpy(weights).float().to(device)
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
        """Returns the loss of each image, differentiable in `out`: fp32 [B].

        Args:
            out: The network's output for x_t, [B, C, H, W]; [B, 2C, H, W] for "hybrid" and "vlb".
            x_0: Images [B, C, H, W].
            x_t: `q_sample` of x_0 with (t, noise_row, seed, image).
            t: Timesteps [B] in 0 ... T-1.
            noise_row, seed, image: Position in the noise, integers [B].

        Raises:
            ValueError: `out` has another number of channels.
        """
        channels, total = x_0.shape[1], len(self.schedule)
        if out.shape[1] != channels * (1 + self.learned):
            raise ValueError(
                f"the network's output has {out.shape[1]} channels; "
                f"expected {channels * (1 + self.learned)} for the loss {self.loss}"
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
        detached = torch.cat([out[:, :channels].detach(), out[:, channels:]], dim=1)
        return simple + total / 1000 * self.bound.terms(detached, x_0, x_t, t)
