"""Forward process x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

The kernel generates eps in registers: x_0 is read once, x_t is written once, eps is not stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import (
    check_per_image,
    check_table,
    image_strides,
    is_element_order,
    launches_kernel,
    operation,
    tl,
    triton,
)
from .noise import BLOCK, NUM_WARPS, Q_SAMPLE, grid, image_normals, locate, noise_reference


def q_sample_reference(x_0: Tensor, eps: Tensor, coef: Tensor, t: Tensor) -> Tensor:
    """Returns x_t [B, C, H, W] in coef's dtype; eps is the noise, other arguments as `q_sample`."""
    signal, sigma = coef[t.long()].T[:, :, None, None, None]
    return x_0.to(coef.dtype) * signal + eps.to(coef.dtype) * sigma


@triton.jit
def _q_sample_kernel(
    x_0_ptr,
    x_t_ptr,
    coef_ptr,
    t_ptr,
    seed_ptr,
    image_ptr,
    noise_row_ptr,
    x_0_image,
    x_0_channel,
    x_0_pixel,
    ELEMENTS,
    TAG: tl.constexpr,
    CHANNELS: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, first = locate(ELEMENTS, BLOCK)
    block = first + tl.arange(0, BLOCK)
    eps = image_normals(seed_ptr, image_ptr, tl.load(noise_row_ptr + n), n, TAG, block)
    element = first * 4 + tl.arange(0, 4 * BLOCK)  # the memory order of x_t, which is channels-last
    inside = element < ELEMENTS

    t = tl.load(t_ptr + n).to(tl.int64)
    signal, sigma = tl.load(coef_ptr + 2 * t), tl.load(coef_ptr + 2 * t + 1)
    x_0_offsets = (
        element if DENSE else element % CHANNELS * x_0_channel + element // CHANNELS * x_0_pixel
    )
    x_0 = tl.load(x_0_ptr + n.to(tl.int64) * x_0_image + x_0_offsets, mask=inside).to(tl.float32)
    tl.store(x_t_ptr + n.to(tl.int64) * ELEMENTS + element, x_0 * signal + eps * sigma, mask=inside)


def _check(
    x_0: Tensor, coef: Tensor, t: Tensor, noise_row: Tensor, seed: Tensor, image: Tensor
) -> None:
    if x_0.ndim != 4 or not x_0.is_floating_point():
        raise ValueError(f"x_0 is {x_0.dtype} {tuple(x_0.shape)}; expected floating [B, C, H, W]")
    image_strides(x_0, "x_0")
    check_table("coef", coef, 2, x_0.device)
    check_per_image(len(x_0), x_0.device, t=t, noise_row=noise_row, seed=seed, image=image)


def _empty_x_t(x_0: Tensor) -> Tensor:
    b, c, h, w = x_0.shape
    return x_0.new_empty(b, h, w, c, dtype=torch.float32).permute(0, 3, 1, 2)


def _launch(
    x_0: Tensor, coef: Tensor, t: Tensor, noise_row: Tensor, seed: Tensor, image: Tensor
) -> Tensor:
    x_t = _empty_x_t(x_0)
    b, c, h, w = x_0.shape
    strides = image_strides(x_0, "x_0")
    if x_0.numel():
        with torch.cuda.device_of(x_0):
            _q_sample_kernel[grid(c * h * w, b)](
                x_0,
                x_t,
                coef,
                t,
                seed,
                image,
                noise_row,
                *strides,
                c * h * w,
                TAG=Q_SAMPLE,
                CHANNELS=c,
                DENSE=is_element_order(x_0, strides),
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return x_t


@operation("ddpm_fast::q_sample")
def q_sample(
    x_0: Tensor, coef: Tensor, t: Tensor, noise_row: Tensor, seed: Tensor, image: Tensor
) -> Tensor:
    """Samples x_t ~ q(x_t | x_0) at each image's timestep (Ho et al. 2020, eq. 4).

    Args:
        x_0: [B, C, H, W] fp32, fp16 or bf16, channels-first or channels-last.
        coef: [T, 2] fp32, (sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)); see
            `NoiseSchedule.q_sample_table`.
        t: [B] integer in 0..T-1.
        noise_row: [B] integer in 0..2^24-1, index of the noise, such as the epoch or t.
        seed, image: [B] integer, seed and image index of the noise (stream `noise.Q_SAMPLE`).

    Returns:
        x_t [B, C, H, W] fp32, channels-last.

    Raises:
        ValueError: An argument has a wrong shape, dtype, layout or device.
    """
    _check(x_0, coef, t, noise_row, seed, image)
    if launches_kernel(x_0, "noise"):
        return _launch(x_0, coef, t, noise_row, seed, image)
    eps = noise_reference(seed, image, noise_row, Q_SAMPLE, tuple(x_0.shape[1:]))
    return _empty_x_t(x_0).copy_(q_sample_reference(x_0, eps, coef, t))


@q_sample.register_fake
def _(x_0, coef, t, noise_row, seed, image):
    return _empty_x_t(x_0)
