"""Results file of a benchmark, its table, and its comparison with an older file.

The file is one JSON object: `command`, `date`, `environment`, `network`, `cases` (one per precision
and batch size, with a row per engine), `ceilings` and `kernels` (`kernels.py`).
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
# the engine whose time in the same rounds cancels a slowdown of the whole machine
NORMALIZER = "plain PyTorch"


def empty_result(workload: Workload, name: str) -> Result:
    """Result without cases."""
    config, size = workload.unet.config, workload.shape[1:]
    cost = unet_cost(config, size)
    network = dict(
        name=name,
        parameters=cost.parameters,
        gflop_per_image=round(cost.flops / 1e9, 3),
        timesteps=workload.timesteps,
    )
    return dict(**provenance(), network=network, cases=[], ceilings=[], kernels=[])


def provenance() -> Result:
    """Command, date and environment of this process."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    program = [Path(sys.argv[0]).name]
    if module is not None:
        program = ["python", "-m", module.name.removesuffix(".__main__")]
    return dict(command=shlex.join([*program, *sys.argv[1:]]), date=now, environment=environment())


def write(path: Path, result: Result) -> None:
    """Writes a result as JSON, atomically."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def read(path: Path) -> Result:
    """Reads a result; raises ValueError if the file is not one."""
    try:
        result = json.loads(path.read_text())
        _ = result["network"]["name"]
        for case in result["cases"]:
            _ = case["steps"], case["threads"], [row["loop"]["speedup"] for row in case["rows"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a result of ddpm-fast bench ({type(error).__name__}: {error})"
        ) from None
    return result


# ---- table


def table_of(case: dict[str, Any], network: dict[str, Any]) -> str:
    """Table of a case for a terminal: times per image per step, speedups of ddpm_fast, memory."""
    threads = f", {case['threads']} threads" if case["device"] == "cpu" else ""
    head = (
        f"  {'':26} {'forward, ms':>11}  {'ddpm_fast speedup':>20} {'loop, ms':>9}  "
        f"{'ddpm_fast speedup':>20} {'images/s':>9} {'peak MiB':>8} {'first image':>11}"
    )
    is_warm = any("warm_first_image_s" in row for row in case["rows"])
    return "\n".join(
        [
            f"{network['name']}: {network['parameters']:,} parameters, "
            f"{network['gflop_per_image']} GFLOP per image per step; "
            f"batch {case['batch']}, {case['dtype']}, {case['device']}{threads}, "
            f"{case['rounds']} rounds, loops of {case['steps']} steps",
            head,
            *map(_line_of, case["rows"]),
            *(f"  {name} left out: {reason}" for name, reason in case["left_out"].items()),
            *(f"  {line}" for line in faster_baselines(case)),
            f"  ms: per image per step; images/s: of all {network['timesteps']} steps; "
            "ranges: 95 % confidence of the median",
        ]
        + ["  first image: of a new process, with empty caches, then with filled ones"] * is_warm
    )


def _line_of(row: dict[str, Any]) -> str:
    forward, loop = row["forward"], row["loop"]
    warm = f", {row['warm_first_image_s']:.1f} s cached" if "warm_first_image_s" in row else ""
    return (
        f"  {row['name']:26} {forward['ms']:11.4g}  {_speedup(forward)} "
        f"{loop['ms']:9.4g}  {_speedup(loop)} {row['images_per_s']:9.3g} "
        f"{row['peak_bytes'] / 2**20:8.0f} {row['first_image_s']:9.1f} s{warm}"
    )


def _speedup(summary: dict[str, Any]) -> str:
    low, high = summary["speedup_range"]
    return (
        f"{'':20}" if low == high == 1 else f"{summary['speedup']:5.2f} ({low:5.2f} to {high:5.2f})"
    )


def faster_baselines(case: dict[str, Any]) -> list[str]:
    """A line per engine that is faster than ddpm_fast, with the reason of ddpm_fast's engine."""
    first, lines = case["rows"][0], []
    for row in case["rows"][1:]:
        for what in ("forward", "loop"):
            speedup, (_, high) = row[what]["speedup"], row[what]["speedup_range"]
            if speedup < 1:
                noise = "" if high < 1 else ", within the noise"
                lines.append(
                    f"{row['name']} is {1 / speedup - 1:.0%} faster ({what}{noise}) "
                    f"than {first['name']}: {first['reason']}"
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
        change: Relative change of the time: 0.1 is 10 % longer. In units of `NORMALIZER`'s time if
            `normalized`.
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
        relative = f" relative to {NORMALIZER}" if self.normalized else ""
        noise = "" if self.significant else ", within the noise"
        change = f"{self.change:+.1%}{relative}{noise}"
        return f"{self.what}: {self.old_ms:g} -> {self.new_ms:g} ms, {change}"


def same_case(old: Result, network: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Returns the older result's case of this network, batch, precision, size, device and threads.

    Raises:
        ValueError: The older result is of another network, or has no such case.
    """
    if old["network"] != network:
        listed = ", ".join(
            f"{key} is {old['network'].get(key)} there, {value} here"
            for key, value in network.items()
            if old["network"].get(key) != value
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
    """Changes of ddpm_fast's times between two results.

    Times are in units of `NORMALIZER`'s in the same rounds, since the speed of a shared machine
    changes. Loops of different lengths are not compared: their fixed cost spreads over more or
    fewer steps.

    Raises:
        ValueError: As `same_case`.
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
    """(of ddpm_fast, of `NORMALIZER` or None)"""
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
    """The significant changes to more than 1 + `threshold` times the older time."""
    return [c for c in changes if c.significant and c.change > threshold]
