"""Committed results: a folder per machine, `cpu-*` and `gpu-*`; `accuracy` for all machines."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workloads import RESULTS
from ddpm_fast.benchmark.timer import Row

NETWORKS = ("fashion-mnist-32", "cifar10")  # of `bench.run_all`
TIMINGS = (*NETWORKS, "scaling", "other-network", "training-fp32", "training-bf16")  # per machine
ACCURACY = ("precision", "quality", "bits")
H100 = "gpu-nvidia-h100"


@dataclass(frozen=True)
class Machine:
    """A folder of results."""

    folder: Path

    @property
    def title(self) -> str:
        return self.folder.name.removeprefix("cpu-").replace("-", " ")

    def has(self, *names: str) -> bool:
        return all((self.folder / f"{name}.json").exists() for name in names)

    def read(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())


def cpus(*names: str) -> list[Machine]:
    """CPUs that have all these results, sorted by name."""
    return [m for m in map(Machine, sorted(RESULTS.glob("cpu-*"))) if m.has(*names)]


def accuracy(name: str) -> Any:
    return Machine(RESULTS / "accuracy").read(name)


def h100_loops(network: str | None = None) -> list[Row]:
    """Measured steps of the baselines on an H100, of one network or all."""
    rows: list[Row] = Machine(RESULTS / H100).read("baselines")["loops"]
    return [r for r in rows if network in (None, r["network"])]


def h100_steps(network: str, engine: str, dtype: str) -> list[tuple[int, float]]:
    """(batch, measured ms per step) of a baseline on an H100."""
    rows = [r for r in h100_loops(network) if (r["engine"], r["dtype"]) == (engine, dtype)]
    return [(r["batch"], r["step_ms"]) for r in rows]


def commit(source: Path, machine: str) -> list[Path]:
    """Copies the results of `source` to the committed ones of `machine`, such as cpu-amd-zen4.

    Returns:
        The files written.

    Raises:
        ValueError: `source` has no results, or results of another CPU than `machine`.
    """
    files = {source / f"{name}.json": RESULTS / machine / f"{name}.json" for name in TIMINGS}
    files |= {source / f"{name}.json": RESULTS / "accuracy" / f"{name}.json" for name in ACCURACY}
    files = {new: old for new, old in files.items() if new.exists()}
    if not files:
        raise ValueError(f"--results is {source}, which has no results; run `make bench` first")
    if not machine.startswith("cpu-"):
        raise ValueError(f"--machine is {machine}; expected the name of a CPU such as cpu-amd-zen4")
    for new, old in files.items():
        cpu = json.loads(new.read_text())["environment"]["cpu"]
        known = json.loads(old.read_text())["environment"]["cpu"] if old.exists() else cpu
        if old.parent.name == machine and cpu != known:
            raise ValueError(
                f"{new} is of {cpu}; expected {known} as in {old}; give another --machine"
            )
    for new, old in files.items():
        old.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new, old)
    return list(files.values())
