"""Tests and timings on a machine with a GPU, in eight minutes.

    python -m bench.gpu                                all parts; results in bench-results/
    python -m bench.gpu --tiny --out FILE              tiny sizes on a CPU, to test the command
    python -m bench.gpu --only kernels --out FILE      some parts; FILE keeps its other parts

Writes a JSON file (docs/gpu.md) and prints tables. Needs Python, torch, triton, numpy and pytest,
and no network connection; diffusers is a baseline if installed. Each part has a time budget and
is stopped when it is spent; its rows are kept. A part that fails does not stop the others. Results
are checked before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.gpu import kernels, network, sampling, training
from bench.gpu.context import Bench
from bench.gpu.targets import compare_with_targets
from bench.workloads import OUT, ROOT
from ddpm_fast.benchmark import results
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.utils.numerics import full_fp32

Part = Callable[[Bench], Iterator[Row]]


def tests(bench: Bench) -> Iterator[Row]:
    """The tests that need a GPU, in a child process."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or kernel", "tests"]
    if bench.tiny:  # `make test` runs the kernels with Triton's interpreter
        command += ["-k", "gpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as child:
        try:
            output, _ = child.communicate(timeout=max(1, bench.deadline - time.monotonic() - 2))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # includes processes that it started
            output, _ = child.communicate()
            yield dict(what="tests", failed=True, summary="out of time", output=output[-4000:])
            return
    summary = (output.strip().splitlines() or [""])[-1]
    failed = child.returncode not in ((0, 5) if bench.tiny else (0,))  # 5: no test ran
    yield dict(what="tests", failed=failed, summary=summary, output=output[-6000:])


# name -> (part, budget in seconds): the most important part is last; the sum is below eight minutes
PARTS: dict[str, tuple[Part, float]] = {
    "ceilings": (kernels.ceilings, 10),
    "self-check": (network.self_check, 60),
    "tests": (tests, 110),
    "kernels": (kernels.kernels, 30),
    "launches": (network.launches, 30),
    "invariance": (network.invariance, 20),
    "training": (training.training, 15),
    "likelihood": (training.likelihood, 10),
    "network": (network.forward, 30),
    "celebahq256": (sampling.celebahq256, 65),
    "sampling": (sampling.sampling, 95),
}


class OutOfTime(BaseException):  # not an Exception, which a part may catch
    """Raised when the budget of a part is spent."""


@contextmanager
def budget(bench: Bench, seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after `seconds`, once the interpreter handles signals."""

    def on_alarm(number: int, frame: Any) -> None:
        raise OutOfTime

    bench.deadline = time.monotonic() + seconds
    previous = signal.signal(signal.SIGALRM, on_alarm)
    # repeated every second, in case a library catches the first
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run(bench: Bench, name: str, part: Part, seconds: float) -> Row:
    """Runs a part; returns its seconds and rows, and in a last row the reason of an early end."""
    rows: list[Row] = []
    start = time.monotonic()
    try:
        with budget(bench, seconds):
            for row in part(bench):
                rows.append(row)
    except OutOfTime:
        rows.append(dict(what=name, failed=True, summary=f"out of time after {seconds:g} s"))
    except Exception as error:  # the results of the other parts are kept
        traceback.print_exc()
        rows.append(dict(what=name, failed=True, summary=f"{type(error).__name__}: {error}"))
    return dict(seconds=round(time.monotonic() - start, 1), rows=rows)


# ---- output


def table_of(rows: list[Row]) -> str:
    """One line per row: name, conditions and figures."""
    hidden = ("what", "output", "runs", "bytes")
    lines = []
    for row in rows:
        cells = [f"{k} {_short(v)}" for k, v in row.items() if k not in hidden and v is not None]
        lines.append(f"  {row['what']:26} {'  '.join(cells)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load_or_create(out: Path, tiny: bool, resumed: bool) -> Row:
    """A result without parts; if `resumed`, the result in `out`.

    Raises ValueError if `out` is of another environment.
    """
    new: Row = dict(**results.provenance(), tiny=tiny, parts={})
    if not resumed or not out.exists():
        return new
    old: Row = json.loads(out.read_text())
    if (old["tiny"], old["environment"]) != (tiny, new["environment"]):
        raise ValueError(f"{out} is of another machine or other versions; give another --out")
    return old | dict(resumed=new["command"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {OUT}/gpu-DATE.json)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"some of {', '.join(PARTS)}")
    args = parser.parse_args()
    bench = Bench(args.tiny)
    if bench.device.type == "cpu" and not args.tiny:
        parser.error("no GPU found; --tiny runs tiny sizes on the CPU")
    if unknown := set(args.only or ()) - set(PARTS):
        parser.error(
            f"unknown part {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}"
        )
    out = args.out or OUT / f"gpu-{datetime.now(timezone.utc):%Y-%m-%d-%H%M}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = load_or_create(out, args.tiny, args.only is not None)
    except ValueError as error:
        parser.error(str(error))

    for name, (part, seconds) in PARTS.items():
        if args.only and name not in args.only:
            continue
        with full_fp32():
            measured = run(bench, name, part, 10 * seconds if args.tiny else seconds)
        result["parts"][name] = measured
        results.write(out, result)
        print(f"{name} ({measured['seconds']} s)\n{table_of(measured['rows'])}", flush=True)
    result["parts"] = {name: result["parts"][name] for name in PARTS if name in result["parts"]}
    result["targets"] = compare_with_targets(result["parts"])
    results.write(out, result)
    failed = any(row.get("failed") for part in result["parts"].values() for row in part["rows"])
    print("", *(target["line"] for target in result["targets"]), sep="\n")
    print(f"-> {out}" + (", with failures" if failed else ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
