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
    return _position_weighted_sum(flat.view(word))


def _position_weighted_sum(words: Tensor) -> Tensor:
    """Sum of words in which exchanged words count: rows and columns of 64 have odd weights."""
    rows = words[: len(words) // 64 * 64].view(-1, 64)
    parts = (rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64))
    tail = words[rows.numel() :].to(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for sums, factor in zip((*parts, tail), (1, 0x9E3779B1, 0x85EBCA77), strict=True):
        weights = 2 * torch.arange(len(sums), device=words.device) + 1
        total = total + factor * (sums * weights).sum()  # int64 wraps
    return total
