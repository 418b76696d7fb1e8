"""Numerics: fp32 without TF32, and relative errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_fp32() -> Iterator[None]:
    """Disables TF32, which cuDNN uses by default, by either of torch's interfaces."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    backends: tuple[Any, ...]
    value: Any
    try:
        backends, name, value = (cudnn, matmul), "allow_tf32", False
        previous = [getattr(backend, name) for backend in backends]
    except RuntimeError:  # the newer interface is in use, and torch does not allow mixing them
        backends, name, value = (cudnn.conv, matmul), "fp32_precision", "ieee"
        previous = [getattr(backend, name) for backend in backends]
    for backend in backends:
        setattr(backend, name, value)
    try:
        yield
    finally:
        for backend, value in zip(backends, previous, strict=True):
            setattr(backend, name, value)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Returns ||x - exact|| / ||exact||, computed in fp64."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm())
