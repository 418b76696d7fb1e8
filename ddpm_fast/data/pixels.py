"""Conversion between network values in [-1, 1] and uint8 pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nearest(x: Tensor) -> Tensor:
    """Maps [-1, 1] to 0 ... 255, rounded to the nearest, ties to even."""
    return ((x + 1) * 127.5).round()


def to_uint8(x: Tensor, level: Callable[[Tensor], Tensor] = nearest) -> Tensor:
    """Converts images [N, C, H, W], clipped to [-1, 1], to uint8 [N, H, W, C] by `level`."""
    return level(x.clamp(-1, 1)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """Converts uint8 [N, H, W, C] to fp32 [N, C, H, W] in [-1, 1], channels-last."""
    return images.float().div_(127.5).sub_(1).permute(0, 3, 1, 2)
