"""Time and memory against batch, image size, channels and steps, on this CPU, in two minutes.

    python -m bench.studies.scaling      into bench-results/scaling.json

`bench.report` fits and draws these series, and the series predicted for an H100.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.workloads import NETWORKS, OUT, random_checkpoint, scaled
from ddpm_fast import Sampler, UNetConfig
from ddpm_fast.benchmark.results import provenance, write
from ddpm_fast.benchmark.timer import measure

Series = list[dict[str, Any]]  # rows with x, ms and bytes


def measured() -> dict[str, Any]:
    """The Fashion-MNIST network on the CPU engine."""
    base = NETWORKS["fashion_mnist"]
    series: dict[str, Series] = dict(
        batch=[_step(base, n, 32) | dict(x=n) for n in (1, 2, 4, 8, 16, 32)],
        size=[_step(base, 2, n) | dict(x=n) for n in (16, 24, 32, 48, 64, 96)],
        channels=[_step(scaled(base, n), 2, 32) | dict(x=n) for n in (32, 64, 96, 128, 192)],
        steps=[_loop(base, n) | dict(x=n) for n in (2, 5, 10, 20, 50, 100)],
    )
    return dict(**provenance(), series=series)


def _step(config: UNetConfig, batch: int, size: int) -> dict[str, Any]:
    """Time of one of ten steps, which excludes the start and the end of a loop."""
    sampler = _sampler(config, size)
    table, state = sampler.table(steps=10), sampler.begin(torch.arange(batch), 0)

    def steps() -> None:
        for _ in sampler.engine.steps(copy.deepcopy(state), table):
            pass

    return _timed(steps, sampler, 10)


def _loop(config: UNetConfig, steps: int) -> dict[str, Any]:
    """Time of a whole loop of two images."""
    sampler = _sampler(config, 32)
    return _timed(lambda: sampler.sample(2, steps=steps, output="float"), sampler, 1)


def _sampler(config: UNetConfig, size: int) -> Sampler:
    checkpoint = random_checkpoint(config)
    return Sampler.from_checkpoint(checkpoint, "cpu", size=(size, size), engine="cpu")


def _timed(call: Callable[[], object], sampler: Sampler, steps: int) -> dict[str, Any]:
    timing = measure(call, sampler.device, 3)
    engine: Any = sampler.engine
    row = dict(ms=1e3 * timing.median / steps, spread=timing.spread, bytes=engine.memory)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=OUT / "scaling.json", help="JSON file (default: %(default)s)"
    )
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, measured())


if __name__ == "__main__":
    main()
