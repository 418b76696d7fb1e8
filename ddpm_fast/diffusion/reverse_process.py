"""Reverse process and Algorithm 2, sampling (Ho et al. 2020, section 3).

  1: x_T ~ N(0, I)
  2: for t = T, ..., 1 do
  3:   z ~ N(0, I) if t > 1, else z = 0
  4:   x_{t-1} = 1/sqrt(alpha_t) (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) + sigma_t z
  5: end for
  6: return x_0

t = 0 ... T-1 in code is t = 1 ... T in the paper. Everything is plain PyTorch in the dtype of x_T;
in fp64 the loop is the reference of the tests. `Sampler` computes the same images faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from ..kernels.noise import REVERSE, X_T, noise_reference
from ..utils.validation import seed_bits
from .forward_process import q_posterior
from .schedule import NoiseSchedule


@torch.no_grad()
def p_sample_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_T: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    variance: str = "fixed_large",
    clip: float | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draws images by Algorithm 2 of Ho et al. 2020.

    Args:
        model: eps_theta, a callable (x_t [B, C, H, W], t int64 [B]) -> [B, C, H, W]. Wrap a model
            of x_0 or v with `prediction.convert`.
        schedule: The noise schedule the model was trained with.
        x_T: Standard normal noise [B, C, H, W]. The loop computes in its dtype, on its device.
        noise: Returns z [B, C, H, W] of step i = 0 ... T-2, where t = T-1-i; default: standard
            normal noise. For a list of tensors, pass its `__getitem__`; for Philox noise, see
            `sampler_noise`.
        variance: "fixed_large": sigma_t^2 = beta_t; "fixed_small": sigma_t^2 = beta~_t (eq. 7).
        clip: Bound on the predicted |x_0|, 1 in the code of Ho et al.; None: no clipping.
        callback: Called as callback(i, t, x_{t-1}) after every step, as by `Sampler`.

    Returns:
        x_0 [B, C, H, W].

    Raises:
        ValueError: `variance` is unknown.
    """
    variances = {"fixed_large": schedule.beta, "fixed_small": schedule.posterior_var}
    if variance not in variances:
        raise ValueError(f"variance {variance!r}; expected one of {', '.join(variances)}")
    sigma = (variances[variance] ** 0.5).tolist()
    draw = noise or (lambda i: torch.randn_like(x_T))
    x = x_T  # line 1
    for i, t in enumerate(reversed(range(len(schedule)))):  # line 2
        z = draw(i).to(x) if t > 0 else torch.zeros_like(x)  # line 3
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x = p_mean(schedule, x, t, eps, clip) + sigma[t] * z  # line 4
        if callback is not None:
            callback(i, t, x)
    return x  # line 6


def p_mean(
    schedule: NoiseSchedule, x_t: Tensor, t: int, eps: Tensor, clip: float | None = None
) -> Tensor:
    """Returns mu_theta(x_t, t), the mean of p_theta(x_{t-1} | x_t) (Ho et al. 2020, eq. 11).

    With `clip`, it is the mean of q(x_{t-1} | x_t, x_0) (eq. 7) at the clipped prediction of x_0.
    """
    alpha, beta, alpha_bar = (
        float(v[t]) for v in (schedule.alpha, schedule.beta, schedule.alpha_bar)
    )
    noise_var = float(schedule.noise_var[t])  # 1 - alpha_bar without cancellation
    if clip is None:
        return (x_t - beta / sqrt(noise_var) * eps) / sqrt(alpha)  # line 4
    x_0 = (x_t - sqrt(noise_var) * eps) / sqrt(alpha_bar)
    return q_posterior(schedule, x_0.clamp(-clip, clip), x_t, t)[0]


def sampler_noise(
    seed: int, indices: Sequence[int], shape: tuple[int, int, int]
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Returns x_T and `noise` of `p_sample_loop` as `Sampler` draws them: Philox noise, fp32.

    Args:
        seed: 0 ... 2^64 - 1.
        indices: Indices of the B images.
        shape: (C, H, W) of an image.
    """
    image = torch.as_tensor(indices)
    key = torch.full_like(image, seed_bits(seed))

    def draw(step: int, stream: int) -> Tensor:
        return noise_reference(key, image, torch.full_like(image, step), stream, shape)

    return draw(0, X_T), lambda step: draw(step, REVERSE)
