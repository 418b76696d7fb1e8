"""Prediction types of a network and conversions between them.

    eps   the noise (Ho et al. 2020)
    x_0   the image
    v     signal eps - noise x_0 (Salimans & Ho 2022, section 4)

x_t = signal x_0 + noise eps, with signal = sqrt(alpha_bar_t) and noise = sqrt(1 - alpha_bar_t).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedule import NoiseSchedule

PREDICTIONS = ("eps", "x_0", "v")


def conversion(source: str, target: str, signal: Any, noise: Any) -> tuple[Any, Any]:
    """Returns (of_x, of_out) with target = of_x x_t + of_out out, where `out` predicts `source`.

    Args:
        source, target: "eps", "x_0" or "v".
        signal, noise: Numbers, arrays or tensors; the result has the same type.

    Raises:
        ValueError: A name is unknown, or the target is undetermined: x_0 from eps where signal is
            0, and eps from x_0 where noise is 0.
    """
    check_prediction(source)
    check_prediction(target)
    zero, one = 0 * signal, 0 * signal + 1
    if source == target:
        return zero, one
    if source == "eps":
        _check_nonzero(
            signal, "alpha_bar = 0: eps does not determine x_0; let the network predict x_0 or v"
        )
        return (1 / signal, -noise / signal) if target == "x_0" else (-noise / signal, 1 / signal)
    if source == "v":
        return (signal, -noise) if target == "x_0" else (noise, signal)
    _check_nonzero(
        noise, "alpha_bar = 1: x_0 does not determine eps; let the network predict eps or v"
    )
    return (1 / noise, -signal / noise) if target == "eps" else (signal / noise, -1 / noise)


def convert(
    out: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, source: str, target: str
) -> Tensor:
    """Converts the prediction `source` to the prediction `target`.

    Args:
        out: The prediction, [B, C, H, W].
        x_t: Noisy images [B, C, H, W].
        t: Timesteps [B] in 0 ... T-1.
        schedule: The noise schedule, of T steps.
        source, target: "eps", "x_0" or "v".

    Returns:
        [B, C, H, W] in the dtype of x_t.

    Raises:
        ValueError: As in `conversion`.
    """
    signal, noise = (
        torch.from_numpy(np.sqrt(v)[t.cpu().numpy()])
        for v in (schedule.alpha_bar, schedule.noise_var)
    )
    of_x, of_out = (
        v.to(x_t)[:, None, None, None] for v in conversion(source, target, signal, noise)
    )
    return of_x * x_t + of_out * out


def check_prediction(prediction: str) -> None:
    """Raises ValueError for an unknown prediction type."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}")


def _check_nonzero(values: Any, message: str) -> None:
    if not np.all(np.asarray(values)):
        raise ValueError(message)
