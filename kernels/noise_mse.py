"""Training loss ||target - out||^2 with target = eps, x_0 or v; eps is recomputed, not stored.

`q_sample` generates eps in registers. The loss and its gradient regenerate it from the same
counter, so the noise of training is never stored in memory.
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


def target_reference(eps: Tensor, x_0: Tensor | None, coef: Tensor, t: Tensor) -> Tensor:
    """Returns the target of_eps eps + of_x_0 x_0 [B, C, H, W] in coef's dtype; see `noise_mse`."""
    of_eps, of_x_0 = coef[t.long()].T[:, :, None, None, None]
    target = of_eps * eps.to(coef.dtype)
    return target if x_0 is None else target + of_x_0 * x_0.to(coef.dtype)


def noise_mse_reference(
    out: Tensor, eps: Tensor, x_0: Tensor | None, coef: Tensor, t: Tensor
) -> Tensor:
    """Returns the mean of (out - target)^2 over each image, [B] in coef's dtype."""
    return (out.to(coef.dtype) - target_reference(eps, x_0, coef, t)).square().mean((1, 2, 3))


@triton.jit
def _noise_mse_kernel(
    result_ptr,
    loss_gradient_ptr,
    out_ptr,
    x_0_ptr,
    coef_ptr,
    t_ptr,
    seed_ptr,
    image_ptr,
    noise_row_ptr,
    out_image,
    out_channel,
    out_pixel,
    x_0_image,
    x_0_channel,
    x_0_pixel,
    ELEMENTS,
    TAG: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_DENSE: tl.constexpr,
    X_0_DENSE: tl.constexpr,
    WITH_X_0: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, first = locate(ELEMENTS, BLOCK)
    block = first + tl.arange(0, BLOCK)
    eps = image_normals(seed_ptr, image_ptr, tl.load(noise_row_ptr + n), n, TAG, block)
    element = first * 4 + tl.arange(0, 4 * BLOCK)  # [4 * BLOCK]
    inside = element < ELEMENTS
    t = tl.load(t_ptr + n).to(tl.int64)
    target = tl.load(coef_ptr + 2 * t) * eps
    if WITH_X_0:
        x_0_offsets = (
            element
            if X_0_DENSE
            else element % CHANNELS * x_0_channel + element // CHANNELS * x_0_pixel
        )
        x_0 = tl.load(x_0_ptr + n.to(tl.int64) * x_0_image + x_0_offsets, mask=inside).to(
            tl.float32
        )
        target = target + tl.load(coef_ptr + 2 * t + 1) * x_0
    out_offsets = (
        element if OUT_DENSE else element % CHANNELS * out_channel + element // CHANNELS * out_pixel
    )
    out = tl.load(out_ptr + n.to(tl.int64) * out_image + out_offsets, mask=inside).to(tl.float32)
    difference = out - target
    if GRADIENT:  # of the loss with respect to out; channels-last
        scale = tl.load(loss_gradient_ptr + n) * (2.0 / ELEMENTS)
        tl.store(result_ptr + n.to(tl.int64) * ELEMENTS + element, scale * difference, mask=inside)
    else:  # one sum per program; the launcher adds them in a fixed order, without atomics
        tl.store(
            result_ptr + tl.program_id(0), tl.sum(tl.where(inside, difference * difference, 0.0))
        )


def _launch(result, loss_gradient, out, x_0, coef, t, noise_row, seed, image) -> None:
    """Writes the programs' sums to `result`, or the gradient if `loss_gradient` is given."""
    b, c, h, w = out.shape
    out_strides = image_strides(out, "out")
    x_0_strides = (0, 0, 0) if x_0 is None else image_strides(x_0, "x_0")
    with torch.cuda.device_of(out):
        _noise_mse_kernel[grid(c * h * w, b)](
            result,
            result if loss_gradient is None else loss_gradient,
            out,
            out if x_0 is None else x_0,
            coef,
            t,
            seed,
            image,
            noise_row,
            *out_strides,
            *x_0_strides,
            c * h * w,
            TAG=Q_SAMPLE,
            CHANNELS=c,
            OUT_DENSE=is_element_order(out, out_strides),
            X_0_DENSE=x_0 is None or is_element_order(x_0, x_0_strides),
            WITH_X_0=x_0 is not None,
            GRADIENT=loss_gradient is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def _launch_loss(out, x_0, coef, t, noise_row, seed, image) -> Tensor:
    b, c, h, w = out.shape
    sums = torch.empty(b, triton.cdiv(c * h * w, 4 * BLOCK), dtype=torch.float32, device=out.device)
    if out.numel():
        _launch(sums, None, out, x_0, coef, t, noise_row, seed, image)
    return sums.sum(1) / (c * h * w)


def _empty_gradient(out: Tensor) -> Tensor:
    b, c, h, w = out.shape
    return out.new_empty(b, h, w, c).permute(0, 3, 1, 2)


def _launch_gradient(loss_gradient, out, x_0, coef, t, noise_row, seed, image) -> Tensor:
    gradient = _empty_gradient(out)
    if out.numel():
        _launch(gradient, loss_gradient, out, x_0, coef, t, noise_row, seed, image)
    return gradient


def _check(out, x_0, coef, t, noise_row, seed, image) -> None:
    if out.ndim != 4 or not out.is_floating_point():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; expected floating [B, C, H, W]")
    image_strides(out, "out")
    if x_0 is not None:
        if x_0.shape != out.shape or not x_0.is_floating_point() or x_0.device != out.device:
            raise ValueError(
                f"x_0 is {x_0.dtype} {tuple(x_0.shape)} on {x_0.device}; "
                f"expected floating {tuple(out.shape)} on {out.device}"
            )
        image_strides(x_0, "x_0")
    check_table("coef", coef, 2, out.device)
    check_per_image(len(out), out.device, t=t, noise_row=noise_row, seed=seed, image=image)


@operation("ddpm_fast::noise_mse")
def noise_mse(
    out: Tensor,
    x_0: Tensor | None,
    coef: Tensor,
    t: Tensor,
    noise_row: Tensor,
    seed: Tensor,
    image: Tensor,
) -> Tensor:
    """Returns the mean of (out - target)^2 over each image (Ho et al. 2020, eq. 14).

    target = of_eps eps + of_x_0 x_0, with the eps that `q_sample` generates for the same arguments.

    Args:
        out: [B, C, H, W] fp32, fp16 or bf16, channels-first or channels-last, or a slice of
            channels; read once.
        x_0: Like out, read once; None if of_x_0 is 0 (eps-prediction).
        coef: [T, 2] fp32, (of_eps, of_x_0); see `ddpm_fast.diffusion.losses.target_table`.
        t, noise_row, seed, image: [B] integer, as for `q_sample`.

    Returns:
        [B] fp32, differentiable with respect to `out`.

    Raises:
        ValueError: An argument has a wrong shape, dtype, layout or device.
    """
    _check(out, x_0, coef, t, noise_row, seed, image)
    if launches_kernel(out, "noise"):
        return _launch_loss(out, x_0, coef, t, noise_row, seed, image)
    eps = noise_reference(seed, image, noise_row, Q_SAMPLE, tuple(out.shape[1:]))
    return noise_mse_reference(out, eps, x_0, coef, t)


@operation("ddpm_fast::noise_mse_gradient")
def noise_mse_gradient(
    loss_gradient: Tensor,
    out: Tensor,
    x_0: Tensor | None,
    coef: Tensor,
    t: Tensor,
    noise_row: Tensor,
    seed: Tensor,
    image: Tensor,
) -> Tensor:
    """Returns the gradient of `noise_mse` with respect to `out`, in out's dtype, channels-last.

    It is loss_gradient [B] fp32 times 2 (out - target) / (C H W). Other arguments: `noise_mse`.
    """
    if launches_kernel(out, "noise"):
        return _launch_gradient(loss_gradient, out, x_0, coef, t, noise_row, seed, image)
    eps = noise_reference(seed, image, noise_row, Q_SAMPLE, tuple(out.shape[1:]))
    scale = (loss_gradient * (2.0 / max(1, out[0].numel() if len(out) else 1)))[:, None, None, None]
    return _empty_gradient(out).copy_(
        scale * (out.to(coef.dtype) - target_reference(eps, x_0, coef, t))
    )


@noise_mse.register_fake
def _(out, x_0, coef, t, noise_row, seed, image):
    return out.new_empty(len(out), dtype=torch.float32)


@noise_mse_gradient.register_fake
def _(loss_gradient, out, x_0, coef, t, noise_row, seed, image):
    return _empty_gradient(out)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, loss_gradient):
    gradient = noise_mse_gradient(loss_gradient.contiguous(), *ctx.saved_tensors)
    return gradient, None, None, None, None, None, None


noise_mse.register_autograd(_backward, setup_context=_setup_context)
