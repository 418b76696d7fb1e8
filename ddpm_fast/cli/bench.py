"""ddpm-fast bench: speed of a checkpoint on this machine, compared with baselines."""

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
from ..benchmark.kernels import ceilings, kernel_times
from ..benchmark.runner import Effort, case_of, comparison
from ..benchmark.worker import Setting
from ..engines.base import DTYPES
from ..plotting.style import check_out
from .common import PATH, parse_size, pick_device, print_report

DDPM_FAST = "ddpm_fast"


def _options(command: Any) -> Any:
    known = ", ".join(n for n in BASELINES if n != DDPM_FAST)
    decimal = click.FloatRange(0)
    options = [
        click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder."),
        click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
        click.option("--size", help="HEIGHTxWIDTH in pixels.  [default: as trained]"),
        click.option(
            "--baselines",
            help=f"Comma-separated: {known}, package.module:Class; or none.  [default: all]",
        ),
        click.option(
            "--seconds", type=decimal, default=30, show_default=True, help="Time per batch size."
        ),
        click.option(
            "--steps",
            type=click.IntRange(1),
            help="Steps per loop.  [default: about a second of the slowest engine]",
        ),
        click.option(
            "--out",
            type=PATH,
            default="bench.json",
            show_default=True,
            help="Results file; next to it a figure, .png.",
        ),
        click.option(
            "--compare",
            type=PATH,
            help="Older results file: exit code 1 if ddpm_fast is slower than there.",
        ),
        click.option(
            "--threshold",
            type=decimal,
            default=5,
            show_default=True,
            help="Tolerance of --compare in percent.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Benchmark ddpm_fast against PyTorch, torch.compile, diffusers, ONNX Runtime and OpenVINO, as far as installed.

    Every engine runs the same weights in its own process, is checked against fp64 first, and takes turns with the others. A speedup
    is the ratio of two times of one round; its range is the 95 % confidence interval of the median. Needs an idle machine.
    """


_DTYPE = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), help="[default: bf16 on a GPU, else fp32]"
)


@bench.command()
@_options
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@_DTYPE
def latency(batch_size: int, dtype: str | None, **options: Any) -> None:
    """Time per image, and time to the first image: cold, and with filled caches."""
    _run([batch_size], [dtype], warm_start_limit=math.inf, **options)


@bench.command()
@_options
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@_DTYPE
def throughput(batch_size: int, dtype: str | None, **options: Any) -> None:
    """Images per second at one batch size."""
    _run([batch_size], [dtype], **options)


@bench.command()
@_options
@click.option("--batch-sizes", default="1,4,16,64", show_default=True)
@click.option(
    "--dtypes",
    help=f"Comma-separated: {', '.join(DTYPES)}.  [default: bf16,fp8 on a GPU, else fp32]",
)
def sweep(batch_sizes: str, dtypes: str | None, **options: Any) -> None:
    """Several batch sizes and precisions."""
    try:
        batches = [int(b) for b in batch_sizes.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(
            f"--batch-sizes is {batch_sizes}; expected positive integers such as 1,4,16"
        )
    kinds: list[str | None] = [None] if dtypes is None else list(dtypes.split(","))
    if any(d not in (None, *DTYPES) for d in kinds):
        raise ValueError(
            f"--dtypes is {dtypes}; expected some of {', '.join(DTYPES)}, separated by commas"
        )
    _run(batches, kinds, several=True, **options)


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
    warm_start_limit: float = 0,
    several: bool = False,
) -> None:
    names, figure = [DDPM_FAST, *_baselines(baselines)], _figure_path(out)
    on = pick_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtypes == [None]:
        dtypes = ["fp32"] if on.type == "cpu" else ["bf16", "fp8"] if several else ["bf16"]
    if on.type == "cuda":
        torch.cuda.set_device(on)
    elif "fp8" in dtypes:
        raise ValueError(f"fp8 is unsupported on {on}; give --dtype fp32, fp16 or bf16")
    settings = [
        Setting(str(weights), str(d), str(on), torch.get_num_threads(), parse_size(size))
        for d in dtypes
    ]
    workload = settings[0].workload()
    chain = len(workload.checkpoint.schedule)
    if steps is not None and steps > chain:
        raise ValueError(
            f"--steps is {steps}; expected at most {chain}, the timesteps of this checkpoint"
        )
    result = results.empty_result(workload, weights.resolve().name, chain)
    old = _older(compare, out)
    planned = [
        (s, batch, _steps_of(old, result, case_of(s, batch, workload)))
        for s in settings
        for batch in batches
    ]
    log: Callable[[str], None] = lambda line: click.echo(line, err=as_json)
    warn: Callable[[str], None] = lambda line: click.echo(line, err=True)
    for setting in settings:
        effort = Effort(seconds, steps=steps, warm_start_limit=warm_start_limit)
        with comparison(setting, names, batches[0], effort, warn) as c:
            for batch, old_steps in ((b, n) for s, b, n in planned if s is setting):
                result["cases"].append(c.case(batch, old_steps))
                results.write(out, result)
                log(results.table_of(result["cases"][-1], result["network"]) + "\n")
    result["ceilings"] = ceilings(on, settings[-1].dtype)
    result["kernels"] = kernel_times(settings[-1].workload(), batches[-1])
    results.write(out, result)
    if figure is not None:
        draw(result, figure)
    log(
        f"-> {out}" + (f", {figure}" if figure else "; for a figure: pip install 'ddpm-fast[plot]'")
    )
    _report([] if old is None else results.changes(old, result), threshold, result, as_json, log)


def _report(
    changes: list[results.Change],
    threshold: float,
    result: results.Result,
    as_json: bool,
    log: Callable[[str], None],
) -> None:
    """Logs what changed since the older file; exit code 1 if ddpm_fast is slower."""
    for change in changes:
        log(change.line())
    worse = results.slower(changes, threshold / 100)
    if as_json:
        print_report(result | dict(slower=[change.line() for change in worse]), True, "")
    if worse:
        click.echo(
            f"ddpm-fast: {len(worse)} of {len(changes)} times are longer by more than {threshold:g} %",
            err=True,
        )
        sys.exit(1)


def _older(compare: Path | None, out: Path) -> dict[str, Any] | None:
    """The result to compare with; ValueError if it is not one, or would be overwritten."""
    if compare is None:
        return None
    if compare.resolve() == out.resolve():
        raise ValueError(
            f"--compare is {compare}, the file that --out would overwrite; give another --out"
        )
    return results.read(compare)


def _steps_of(
    old: dict[str, Any] | None, result: dict[str, Any], case: dict[str, Any]
) -> int | None:
    """Steps per loop of the older file. ValueError, before any long work, if it has no such case."""
    return None if old is None else results.same_case(old, result["network"], case)["steps"]


def _baselines(text: str | None) -> list[str]:
    if text is None:
        return [name for name in BASELINES if name != DDPM_FAST]
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if wrong := [
        name for name in names if (name not in BASELINES and ":" not in name) or name == DDPM_FAST
    ]:
        known = ", ".join(name for name in BASELINES if name != DDPM_FAST)
        raise ValueError(
            f"--baselines has the unknown engine {wrong[0]!r}; expected {known}, package.module:Class, or none"
        )
    return list(dict.fromkeys(names))


def _figure_path(out: Path) -> Path | None:
    """Path of the figure, next to the results file; None without the extra `plot`. ValueError if `out` cannot be written."""
    if out.suffix != ".json" or not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"--out is {out}; expected the name of a .json file in an existing folder")
    try:
        return check_out(out.with_suffix(".png"))
    except ValueError:
        return None
