"""ddpm-fast bench: how fast a checkpoint is drawn from on this machine, beside what one would run instead."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from .benchmark import results
from .benchmark.charts import draw
from .benchmark.launches import ceilings, points
from .benchmark.peers import PEERS
from .benchmark.race import Effort, race
from .benchmark.worker import Setting
from .cli_common import PATH, parse_size, pick_device, report_of
from .engine import PRECISIONS
from .plot import check_out

MINE = "ddpm_fast"


def _options(command: Any) -> Any:
    known = ", ".join(n for n in PEERS if n != MINE)
    rounds, threshold, decimal = (
        "Of rounds, for each batch size.",
        "With --compare: per cent that are no slowdown.",
        click.FloatRange(0),
    )
    options = [
        click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder."),
        click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
        click.option("--size", help="HEIGHTxWIDTH in pixels.  [default: as trained]"),
        click.option("--peers", help=f"By commas: {known}, package.module:Class; or none.  [default: all]"),
        click.option("--seconds", type=decimal, default=30, show_default=True, help=rounds),
        click.option("--steps", type=click.IntRange(1), help="Of the loops.  [default: what the slowest does in a second]"),
        click.option("--out", type=PATH, default="bench.json", show_default=True, help="The result; beside it a picture, .png."),
        click.option("--compare", type=PATH, help="An older result: exit code 1 where ours got slower."),
        click.option("--threshold", type=decimal, default=5, show_default=True, help=threshold),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Ours beside plain PyTorch, torch.compile, diffusers, ONNX Runtime and OpenVINO, whichever are there.

    Every engine runs the same weights in a process of its own, is held against fp64 first, and takes turns with the others; a ratio
    is of one round, its range holds the median with 95 % certainty. Needs a quiet machine.
    """


_DTYPE = click.option("--dtype", type=click.Choice(list(PRECISIONS)), help="[default: bf16 on a GPU, else fp32]")


@bench.command()
@_options
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@_DTYPE
def latency(batch_size: int, dtype: str | None, **how: Any) -> None:
    """How long one image takes, and the first one from a cold process, also with what was kept."""
    _run([batch_size], [dtype], again=math.inf, **how)


@bench.command()
@_options
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@_DTYPE
def throughput(batch_size: int, dtype: str | None, **how: Any) -> None:
    """How many images a second come from one batch size."""
    _run([batch_size], [dtype], **how)


@bench.command()
@_options
@click.option("--batch-sizes", default="1,4,16,64", show_default=True)
@click.option("--dtypes", help=f"Some of {', '.join(PRECISIONS)}.  [default: bf16,fp8 on a GPU, else fp32]")
def sweep(batch_sizes: str, dtypes: str | None, **how: Any) -> None:
    """Several batch sizes and types."""
    try:
        batches = [int(b) for b in batch_sizes.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch-sizes {batch_sizes}: expected numbers of images such as 1,4,16")
    kinds: list[str | None] = [None] if dtypes is None else list(dtypes.split(","))
    if wrong := [d for d in kinds if d not in (None, *PRECISIONS)]:
        raise ValueError(f"--dtypes {dtypes}: unknown type {wrong[0]}; expected some of {', '.join(PRECISIONS)}")
    _run(batches, kinds, several=True, **how)


def _run(
    batches: list[int],
    dtypes: list[str | None],
    weights: Path,
    device: str | None,
    size: str | None,
    peers: str | None,
    seconds: float,
    steps: int | None,
    out: Path,
    compare: Path | None,
    threshold: float,
    as_json: bool,
    again: float = 0,
    several: bool = False,
) -> None:
    names = [MINE, *_peers(peers)]
    picture = _picture(out)
    old = None if compare is None else results.read(compare)
    on = pick_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtypes == [None]:
        dtypes = ["fp32"] if on.type == "cpu" else ["bf16", "fp8"] if several else ["bf16"]
    say: Callable[[str], None] = lambda line: click.echo(line, err=as_json)
    effort = Effort(seconds=seconds, steps=steps, again=again)
    result: dict[str, Any] = {}
    for dtype in dtypes:
        setting = Setting(str(weights), str(dtype), str(on), torch.get_num_threads(), parse_size(size))
        if not result:
            subject = setting.subject()
            result = results.begin(subject, weights.resolve().name, len(subject.checkpoint.schedule))
            if old is not None and old["network"] != result["network"]:
                results.changes(old, result)  # refuses it, before any long work
        with race(setting, names, batches[0], effort, lambda line: click.echo(line, err=True)) as r:
            for batch in batches:
                result["cases"].append(r.case(batch))
                results.write(out, result)
                say(results.table_of(result["cases"][-1], result["network"]) + "\n")
    result["ceilings"] = ceilings(on, str(dtypes[-1]))
    result["launches"] = points(setting.subject(), batches[-1])
    results.write(out, result)
    if picture is not None:
        draw(result, picture)
    say(f"-> {out}" + (f", {picture}" if picture else "; a picture needs the extra plot: pip install 'ddpm-fast[plot]'"))
    found = [] if old is None else results.changes(old, result)
    for change in found:
        say(change.line())
    worse = results.slower(found, threshold / 100)
    if as_json:
        report_of(result | dict(slower=[change.line() for change in worse]), True, "")
    if worse:
        click.echo(f"ddpm-fast: {len(worse)} of {len(found)} got slower by more than {threshold:g} %", err=True)
        sys.exit(1)


def _peers(text: str | None) -> list[str]:
    if text is None:
        return [name for name in PEERS if name != MINE]
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if (name not in PEERS and ":" not in name) or name == MINE]:
        known = ", ".join(name for name in PEERS if name != MINE)
        raise ValueError(f"--peers: unknown engine {wrong[0]!r}; expected {known}, package.module:Class, or none")
    return list(dict.fromkeys(names))


def _picture(out: Path) -> Path | None:
    """The picture's path beside the result's; None without the extra `plot`. ValueError where neither can be written."""
    if out.suffix != ".json" or not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {out}: expected the name of a .json file in a directory that exists")
    try:
        return check_out(out.with_suffix(".png"))
    except ValueError:
        return None
