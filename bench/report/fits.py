"""Fits of time against batch, size, channels and steps: sums of powers, by least squares of relative errors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

Series = list[dict[str, Any]]  # rows with x, ms (a step of the whole batch, or a loop) and bytes

# the terms a fit may have: fixed cost; per image or step; per pixel, and attention between all of them; bytes and FLOP by channels
POWERS = dict(batch=(0, 1), steps=(0, 1), size=(0, 2, 4), channels=(0, 1, 2))


@dataclass(frozen=True)
class Fit:
    """ms = sum of factors * n**powers. max_error: largest relative deviation of a row."""

    powers: tuple[int, ...]
    factors: tuple[float, ...]
    max_error: float

    @classmethod
    def of(cls, name: str, rows: Series) -> Fit:
        """Least squares of relative errors among the sums of `POWERS[name]` with positive factors."""
        n, ms = (np.array([r[k] for r in rows], float) for k in ("x", "ms"))
        best = None
        for powers in (c for k in range(1, 4) for c in itertools.combinations(POWERS[name], k)):
            columns = np.stack([n**p / ms for p in powers], 1)
            factors, *_ = np.linalg.lstsq(columns, np.ones(len(n)), rcond=None)
            errors = columns @ factors - 1
            if min(factors) > 0 and (best is None or errors @ errors < best[0]):
                best = (
                    errors @ errors,
                    cls(powers, tuple(map(float, factors)), float(abs(errors).max())),
                )
        assert best is not None
        return best[1]

    def __call__(self, n: Any) -> Any:
        return sum(f * n**p for f, p in zip(self.factors, self.powers, strict=True))

    def __str__(self) -> str:
        terms = {0: "", 1: " n", 2: " n²", 4: " n⁴"}
        return " + ".join(
            f"{f:.3g}{terms[p]}" for f, p in zip(self.factors, self.powers, strict=True)
        )
