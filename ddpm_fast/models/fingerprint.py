"""Fingerprint of a module's weights: detects that they have changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> bytes:
    """Returns one 64-bit sum per parameter over the bits of its elements.

    Version counters are not sufficient: `.data` and fused optimizers do not increment them.
    """
    sums = [_sum_of_bits(p) for p in model.parameters()]
    return torch.stack(sums).cpu().numpy().tobytes() if sums else b""


def _sum_of_bits(p: Tensor) -> Tensor:
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    flat = (p.permute(0, 2, 3, 1) if channels_last else p).flatten()
    # a parameter may be a view into a larger tensor, at any offset
    alignment = math.gcd(flat.nbytes, flat.storage_offset() * flat.itemsize)
    word = next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if alignment % dtype.itemsize == 0
    )
    return flat.view(word).sum(dtype=torch.int64)
