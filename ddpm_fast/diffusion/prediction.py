"""Prediction types of a network, eps, x_0 and v, and conversions between them by x_t = signal x_0 +
noise eps.

signal = sqrt(alpha_bar_t), noise = sqrt(1 - alpha_bar_t), signal^2 + noise^2 = 1.

    eps   the noise (Ho et al. 2020)
    x_0   the image
    v     signal eps - noise x_0 (Salimans & Ho 2022, section 4)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedule import NoiseSchedule

PREDICTIONS = ("eps", "x_0", "v")


def conversion(source: str, target: str, signal: Any, noise: Any) -> tuple[Any, Any]:
    """(of_x, of_out) with target = of_x x_t + of_out out, where `out` is the prediction `source`.

    signal, noise: numbers, arrays or tensors, and so is the answer. ValueError where nothing can tell: x_t without signal says
    nothing about x_0 if eps is all that is known, x_t without noise nothing about eps if x_0 is.
    """
    check_prediction(source)
    check_prediction(target)
    zero, one = 0 * signal, 0 * signal + 1
    if source == target:
        return zero, one
    if source == "eps":
        _nowhere_zero(
            signal,
            "alpha_bar = 0: the noise alone does not say what x_0 is; let the network predict x_0 or v",
        )
        return (1 / signal, -noise / signal) if target == "x_0" else (-noise / signal, 1 / signal)
    if source == "v":
        return (signal, -noise) if target == "x_0" else (noise, signal)
    _nowhere_zero(
        noise, "alpha_bar = 1: x_0 alone does not say what eps is; let the network predict eps or v"
    )
    return (1 / noise, -signal / noise) if target == "eps" else (signal / noise, -1 / noise)


def convert(
    out: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, source: str, target: str
) -> Tensor:
    """The prediction `source` of images x_t [B, C, H, W] at timesteps t [B] as the prediction `target`, in x_t's dtype."""
    signal, noise = (
        torch.from_numpy(np.sqrt(v)[t.cpu().numpy()])
        for v in (schedule.alpha_bar, schedule.noise_var)
    )
    of_x, of_out = (
        v.to(x_t)[:, None, None, None] for v in conversion(source, target, signal, noise)
    )
    return of_x * x_t + of_out * out


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}")


def _nowhere_zero(values: Any, why: str) -> None:
    if not np.all(np.asarray(values)):
        raise ValueError(why)
