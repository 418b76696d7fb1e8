"""Reverse step x_t -> x_{t-1} of every solver; solvers differ only in their coefficients.

A solver is a table with one row per step (`ddpm_fast.diffusion.solvers` derives the rows):

    x_0   = clamp(x_0_x * x_t + x_0_out * out, -clip, clip)         predicted image
    x_t-1 = mean_x_0 * x_0 + mean_x * x_t + mean_out * out + mean_old * old + sigma * z

`out` is the network's output (eps, x_0 or v); `old` is the x_0 of the previous step, for multistep
solvers. If the network learns the variance, the second half of its channels, v, interpolates log
sigma between log_sigma_min (v = -1) and log_sigma_max (v = 1) (Nichol & Dhariwal 2021, eq. 15).

z is a given tensor, or the noise that `noise_row` counts. The row of coefficients and the row of
noise are two numbers, so images with different tables can share a batch: concatenate the tables.
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
from .noise import BLOCK, NUM_WARPS, REVERSE, grid, image_normals, locate, noise_reference

COLUMNS = (
    "x_0_x",
    "x_0_out",
    "clip",
    "mean_x_0",
    "mean_x",
    "mean_out",
    "mean_old",
    "sigma",
    "log_sigma_min",
    "log_sigma_max",
    "noise_row",
)
NOISE_ROW = tl.constexpr(COLUMNS.index("noise_row"))
WIDTH = tl.constexpr(len(COLUMNS))


def x_0_reference(x_t: Tensor, out: Tensor, table: Tensor, step: Tensor) -> Tensor:
    """Returns the predicted x_0 in the table's dtype; arguments as for `ddpm_step`."""
    x_0_x, x_0_out, clip = table[step.long()].T[:3, :, None, None, None]
    x_t, out = x_t.to(table.dtype), out[:, : x_t.shape[1]].to(table.dtype)
    return torch.clamp(x_0_x * x_t + x_0_out * out, -clip, clip)


def ddpm_step_reference(
    x_t: Tensor,
    out: Tensor,
    z: Tensor,
    table: Tensor,
    step: Tensor,
    learned: bool = False,
    old: Tensor | None = None,
) -> Tensor:
    """Returns x_{t-1} in the table's dtype; z is the noise, other arguments as for `ddpm_step`."""
    mean_x_0, mean_x, mean_out, mean_old, sigma, log_min, log_max = table[step.long()].T[
        3:10, :, None, None, None
    ]
    x_0 = x_0_reference(x_t, out, table, step)
    x_t, out, z = x_t.to(table.dtype), out.to(table.dtype), z.to(table.dtype)
    if learned:
        out, v = out.chunk(2, dim=1)
        fraction = (v + 1) * 0.5
        learned_sigma = (fraction * log_max + (1 - fraction) * log_min).exp()
        sigma = torch.where(sigma > 0, learned_sigma, 0)  # selected, not multiplied: 0 * inf is NaN
    mean = mean_x_0 * x_0 + mean_x * x_t + mean_out * out
    if old is not None:
        mean = mean + torch.where(mean_old != 0, mean_old * old.to(table.dtype), 0)
    return mean + sigma * z


def noise_rows(table: Tensor, step: Tensor) -> Tensor:
    """Returns the noise rows int64 [B] of rows `step` [B] of the table; exact below 2^24."""
    return table[step.long(), COLUMNS.index("noise_row")].long()


@triton.jit
def _ddpm_step_kernel(
    x_ptr,
    out_ptr,
    old_ptr,
    z_ptr,
    table_ptr,
    step_ptr,
    seed_ptr,
    image_ptr,
    x_image,
    x_channel,
    x_pixel,
    out_image,
    out_channel,
    out_pixel,
    ELEMENTS,
    TAG: tl.constexpr,
    CHANNELS: tl.constexpr,
    X_DENSE: tl.constexpr,
    OUT_DENSE: tl.constexpr,
    LEARNED: tl.constexpr,
    HISTORY: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, first = locate(ELEMENTS, BLOCK)
    # the step is read on the device: one CUDA graph serves all steps, and steps may differ by image
    table_ptr += tl.load(step_ptr + n).to(tl.int64) * WIDTH
    element = first * 4 + tl.arange(0, 4 * BLOCK)  # [4 * BLOCK]
    inside = element < ELEMENTS
    x_ptr += n.to(tl.int64) * x_image
    out_ptr += n.to(tl.int64) * out_image
    x_offsets = (
        element if X_DENSE else element % CHANNELS * x_channel + element // CHANNELS * x_pixel
    )
    out_offsets = (
        element if OUT_DENSE else element % CHANNELS * out_channel + element // CHANNELS * out_pixel
    )
    if GIVEN:
        z = tl.load(z_ptr + n.to(tl.int64) * x_image + x_offsets, mask=inside)  # strides of x_t
    else:
        noise_row = tl.load(table_ptr + NOISE_ROW)
        z = image_normals(seed_ptr, image_ptr, noise_row, n, TAG, first + tl.arange(0, BLOCK))

    x_0_x, x_0_out, clip = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    mean_x_0, mean_x = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    mean_out = tl.load(table_ptr + 5)
    sigma = tl.load(table_ptr + 7)

    x_t = tl.load(x_ptr + x_offsets, mask=inside)
    out = tl.load(out_ptr + out_offsets, mask=inside).to(tl.float32)
    if LEARNED:
        v = tl.load(out_ptr + CHANNELS * out_channel + out_offsets, mask=inside).to(tl.float32)
        fraction = (v + 1) * 0.5
        log_max, log_min = tl.load(table_ptr + 9), tl.load(table_ptr + 8)
        learned_sigma = tl.exp(fraction * log_max + (1 - fraction) * log_min)
        sigma = tl.where(sigma > 0, learned_sigma, 0.0)
    # NaN stays NaN and is not clipped to a valid pixel
    x_0 = tl.clamp(x_0_x * x_t + x_0_out * out, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    mean = mean_x_0 * x_0 + mean_x * x_t + mean_out * out
    if HISTORY:
        old_ptr += n.to(tl.int64) * x_image  # the layout of x_t
        mean_old = tl.load(table_ptr + 6)
        old = tl.load(old_ptr + x_offsets, mask=inside)
        # before the first step `old` is uninitialized: 0 * NaN would be NaN
        mean = mean + tl.where(mean_old != 0, mean_old * old, 0.0)
        tl.store(old_ptr + x_offsets, x_0, mask=inside)
    tl.store(x_ptr + x_offsets, mean + sigma * z, mask=inside)


def _check(
    x_t: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    image: Tensor,
    learned: bool,
    old: Tensor | None,
    z: Tensor | None,
) -> None:
    if x_t.ndim != 4 or x_t.dtype != torch.float32:
        raise ValueError(f"x_t is {x_t.dtype} {tuple(x_t.shape)}; expected float32 [B, C, H, W]")
    b, c, h, w = x_t.shape
    expected = (b, 2 * c if learned else c, h, w)
    if out.shape != expected or not out.is_floating_point() or out.device != x_t.device:
        kind = " (mean and variance)" if learned else ""
        raise ValueError(
            f"the network's output is {out.dtype} {tuple(out.shape)} on {out.device}; "
            f"expected floating {expected} on {x_t.device}{kind}"
        )
    image_strides(x_t, "x_t"), image_strides(out, "the network's output")
    properties = lambda v: (v.dtype, v.shape, v.stride(), v.device)
    for name, v in (("old", old), ("z", z)):
        if v is not None and properties(v) != properties(x_t):
            raise ValueError(
                f"{name} is {v.dtype} {tuple(v.shape)} with strides {v.stride()} on {v.device}; "
                "expected the dtype, shape, strides and device of x_t; use torch.empty_like(x_t)"
            )
    check_table("table", table, len(COLUMNS), x_t.device)
    check_per_image(b, x_t.device, step=step, seed=seed, image=image)


def _launch(
    x_t: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    image: Tensor,
    learned: bool,
    old: Tensor | None,
    z: Tensor | None,
) -> None:
    b, c, h, w = x_t.shape
    x_strides, out_strides = image_strides(x_t, "x_t"), image_strides(out, "the network's output")
    if x_t.numel():
        with torch.cuda.device_of(x_t):
            _ddpm_step_kernel[grid(c * h * w, b)](
                x_t,
                out,
                x_t if old is None else old,
                x_t if z is None else z,
                table,
                step,
                seed,
                image,
                *x_strides,
                *out_strides,
                c * h * w,
                TAG=REVERSE,
                CHANNELS=c,
                X_DENSE=is_element_order(x_t, x_strides),
                OUT_DENSE=not learned and is_element_order(out, out_strides),
                LEARNED=learned,
                HISTORY=old is not None,
                GIVEN=z is not None,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


@operation("ddpm_fast::ddpm_step", mutates_args=("x_t", "old"))
def ddpm_step(
    x_t: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    image: Tensor,
    learned: bool = False,
    old: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """Replaces x_t by x_{t-1} in place; generates the noise of stream `noise.REVERSE` in registers.

    For the equations see the module's docstring; for DDPM they are Algorithm 2 of Ho et al. 2020.

    Args:
        x_t: [B, C, H, W] fp32, channels-first or channels-last; read once, written once.
        out: Network output [B, C, H, W], or [B, 2C, H, W] if `learned`; fp32, fp16 or bf16, either
            layout; read once.
        table: [R, 11] fp32 with columns `COLUMNS`; see `ddpm_fast.diffusion.solvers.StepTable`.
        step: [B] integer in 0..R-1, each image's row of the table.
        seed, image: [B] integer, seed and image index of the noise.
        learned: Whether the network learns the variance.
        old: x_0 of the previous step, like x_t; used where mean_old is not 0, then overwritten with
            this step's x_0. None: not used.
        z: The noise, like x_t, finite also where sigma is 0. None: generated from seed, image and
            the table's column noise_row.

    Raises:
        ValueError: An argument has a wrong shape, dtype, layout or device.
    """
    _check(x_t, out, table, step, seed, image, learned, old, z)
    if launches_kernel(x_t, "noise", "ddpm_step"):
        _launch(x_t, out, table, step, seed, image, learned, old, z)
        return
    if z is None:
        z = torch.zeros((), dtype=x_t.dtype, device=x_t.device)
        # without noise (DDIM) a CPU generates none; on a GPU the test would synchronize
        if x_t.is_cuda or table[step.long(), COLUMNS.index("sigma")].any():
            rows = noise_rows(table, step)
            z = noise_reference(seed, image, rows, REVERSE, tuple(x_t.shape[1:]))
    x_prev = ddpm_step_reference(x_t, out, z, table, step, learned, old)
    if old is not None:
        old.copy_(x_0_reference(x_t, out, table, step))
    x_t.copy_(x_prev)


@ddpm_step.register_fake
def _(x_t, out, table, step, seed, image, learned=False, old=None, z=None):
    return None
