"""Argument validation."""

from __future__ import annotations

import math
import operator
from typing import Any


def integer(name: str, value: Any) -> int:
    """Returns `value`, of any integer type, as an int. ValueError for anything else, including bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}; expected an integer") from None


def seed_bits(seed: int) -> int:
    """The int64 with the same bits as a seed in 0..2^64-1. ValueError for any other seed."""
    seed = integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}; expected 0 to 2^64 - 1")
    return seed - 2**64 if seed >= 2**63 else seed


def is_count(value: Any) -> bool:
    """True for an int of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_counts(value: Any, length: int | None = None) -> bool:
    """True for a non-empty list or tuple of counts, of `length` if that is given."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and length in (None, len(value))
        and all(map(is_count, value))
    )


def is_number(value: Any) -> bool:
    """True for a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
