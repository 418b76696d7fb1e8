"""One command for a machine with a GPU: tests, then timings, into one JSON file and a table, within eight minutes.

    python -m bench.gpu                          everything; results in bench/results/
    python -m bench.gpu --tiny --out FILE.json   the same on a CPU in tiny sizes, to prove that it runs
    python -m bench.gpu --only kernels network   some parts; into an existing FILE.json they are put beside what is there

Needs Python, torch, triton, numpy and pytest, nothing else, and no network; diffusers is a baseline where it can be imported. Each
part has a time budget, at whose end it is broken off with the rows that it has; a part that fails does not stop the others; and
nothing is timed before its result has been checked. What the file holds: docs/gpu.md.
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

import torch

from bench import gpu_kernels, gpu_network, gpu_sampling, gpu_training
from bench.gpu_bars import bars
from bench.networks import ROOT
from ddpm_fast.benchmark.timer import Row, Timing, measure
from ddpm_fast.utils.environment import environment

Part = Callable[["Bench"], Iterator[Row]]


class Bench:
    """The device, the sizes, and what earlier parts found out."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
        self.copy_rate: float | None = None
        self.until = 0.0  # the part's deadline

    @property
    def dtypes(self) -> list[str]:
        """What the network's kernels can be timed in here."""
        new = self.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
        return ["bf16", "fp8"] if new else ["bf16"]

    def clock(self, call: Callable[[], object], captured: bool = False) -> Timing:
        seconds, least = (0.02, 2) if self.tiny else (0.3, 5)
        return measure(call, self.device, seconds, least, captured)


def tests(bench: Bench) -> Iterator[Row]:
    """The tests that need a GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or kernel", "tests"]
    if bench.tiny:  # prove that the command works; the interpreter's own runs have the kernels
        command += ["-k", "gpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True) as child:
        try:
            output, _ = child.communicate(timeout=max(1, bench.until - time.monotonic() - 2))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with the children that it started
            output, _ = child.communicate()
            yield dict(what="tests", failed=True, summary="out of time", output=output[-4000:])
            return
    lines = [line for line in output.splitlines() if line.strip()]
    failed = child.returncode not in ((0, 5) if bench.tiny else (0,))  # 5: no test ran
    yield dict(what="tests", failed=failed, summary=lines[-1] if lines else "", output=output[-6000:])


# name -> (part, budget in seconds): the most important figures come last, and all together stay below eight minutes
PARTS: dict[str, tuple[Part, float]] = {
    "ceilings": (gpu_kernels.ceilings, 10),
    "self-check": (gpu_network.self_check, 60),
    "tests": (tests, 110),
    "kernels": (gpu_kernels.kernels, 30),
    "launches": (gpu_network.launches, 30),
    "invariance": (gpu_network.invariance, 20),
    "training": (gpu_training.training, 15),
    "likelihood": (gpu_training.likelihood, 10),
    "network": (gpu_network.forward, 45),
    "celebahq256": (gpu_sampling.celebahq256, 60),
    "sampling": (gpu_sampling.sampling, 85),
}


class OutOfTime(BaseException):  # past whoever catches every Exception
    """A part's budget is spent."""


@contextmanager
def budget(bench: Bench, seconds: float) -> Iterator[None]:
    """Breaks off what runs inside once the time is up, as soon as Python has the word again."""

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    bench.until = time.monotonic() + seconds
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again, should somebody have caught it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, name: str, part: Part, seconds: float) -> Row:
    """One part's rows, as many as came; its end, too, is a row where it was not a good one."""
    rows: list[Row] = []
    began = time.monotonic()
    try:
        with budget(bench, seconds):
            for row in part(bench):
                rows.append(row)
    except OutOfTime:
        rows.append(dict(what=name, failed=True, summary=f"out of time after {seconds:g} s"))
    except Exception as error:  # a part that breaks must not take the others' results with it
        traceback.print_exc()
        rows.append(dict(what=name, failed=True, summary=f"{type(error).__name__}: {error}"))
    return dict(seconds=round(time.monotonic() - began, 1), rows=rows)


# ---- what is shown and kept


def table_of(rows: list[Row]) -> str:
    """One line a row: what it is, on what, and its figures."""
    lines = []
    for row in rows:
        shown = {k: v for k, v in row.items() if k not in ("what", "output", "runs", "bytes") and v is not None}
        lines.append(f"  {row['what']:26} " + "  ".join(f"{k} {_short(v)}" for k, v in shown.items()))
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "x".join(map(str, value)) if isinstance(value, list) else str(value)


def write(path: Path, result: Row) -> None:
    """The results so far, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def begin(out: Path, tiny: bool, resumed: bool) -> Row:
    """An empty result, or the one in `out`, of whose parts some are to be run again. ValueError where that is another machine's."""
    command, here = f"python -m bench.gpu {' '.join(sys.argv[1:])}".strip(), environment()
    if resumed and out.exists():
        result: Row = json.loads(out.read_text())
        if (result["tiny"], result["environment"]) != (tiny, here):
            raise ValueError(f"{out} is of another machine, or of other versions; give another --out")
        result["resumed"] = command
        return result
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return dict(command=command, date=now, tiny=tiny, environment=here, parts={})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/gpu-DATE.json)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts, by the names under which the results stand")
    args = parser.parse_args()
    bench = Bench(args.tiny)
    if bench.device.type == "cpu" and not args.tiny:
        parser.error("no GPU found; --tiny runs the same in tiny sizes on the CPU")
    if unknown := set(args.only or ()) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    out = args.out or ROOT / "bench" / "results" / f"gpu-{datetime.now(timezone.utc):%Y-%m-%d-%H%M}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = begin(out, args.tiny, args.only is not None)
    except ValueError as error:
        parser.error(str(error))

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    for name, (part, seconds) in PARTS.items():
        if args.only and name not in args.only:
            continue
        found = result["parts"][name] = run(bench, name, part, 10 * seconds if args.tiny else seconds)
        write(out, result)
        print(f"{name} ({found['seconds']} s)\n{table_of(found['rows'])}", flush=True)
    result["parts"] = {name: result["parts"][name] for name in PARTS if name in result["parts"]}
    result["bars"] = bars(result["parts"])
    write(out, result)
    failed = any(row.get("failed") for part in result["parts"].values() for row in part["rows"])
    print("\n".join(["", *(bar["line"] for bar in result["bars"])]))
    print(f"-> {out}" + (", with failures" if failed else ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
