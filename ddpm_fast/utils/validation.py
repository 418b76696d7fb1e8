"""Argument validation."""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any


def integer(name: str, value: Any) -> int:
    """Returns a value of any integer type as an int. ValueError for other types and for bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}; expected an integer") from None


def seed_bits(seed: int) -> int:
    """Returns the int64 with the bits of a seed in 0 ... 2^64-1. ValueError for other seeds."""
    seed = integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}; expected 0 to 2^64 - 1")
    return seed - 2**64 if seed >= 2**63 else seed


def is_count(value: Any, limit: float = math.inf) -> bool:
    """Returns True for an int from 1 to `limit`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def is_counts(value: Any, length: int | None = None, limit: float = math.inf) -> bool:
    """Returns True for a non-empty list or tuple of counts up to `limit`, of `length` if given."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and length in (None, len(value))
        and all(is_count(n, limit) for n in value)
    )


def is_number(value: Any) -> bool:
    """Returns True for a finite int or float in the range of fp64."""
    try:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:  # an int beyond fp64
        return False


def is_number_in(value: Any, low: float, high: float) -> bool:
    """Returns True for an int or float from `low` to `high`, both included."""
    return is_number(value) and low <= value <= high


def shown(value: Any) -> str:
    """Returns `repr` of a value for an error message: one line, truncated."""
    return " ".join(_Shown().repr(value).split())


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlist = self.maxtuple = 16
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python raises for ints of more than 4300 digits
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"
