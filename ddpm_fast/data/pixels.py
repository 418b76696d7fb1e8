"""Which images are meant, and what they come out as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..utils.validation import integer

Images = int | range | Sequence[int] | Tensor
Labels = int | Sequence[int] | Tensor | None


def check_images(images: Images) -> range | Tensor:
    """Image indices as a range, never written out, or as int64 [N]. ValueError for what is no integer of 0..2^63-1."""
    if not isinstance(images, (range, list, tuple, Tensor, np.ndarray)):
        images = range(integer("images", images))
        if images.stop < 0:
            raise ValueError(f"images = {images.stop}; expected a count of at least 0, or a range")
    if isinstance(images, range):
        if images and (min(images[0], images[-1]) < 0 or max(images[0], images[-1]) >= 2**63):
            raise ValueError(f"image indices from {images[0]} to {images[-1]}; expected 0 to 2^63 - 1")
        return images
    indices = torch.as_tensor(images, device="cpu") if len(images) else torch.empty(0, dtype=torch.int64, device="cpu")
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"images are {indices.dtype} {tuple(indices.shape)}; expected a count, or a range or list of integers")
    if len(indices) and indices.min() < 0:
        raise ValueError(f"image index {int(indices.min())}; expected 0 or more")
    return indices.long()


def image_indices(images: range | Tensor) -> Tensor:
    """Checked image indices as int64 [N] on the CPU."""
    return images if isinstance(images, Tensor) else torch.tensor(list(images), dtype=torch.int64, device="cpu")


def check_labels(labels: Labels, count: int, num_classes: int | None) -> Tensor | None:
    """One class for all or one per image as int64 [count] on the CPU, None as None. ValueError for what is no class."""
    if labels is None:
        return None
    if num_classes is None:
        raise ValueError("labels were given, but the network is unconditional; leave them out")
    try:
        chosen = torch.as_tensor(labels, device="cpu")
        whole = not chosen.is_floating_point() and chosen.dtype != torch.bool
        chosen = chosen.long()
    except (TypeError, ValueError, RuntimeError):
        whole = False
    if not whole or chosen.shape not in ((), (count,)):
        raise ValueError(f"labels {str(labels)[:60]}; expected one integer, or {count}, one per image")
    if count and (chosen.min() < 0 or chosen.max() >= num_classes):
        raise ValueError(f"labels from {chosen.min()} to {chosen.max()}; expected 0..{num_classes - 1}")
    return chosen.expand(count)


def seed_bits(seed: int) -> int:
    """A seed in 0..2^64-1 as the int64 with the same bits."""
    seed = integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}; expected 0 to 2^64 - 1")
    return seed - 2**64 if seed >= 2**63 else seed


def nearest(x: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255, rounded to the nearest, ties to even."""
    return ((x + 1) * 127.5).round()


def to_uint8(x: Tensor, level: Callable[[Tensor], Tensor] = nearest) -> Tensor:
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]; `level` says which of 0 ... 255 a value becomes."""
    return level(x.clamp(-1, 1)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] -> fp32 [N, C, H, W] in [-1, 1], channels-last: what `to_uint8` takes back."""
    return images.float().div_(127.5).sub_(1).permute(0, 3, 1, 2)
