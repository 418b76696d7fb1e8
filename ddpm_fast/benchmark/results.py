"""Results file of a benchmark, its table, and its comparison with an older file.

The file is one JSON object: `command`, `date`, `environment`, `network`, `cases` (`runner.Comparison.case`), `ceilings` and
`kernels` (`kernels.py`).
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..models.flops import unet_cost
from ..utils.environment import environment
from ..utils.files import write_atomically
from .workload import Workload

Result = dict[str, Any]
NORMALIZER = (
    "plain PyTorch"  # the engine whose time in the same rounds cancels what slows the whole machine
)


def empty_result(workload: Workload, name: str, timesteps: int) -> Result:
    """Result without cases."""
    config, size = workload.unet.config, workload.shape[1:]
    cost = unet_cost(config, size)
    network = dict(
        name=name,
        parameters=cost.parameters,
        gflop_per_image=round(cost.flops / 1e9, 3),
        timesteps=timesteps,
    )
    return dict(**provenance(), network=network, cases=[], ceilings=[], kernels=[])


def provenance() -> Result:
    """Command, date and environment of this process."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    program = (
        [Path(sys.argv[0]).name]
        if module is None
        else ["python", "-m", module.name.removesuffix(".__main__")]
    )
    return dict(command=shlex.join([*program, *sys.argv[1:]]), date=now, environment=environment())


def write(path: Path, result: Result) -> None:
    """Writes a result as JSON, atomically."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def read(path: Path) -> Result:
    """Reads a result; ValueError if the file is not one."""
    try:
        result = json.loads(path.read_text())
        _ = [
            (c["steps"], c["threads"], row["loop"]["speedup"])
            for c in result["cases"]
            for row in c["rows"]
        ]
        _ = result["network"]["name"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a result of ddpm-fast bench ({type(error).__name__}: {error})"
        ) from None
    return result


# ---- table


def table_of(case: dict[str, Any], network: dict[str, Any]) -> str:
    """Table of a case for a terminal: milliseconds per image per step, speedups of ddpm_fast, and the rest."""
    where = (
        f"{case['device']}, {case['threads']} threads"
        if case["device"] == "cpu"
        else case["device"]
    )
    lines = [
        f"{network['name']}: {network['parameters']:,} parameters, {network['gflop_per_image']} GFLOP per image per step; "
        f"batch {case['batch']}, {case['dtype']}, {where}, {case['rounds']} rounds, loops of {case['steps']} steps",
        f"  {'':26} {'forward, ms':>11}  {'ddpm_fast speedup':>20} {'loop, ms':>9}  {'ddpm_fast speedup':>20} "
        f"{'images/s':>9} {'peak MiB':>8} {'first image':>11}",
    ]
    for row in case["rows"]:
        cells = [
            f"{row['forward']['ms']:11.4g}",
            _speedup(row["forward"]),
            f"{row['loop']['ms']:9.4g}",
            _speedup(row["loop"]),
        ]
        warm = f", {row['warm_first_image_s']:.1f} s cached" if "warm_first_image_s" in row else ""
        rest = f"{row['images_per_s']:9.3g} {row['peak_bytes'] / 2**20:8.0f} {row['first_image_s']:9.1f} s{warm}"
        lines.append(f"  {row['name']:26} {cells[0]}  {cells[1]} {cells[2]}  {cells[3]} {rest}")
    lines += [f"  {name} left out: {reason}" for name, reason in case["left_out"].items()]
    lines += [f"  {line}" for line in faster_baselines(case)]
    t = network["timesteps"]
    return "\n".join(
        [
            *lines,
            f"  ms: per image per step; images/s: of all {t} steps; ranges: 95 % confidence of the median",
        ]
    )


def _speedup(summary: dict[str, Any]) -> str:
    low, high = summary["speedup_range"]
    return (
        f"{'':20}" if low == high == 1 else f"{summary['speedup']:5.2f} ({low:5.2f} to {high:5.2f})"
    )


def faster_baselines(case: dict[str, Any]) -> list[str]:
    """A line for every engine that is faster than ddpm_fast: by how much, and what ddpm_fast ran on."""
    first, lines = case["rows"][0], []
    for row in case["rows"][1:]:
        for what in ("forward", "loop"):
            speedup, (_, high) = row[what]["speedup"], row[what]["speedup_range"]
            if speedup < 1:
                noise = "" if high < 1 else ", within the noise"
                lines.append(
                    f"{row['name']} is {1 / speedup - 1:.0%} faster ({what}{noise}) than {first['name']}: {first['reason']}"
                )
    return lines


# ---- comparison with an older result


@dataclass(frozen=True)
class Change:
    """One figure of ddpm_fast in the older and the newer file.

    Attributes:
        what: Batch, precision and operation.
        old_ms: Milliseconds in the older file.
        new_ms: Milliseconds in the newer file.
        change: Relative change of the time: 0.1 is 10 % longer. In units of `NORMALIZER`'s time if `normalized`.
        significant: The two intervals are disjoint.
        normalized: Both files have `NORMALIZER`.
    """

    what: str
    old_ms: float
    new_ms: float
    change: float
    significant: bool
    normalized: bool

    def line(self) -> str:
        noise = "" if self.significant else ", within the noise"
        relative = f" relative to {NORMALIZER}" if self.normalized else ""
        return f"{self.what}: {self.old_ms:g} -> {self.new_ms:g} ms, {self.change:+.1%}{relative}{noise}"


def same_case(old: Result, network: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The older result's case of this network, batch, precision, size, device and thread count; ValueError if there is none."""
    if old["network"] != network:
        differences = {
            k: (old["network"].get(k), v) for k, v in network.items() if old["network"].get(k) != v
        }
        listed = ", ".join(
            f"{k} is {then} there, {now} here" for k, (then, now) in differences.items()
        )
        raise ValueError(f"the older result is of another network: {listed}")
    keys = ("batch", "dtype", "size", "device_name", "threads")
    matches = [c for c in old["cases"] if all(c.get(k) == case[k] for k in keys)]
    if not matches:
        expected, first = (
            ", ".join(f"{k} {c.get(k)}" for k in keys) for c in (case, old["cases"][0])
        )
        raise ValueError(f"the older result has no case of {expected}; its first is of {first}")
    return matches[0]


def changes(old: Result, new: Result) -> list[Change]:
    """Every figure of ddpm_fast in the newer result against the older one's.

    Times are in units of `NORMALIZER`'s in the same rounds, since the speed of a shared machine changes. Loops of different lengths
    are not compared: their fixed cost spreads over more or fewer steps. Raises as `same_case` does.
    """
    results = []
    for case in new["cases"]:
        before = same_case(old, new["network"], case)
        for what in ("forward", "loop") if before["steps"] == case["steps"] else ("forward",):
            name = f"batch {case['batch']}, {case['dtype']}, {what}"
            results.append(_change(name, _summaries(before, what), _summaries(case, what)))
    return results


Summaries = tuple[dict[str, Any], dict[str, Any] | None]


def _summaries(case: dict[str, Any], what: str) -> Summaries:
    """(of ddpm_fast, of `NORMALIZER` if the case has it)"""
    normalizer = [row[what] for row in case["rows"] if row["engine"] == NORMALIZER]
    return case["rows"][0][what], normalizer[0] if normalizer else None


def _change(what: str, old: Summaries, new: Summaries) -> Change:
    (fast_old, plain_old), (fast_new, plain_new) = old, new
    if plain_old is None or plain_new is None:
        change = fast_new["ms"] / fast_old["ms"] - 1
        significant = fast_new["low"] > fast_old["high"] or fast_new["high"] < fast_old["low"]
        return Change(what, fast_old["ms"], fast_new["ms"], change, significant, False)
    change = plain_old["speedup"] / plain_new["speedup"] - 1
    (low_old, high_old), (low_new, high_new) = (
        plain_old["speedup_range"],
        plain_new["speedup_range"],
    )
    significant = high_new < low_old or low_new > high_old
    return Change(what, fast_old["ms"], fast_new["ms"], change, significant, True)


def slower(changes: list[Change], threshold: float) -> list[Change]:
    """The significant changes to more than `1 + threshold` times the older time."""
    return [c for c in changes if c.significant and c.change > threshold]
