"""One step further along the step table, for every image at its own row, and what the network reads there.

row   = min(row + by, R - 1)
t     = t_of[row]
entry = t * classes + label         the row of the network's table of time embeddings
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import check_per_image, launches_kernel, tl, triton

BLOCK = 256


def advance_reference(row: Tensor, t_of: Tensor, label: Tensor, classes: int, by: int) -> tuple[Tensor, Tensor, Tensor]:
    """row, label [B], t_of [R] -> (row, t, entry) [B], each in int64."""
    row = (row.long() + by).clamp(max=len(t_of) - 1)
    t = t_of[row]
    return row, t, t * classes + label


@triton.jit(do_not_specialize=["B", "R", "classes", "by"])
def _advance_kernel(row_ptr, t_of_ptr, t_ptr, entry_ptr, label_ptr, B, R, classes, by, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = n < B
    row = tl.load(row_ptr + n, mask=exists, other=0) + by
    row = tl.where(row < R, row, R - 1)
    tl.store(row_ptr + n, row, mask=exists)
    t = tl.load(t_of_ptr + row, mask=exists, other=0)
    tl.store(t_ptr + n, t, mask=exists)
    tl.store(entry_ptr + n, t * classes + tl.load(label_ptr + n, mask=exists, other=0), mask=exists)


def advance(row: Tensor, t_of: Tensor, t: Tensor, entry: Tensor, label: Tensor, classes: int, by: int = 1) -> None:
    """`advance_reference` in place: row, t and entry are overwritten.

    row [B] int32; t, entry, label [B] int64; t_of [R] int64, the timestep at each row; classes 1 where there are none.
    ValueError for wrong shapes, types or devices.
    """
    check_per_image(len(row), row.device, row=row, t=t, entry=entry, label=label)
    if (row.dtype, t.dtype, entry.dtype, label.dtype, t_of.dtype) != (torch.int32, *[torch.int64] * 4) or t_of.ndim != 1:
        raise ValueError(f"row is {row.dtype}, t_of {t_of.dtype} {tuple(t_of.shape)}; expected int32, and int64 [R]")
    if launches_kernel(row, "advance"):
        with torch.cuda.device_of(row):
            grid = (triton.cdiv(len(row), BLOCK),)
            _advance_kernel[grid](row, t_of, t, entry, label, len(row), len(t_of), classes, by, BLOCK=BLOCK)
        return
    for out, value in zip((row, t, entry), advance_reference(row, t_of, label, classes, by), strict=True):
        out.copy_(value)
