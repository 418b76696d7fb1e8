"""ddpm-fast bench: how fast a checkpoint is drawn from on this machine, beside what one would run instead."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..benchmark import results
from ..benchmark.baselines import BASELINES
from ..benchmark.figures import draw
from ..benchmark.kernels import ceilings, points
from ..benchmark.runner import Effort, case_of, race
from ..benchmark.worker import Setting
from ..engines.base import DTYPES
from ..plotting.style import check_out
from .common import PATH, parse_size, pick_device, print_report

MINE = "ddpm_fast"


def _options(command: Any) -> Any:
    known = ", ".join(n for n in BASELINES if n != MINE)
    rounds, threshold, decimal = (
        "Of rounds, for each batch size.",
        "With --compare: per cent that are no slowdown.",
        click.FloatRange(0),
    )
    options = [
        click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder."),
        click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
        click.option("--size", help="HEIGHTxWIDTH in pixels.  [default: as trained]"),
        click.option("--baselines", help=f"By commas: {known}, package.module:Class; or none.  [default: all]"),
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


_DTYPE = click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: bf16 on a GPU, else fp32]")


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
@click.option("--dtypes", help=f"Some of {', '.join(DTYPES)}.  [default: bf16,fp8 on a GPU, else fp32]")
def sweep(batch_sizes: str, dtypes: str | None, **how: Any) -> None:
    """Several batch sizes and types."""
    try:
        batches = [int(b) for b in batch_sizes.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch-sizes {batch_sizes}: expected numbers of images such as 1,4,16")
    kinds: list[str | None] = [None] if dtypes is None else list(dtypes.split(","))
    if wrong := [d for d in kinds if d not in (None, *DTYPES)]:
        raise ValueError(f"--dtypes {dtypes}: unknown type {wrong[0]}; expected some of {', '.join(DTYPES)}")
    _run(batches, kinds, several=True, **how)


def _run(
    batches: list[int],
    dtypes: list[str | None],
    weights: Path,
    device: str | None,
    size: str | None,
    baselines: str | None,
    seconds: float,
    steps: int | None,
    out: Path,
    compare: Path | None,
    threshold: float,
    as_json: bool,
    again: float = 0,
    several: bool = False,
) -> None:
    names, picture = [MINE, *_baselines(baselines)], _picture(out)
    on = pick_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtypes == [None]:
        dtypes = ["fp32"] if on.type == "cpu" else ["bf16", "fp8"] if several else ["bf16"]
    if on.type == "cuda":
        torch.cuda.set_device(on)
    elif "fp8" in dtypes:
        raise ValueError(f"fp8 is for our own kernels on a GPU; this is {on}: take fp32, fp16 or bf16")
    settings = [Setting(str(weights), str(d), str(on), torch.get_num_threads(), parse_size(size)) for d in dtypes]
    subject = settings[0].subject()
    chain = len(subject.checkpoint.schedule)
    if steps is not None and steps > chain:
        raise ValueError(f"--steps {steps}: this network's chain has {chain}; give at most so many")
    result = results.begin(subject, weights.resolve().name, chain)
    old = _older(compare, out)
    planned = [(s, batch, _then(old, result, case_of(s, batch, subject))) for s in settings for batch in batches]
    say: Callable[[str], None] = lambda line: click.echo(line, err=as_json)
    complain: Callable[[str], None] = lambda line: click.echo(line, err=True)
    for setting in settings:
        with race(setting, names, batches[0], Effort(seconds, steps=steps, again=again), complain) as r:
            for batch, then in ((b, t) for s, b, t in planned if s is setting):
                result["cases"].append(r.case(batch, then))
                results.write(out, result)
                say(results.table_of(result["cases"][-1], result["network"]) + "\n")
    result["ceilings"] = ceilings(on, settings[-1].dtype)
    result["launches"] = points(settings[-1].subject(), batches[-1])
    results.write(out, result)
    if picture is not None:
        draw(result, picture)
    say(f"-> {out}" + (f", {picture}" if picture else "; a picture needs the extra plot: pip install 'ddpm-fast[plot]'"))
    _judge([] if old is None else results.changes(old, result), threshold, result, as_json, say)


def _judge(
    found: list[results.Change], threshold: float, result: results.Result, as_json: bool, say: Callable[[str], None]
) -> None:
    """Says what changed since the older file; exit code 1 where ours got slower."""
    for change in found:
        say(change.line())
    worse = results.slower(found, threshold / 100)
    if as_json:
        print_report(result | dict(slower=[change.line() for change in worse]), True, "")
    if worse:
        click.echo(f"ddpm-fast: {len(worse)} of {len(found)} got slower by more than {threshold:g} %", err=True)
        sys.exit(1)


def _older(compare: Path | None, out: Path) -> dict[str, Any] | None:
    """The result to compare with. ValueError where it is none, or would be overwritten."""
    if compare is None:
        return None
    if compare.resolve() == out.resolve():
        raise ValueError(f"--compare {compare} is the file that --out would overwrite; give another --out")
    return results.read(compare)


def _then(old: dict[str, Any] | None, result: dict[str, Any], case: dict[str, Any]) -> int | None:
    """How many steps the older file's loops had. ValueError, before any long work, where it has no such case."""
    return None if old is None else results.same_case(old, result["network"], case)["steps"]


def _baselines(text: str | None) -> list[str]:
    if text is None:
        return [name for name in BASELINES if name != MINE]
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if (name not in BASELINES and ":" not in name) or name == MINE]:
        known = ", ".join(name for name in BASELINES if name != MINE)
        raise ValueError(f"--baselines: unknown engine {wrong[0]!r}; expected {known}, package.module:Class, or none")
    return list(dict.fromkeys(names))


def _picture(out: Path) -> Path | None:
    """The picture's path beside the result's; None without the extra `plot`. ValueError where neither can be written."""
    if out.suffix != ".json" or not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {out}: expected the name of a .json file in a directory that exists")
    try:
        return check_out(out.with_suffix(".png"))
    except ValueError:
        return None
