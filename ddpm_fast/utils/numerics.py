"""Numerics: fp32 that is computed as fp32, and the error of a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions and products without TF32, which cuDNN takes by default. Either of torch's two ways to say so is respected."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    places: tuple[Any, ...]
    wanted: Any
    try:
        places, name, wanted = (cudnn, matmul), "allow_tf32", False
        before = [getattr(place, name) for place in places]
    except RuntimeError:  # the program has used the newer way, and torch lets nobody mix them
        places, name, wanted = (cudnn.conv, matmul), "fp32_precision", "ieee"
        before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, wanted)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact|| in fp64."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())
