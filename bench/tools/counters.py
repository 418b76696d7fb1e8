"""Counters of a step, which are equal on every machine: they detect slowdowns without a GPU.

    python -m bench.tools.counters            compares with counters.json; exit code 1 if one grew
    python -m bench.tools.counters --update   pins the current values

Launches, FLOP, bytes, memory and compilations are those of the plans of four networks. Operations
of the host and new tensors per step are counted while engines run a small network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.workloads import NETWORKS, TINY_UNET
from ddpm_fast import NoiseSchedule, Sampler, UNet
from ddpm_fast.benchmark.results import write
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.engines.fused.engine import FusedEngine
from ddpm_fast.engines.fused.precompile import distinct_launches
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels import _triton

PINNED = Path(__file__).with_name("counters.json")
TOLERANCE = 0.01  # of FLOP and bytes; the counters in EXACT must not grow
EXACT = ("launches", "compilations", "replays", "host calls", "new tensors")


def counters() -> Row:
    """name -> {counter: number}"""
    plans = {
        f"{name}, batch {batch}, {dtype}": of_plan(name, batch, dtype)
        for name, batch, dtype in CASES
    }
    return plans | {f"a step, {engine}": of_step(engine) for engine in ("fused", "reference")}


CASES = [
    (name, 16 if name == "celebahq256" else 256, dtype)
    for name in NETWORKS
    for dtype in ("bf16", "fp8")
]
CASES += [("cifar10", 1, "bf16")]


def of_plan(name: str, batch: int, dtype: str) -> Row:
    """Counters of a plan for an H100, on the meta device."""
    with torch.device("meta"):
        unet = UNet(NETWORKS[name])
    fused = FusedUNet(unet, batch, dtype, "meta", check=False)
    plan = fused.plan()
    costs = [launch.cost() for launch in plan]
    row = dict(
        launches=len(plan),
        mflop_per_image=round(sum(flops for flops, _ in costs) / batch / 1e6),
        kb_per_image=round(sum(moved for _, moved in costs) / batch / 1e3),
        arena_kb=round(plan.arena.size / 1e3),
    )
    if _triton.PRESENT:
        row["compilations"] = len(distinct_launches(fused.spec()))
    return row


class _Replayed:
    """Replacement for a CUDA graph: operations of the step are the device's and not counted."""

    replays = 0

    def __init__(self, step: Callable[[], Any], repeats: int = 1, pool: Any = None) -> None:
        self.step, self.repeats = step, repeats

    def __call__(self) -> None:
        _Replayed.replays += 1
        with torch._C._DisableTorchDispatch():
            for _ in range(self.repeats):
                self.step()

    def free(self) -> None:
        pass


class _Calls(TorchDispatchMode):
    """Counts operations and the tensors that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.made = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        self.made += (
            isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs
        )
        return out


def of_step(engine: str, steps: int = 10) -> Row:
    """Counters per step: graph replays, operations of the host, and tensors that they allocate."""
    torch.manual_seed(0)
    unet = UNet(TINY_UNET).eval().requires_grad_(False)
    shape = (TINY_UNET.in_channels, *(TINY_UNET.size or (8, 8)))
    sampler = Sampler(unet, NoiseSchedule.linear(), shape, engine=engine)
    if engine == "fused":
        sampler.engine = FusedEngine(
            unet, shape, "fp32", sampler.device, len(sampler.schedule), graph=_Replayed
        )
    table = sampler.table(steps=steps)
    state = sampler.begin(torch.arange(2), 0)
    with _Calls() as counted:
        run = sampler.engine.steps(state, table)
        next(run)
        before, _Replayed.replays = (counted.calls, counted.made), 0
        while next(run) < steps:
            pass
        calls, made = counted.calls - before[0], counted.made - before[1]
    each = steps - 1
    return {
        "replays": _Replayed.replays / each,
        "host calls": calls / each,
        "new tensors": made / each,
    }


def worse(current: Row, pinned: Row) -> list[str]:
    """A line per counter that grew, that is not pinned, or that is pinned but not counted."""
    lines = [f"{name}: not pinned" for name in current.keys() - pinned.keys()]
    lines += [
        f"{name}: pinned, but not counted any more" for name in pinned.keys() - current.keys()
    ]
    for name in current.keys() & pinned.keys():
        for counter, value in current[name].items():
            before = pinned[name].get(counter, 0)
            allowed = before if counter in EXACT else before * (1 + TOLERANCE)
            if value > allowed:
                lines.append(f"{name}: {counter} {before:g} -> {value:g}")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="pin the current values")
    args = parser.parse_args()
    current = counters()
    if args.update:
        write(PINNED, current)
        print(f"pinned in {PINNED}")
        return 0
    lines = worse(current, json.loads(PINNED.read_text()))
    if lines:
        lines.append("worse; if intended, run python -m bench.tools.counters --update")
    print("\n".join(lines or ["no counter grew"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
