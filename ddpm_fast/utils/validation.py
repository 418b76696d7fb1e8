"""Small questions that every border asks of what it is given."""

from __future__ import annotations

import math
import operator
from typing import Any


def integer(name: str, value: Any) -> int:
    """`value` as an int, of whatever integer type it is. ValueError for anything else, booleans among it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}; expected an integer") from None


def is_count(value: Any) -> bool:
    """An int of at least 1?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_counts(value: Any, length: int | None = None) -> bool:
    """A list or tuple of them, not empty, and of `length` where one is asked for?"""
    return isinstance(value, (list, tuple)) and bool(value) and length in (None, len(value)) and all(map(is_count, value))


def is_number(value: Any) -> bool:
    """A finite int or float?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
