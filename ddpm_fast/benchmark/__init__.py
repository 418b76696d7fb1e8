"""Benchmarks of ddpm_fast against baselines: `compare`, and the command `ddpm-fast bench`.

workload.py   checkpoint, precision and size that every engine runs
baselines.py  engines with one interface: a forward pass and a sampling loop
engines.py    engines in this process or in a worker process (worker.py), and their requests
check.py      accuracy check before an engine is timed
rounds.py     interleaved rounds; medians with confidence intervals
runner.py     `compare`
results.py    results file, table, and comparison with an older file
kernels.py    time of every kernel, and the ceilings of the device
figures.py    plots of a result
timer.py      timing of one call
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runner import Effort, Progress, Stage, compare

__all__ = ["Effort", "Progress", "Stage", "compare"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported on first use: worker processes do without
        return getattr(import_module(f"{__name__}.runner"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
