"""Fixtures of the pytest-benchmark suites: `python -m pytest bench/bench_*.py`.

`--tiny` runs them in tiny sizes on any machine. The timer synchronizes with the device. A case is
timed if its relative error is within the tolerance, else it fails. The elementwise code of plain
PyTorch is not checked, since its noise differs. Rates, and their shares of the ceilings measured
in the same run, are in `extra_info`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ddpm_fast.benchmark.kernels import ceilings as measured_ceilings
from ddpm_fast.utils.numerics import full_fp32


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--tiny", action="store_true", help="tiny sizes, whose times mean nothing")


def synchronized() -> float:
    """Seconds, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(
            pytest.mark.benchmark(
                timer=synchronized, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
            )
        )


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--tiny"))


@pytest.fixture(scope="session")
def device(tiny: bool) -> Iterator[torch.device]:
    with full_fp32():
        yield torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """Bytes per second of "copy", FLOP per second by dtype; on a CPU of one core."""
    dtypes = ["fp32"]
    if device.type == "cuda":
        dtypes += ["bf16"] + ["fp8"] * (torch.cuda.get_device_capability() >= (8, 9))
    return {
        c["dtype"] if c["kind"] == "flops" else c["what"]: c["per_s"]
        for dtype in dtypes
        for c in measured_ceilings(device, dtype, tiny)
    }


Timed = Callable[..., float]


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """timed(call, error, allowed, **info) -> median seconds of a call, if its error is allowed."""

    def run(
        call: Callable[[], object],
        error: float,
        allowed: float,
        rounds: int | None = None,
        **info: Any,
    ) -> float:
        if not error <= allowed:
            pytest.fail(
                f"not timed: the relative error is {error:.1e}; expected at most {allowed:.1e}"
            )
        benchmark.extra_info.update(error=error, **info)
        if rounds is None:
            benchmark(call)
        else:
            benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)
        # no times with --benchmark-disable
        return float(benchmark.stats.stats.median) if benchmark.stats else float("nan")

    return run
