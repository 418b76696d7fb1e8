"""Fits of time against batch, size, channels and steps by sums of powers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

Series = list[dict[str, Any]]  # rows with x, ms (a step of the whole batch, or a loop) and bytes

# terms of a fit: a fixed cost; per image or step; per pixel and, for attention, per pair of pixels;
# bytes by channels and FLOP by channels squared
POWERS = dict(batch=(0, 1), steps=(0, 1), size=(0, 2, 4), channels=(0, 1, 2))


@dataclass(frozen=True)
class Fit:
    """ms = sum of factors * n**powers; `max_error` is the largest relative deviation of a row."""

    powers: tuple[int, ...]
    factors: tuple[float, ...]
    max_error: float

    @classmethod
    def of(cls, name: str, rows: Series) -> Fit:
        """The sum of terms with positive factors that minimizes the squares of relative errors."""
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
