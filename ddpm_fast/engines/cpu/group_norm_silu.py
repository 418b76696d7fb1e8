"""GroupNorm with SiLU as one autograd operation on a CPU, with the time embedding that is added
before it and the gradient of the residual path.

x is [N, C, H, W], channels-last, fp32 or bf16; arithmetic is fp32 (see `norm_loops`). One thread
computes an image and sums over images run in order, so bits do not depend on the number of threads.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .norm_loops import fitting_width, functions

MIN_ELEMENTS = 2**17  # for more than one thread
SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def group_norm_silu_reference(
    x: Tensor, time: Tensor | None, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """GroupNorm of x + time, then SiLU if `silu`: x [N, C, H, W]; time [N, C]; gamma, beta [C]."""
    y = F.group_norm(x if time is None else x + time[:, :, None, None], groups, gamma, beta, eps)
    return F.silu(y) if silu else y


def fits(x: Tensor, gamma: Tensor) -> bool:
    """Whether `group_norm_silu` supports these tensors."""
    supported = x.device.type == "cpu" and x.dtype in SUFFIX and x.ndim == 4 and x.numel() > 0
    return supported and gamma.dtype == torch.float32 and fitting_width(x.shape[1]) is not None


def prepare() -> None:
    """Compiles the loops. Raises OSError or RuntimeError if LLVM does not support this CPU."""
    functions(fitting_width(64) or 4)


def group_norm_silu(
    x: Tensor,
    time: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Computes GroupNorm of x + time, then SiLU if `silu` is set (Wu & He 2018).

    Args:
        x: [N, C, H, W] on the CPU, fp32 or bf16; channels-last is not copied.
        time: [N, C] floating, added to every pixel before the norm; or None.
        gamma: Scale [C], fp32.
        beta: Shift [C], fp32.
        groups: A divisor of C.
        eps: Added to the variance.
        silu: Whether SiLU follows.

    Returns:
        (y, x): y [N, C, H, W] in x's dtype, channels-last. Use this x for a residual path: the pass
        that writes the norm's gradient adds the gradient of this x.
    """
    return _GroupNormSiLU.apply(x, time, gamma, beta, groups, eps, silu)


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(*shape: int) -> Tensor:
    """An fp32 tensor on the CPU, independent of PyTorch's defaults."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        time: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        rows, gamma, beta = _rows(x), gamma.contiguous(), beta.contiguous()
        y = torch.empty_like(rows)
        stats = _empty(n, 2, c)
        shift = _empty(c).zero_() if time is None else time.float().contiguous()
        bits = int.from_bytes(struct.pack("<f", eps), "little")
        function = functions(fitting_width(c) or 0)[f"forward_{SUFFIX[x.dtype]}"]
        pointers = [t.data_ptr() for t in (gamma, beta, y, stats)]
        head = (rows.data_ptr(), shift.data_ptr(), 0 if time is None else c, *pointers)

        def part(first: int, last: int) -> None:
            function(*head, first, last, h * w, c, groups, bits, int(silu))

        _split(part, n, x.numel())
        ctx.save_for_backward(rows, gamma, beta, stats)
        ctx.groups, ctx.silu, ctx.time = groups, silu, None if time is None else time.dtype
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return residual, *[None] * 6
        x, gamma, beta, stats = ctx.saved_tensors
        n, c, h, w = x.shape
        dy = _rows(dy.to(x.dtype))
        residual = None if residual is None else _rows(residual.to(x.dtype))
        dx, sums, time = torch.empty_like(x), _empty(n, 2, c), _empty(n, c)
        function = functions(fitting_width(c) or 0)[f"backward_{SUFFIX[x.dtype]}"]
        pointers = [t.data_ptr() for t in (gamma, beta, stats, dx, sums, time)]
        head = (
            dy.data_ptr(),
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            *pointers,
        )

        def part(first: int, last: int) -> None:
            scratch = _empty((h * w + 2) * c)
            function(*head, scratch.data_ptr(), first, last, h * w, c, ctx.groups, int(ctx.silu))

        _split(part, n, x.numel())
        dgamma, dbeta = _sum_of_images(sums)
        return dx, None if ctx.time is None else time.to(ctx.time), dgamma, dbeta, None, None, None


def _sum_of_images(sums: Tensor) -> Tensor:
    """[N, 2, C] -> [2, C], summed in order; the order of `sum` depends on the number of threads."""
    return sums.cumsum(0)[-1]


# ---- threads


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)


def _split(part: Callable[[int, int], None], images: int, elements: int) -> None:
    """Calls part(first, last) for all images, in up to torch.get_num_threads() threads."""
    threads = min(torch.get_num_threads(), images) if elements >= MIN_ELEMENTS else 1
    if threads == 1:
        return part(0, images)
    first_bounds, *rest = pairwise(images * i // threads for i in range(threads + 1))
    results = [_pool(threads - 1).submit(part, *bounds) for bounds in rest]
    part(*first_bounds)
    for result in results:
        result.result()
