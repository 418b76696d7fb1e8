"""Fixtures of the pytest-benchmark suites: `python -m pytest bench/bench_*.py`; `--tiny` runs them on any machine.

The timer synchronizes with the device. A case gives its relative error first; above the tolerance it fails and is not timed. (Plain
PyTorch's elementwise code, with other noise, is not checked.) Rates and shares of the ceilings in the same run are in `extra_info`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddpm_fast.benchmark.kernels import ceilings as measured_ceilings


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--tiny", action="store_true", help="tiny sizes: no figure means anything")


def synchronised() -> float:
    """Seconds, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(
            pytest.mark.benchmark(
                timer=synchronised, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
            )
        )


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--tiny"))


@pytest.fixture(scope="session")
def device(tiny: bool) -> torch.device:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        False  # fp32 without TF32
    )
    return torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """Bytes per second of "copy", FLOP per second by dtype. On a CPU those of one core."""
    rates = {
        c["dtype"] if c["kind"] == "flops" else c["what"]: c["per_s"]
        for c in measured_ceilings(device, "fp32", tiny)
    }
    if device.type == "cuda":
        kinds = ["bf16"] + ["fp8"] * (torch.cuda.get_device_capability() >= (8, 9))
        rates |= {
            k: c["per_s"]
            for k in kinds
            for c in measured_ceilings(device, k)
            if c["kind"] == "flops"
        }
    return rates


Timed = Callable[..., float]


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """timed(call, error, allowed, **info) -> median seconds of a call, after its error is checked."""

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
        # with --benchmark-disable there are no times
        return float(benchmark.stats.stats.median) if benchmark.stats else float("nan")

    return run
