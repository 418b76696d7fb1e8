"""Advance of each image's step index, with lookup of its timestep and row of time embeddings.

step     = min(step + by, R - 1)
t        = t_of[step]
time_row = t * classes + label         row of the network's table of time embeddings
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import check_per_image, launches_kernel, tl, triton

BLOCK = 256


def advance_reference(
    step: Tensor, t_of: Tensor, label: Tensor, classes: int, by: int
) -> tuple[Tensor, Tensor, Tensor]:
    """step, label [B], t_of [R] -> (step, t, time_row), int64 [B] each."""
    step = (step.long() + by).clamp(max=len(t_of) - 1)
    t = t_of[step]
    return step, t, t * classes + label


@triton.jit(do_not_specialize=["B", "R", "classes", "by"])
def _advance_kernel(
    step_ptr, t_of_ptr, t_ptr, time_row_ptr, label_ptr, B, R, classes, by, BLOCK: tl.constexpr
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = n < B
    step = tl.load(step_ptr + n, mask=exists, other=0) + by
    step = tl.where(step < R, step, R - 1)
    tl.store(step_ptr + n, step, mask=exists)
    t = tl.load(t_of_ptr + step, mask=exists, other=0)
    tl.store(t_ptr + n, t, mask=exists)
    tl.store(
        time_row_ptr + n, t * classes + tl.load(label_ptr + n, mask=exists, other=0), mask=exists
    )


def advance(
    step: Tensor,
    t_of: Tensor,
    t: Tensor,
    time_row: Tensor,
    label: Tensor,
    classes: int,
    by: int = 1,
) -> None:
    """Advances step by `by` rows of the step table, in place, and overwrites t and time_row.

    Args:
        step: [B] int32, step indices.
        t_of: [R] int64, the timestep of each step.
        t: [B] int64, output: timesteps.
        time_row: [B] int64, output: rows of the table of time embeddings.
        label: [B] int64, class of each image.
        classes: Number of classes; 1 if the network is unconditional.
        by: Number of steps.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device.
    """
    check_per_image(len(step), step.device, step=step, t=t, time_row=time_row, label=label)
    dtypes = (step.dtype, t.dtype, time_row.dtype, label.dtype, t_of.dtype)
    if dtypes != (torch.int32, *[torch.int64] * 4) or t_of.ndim != 1:
        raise ValueError(
            f"step, t, time_row, label and t_of are {dtypes}, t_of {tuple(t_of.shape)}; "
            "expected int32 for step, int64 for the others, and t_of [R]"
        )
    if launches_kernel(step, "advance"):
        with torch.cuda.device_of(step):
            grid = (triton.cdiv(len(step), BLOCK),)
            _advance_kernel[grid](
                step, t_of, t, time_row, label, len(step), len(t_of), classes, by, BLOCK=BLOCK
            )
        return
    for out, value in zip(
        (step, t, time_row), advance_reference(step, t_of, label, classes, by), strict=True
    ):
        out.copy_(value)
