"""All weights of a network as one vector: one operation per update instead of one per parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.unet import UNet


def flatten(unet: UNet) -> Tensor:
    """Moves the weights into one vector and makes the parameters views of it.

    Returns:
        The vector, in the parameters' dtype and order; convolutions are channels-last.
    """
    vector = torch.cat([as_vector(p.detach()) for p in unet.parameters()])
    parts = vector.split([p.numel() for p in unet.parameters()])
    for p, part in zip(unet.parameters(), parts, strict=True):
        if p.ndim == 4:
            o, i, h, w = p.shape
            p.data = part.view(o, h, w, i).permute(0, 3, 1, 2)
        else:
            p.data = part.view(p.shape)
    return vector


def as_vector(x: Tensor) -> Tensor:
    """One parameter or gradient in the layout of `flatten`."""
    return x.permute(0, 2, 3, 1).reshape(-1) if x.ndim == 4 else x.reshape(-1)


def sum_in_order(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of the vectors, from first to last, in the first one's memory."""
    total = vectors[0]
    for vector in vectors[1:]:
        total += vector
    return total
