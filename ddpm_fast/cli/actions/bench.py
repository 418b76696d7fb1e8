"""The work of ddpm-fast bench."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ...benchmark import results
from ...benchmark.figures import draw
from ...benchmark.kernels import ceilings, kernel_times
from ...benchmark.runner import Effort, case_of, comparison
from ...benchmark.worker import Setting
from ...plotting.style import check_out
from ..common import pick_device, print_report


def bench(
    batches: list[int],
    dtypes: list[str | None],
    engines: list[str],
    *,
    weights: Path,
    device: str | None,
    size: tuple[int, int] | None,
    seconds: float,
    steps: int | None,
    out: Path,
    compare: Path | None,
    threshold: float,
    as_json: bool,
    warm_start_limit: float = 0,
    several: bool = False,
) -> None:
    """Compares the engines, the first of which is ddpm_fast; writes results, a table and a figure."""
    figure = _figure_path(out)
    on = pick_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtypes == [None]:
        dtypes = ["fp32"] if on.type == "cpu" else ["bf16", "fp8"] if several else ["bf16"]
    if on.type == "cuda":
        torch.cuda.set_device(on)
    elif "fp8" in dtypes:
        raise ValueError(f"fp8 is unsupported on {on}; give --dtype fp32, fp16 or bf16")
    settings = [
        Setting(str(weights), str(d), str(on), torch.get_num_threads(), size) for d in dtypes
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
    missing: list[str] = []
    for setting in settings:
        effort = Effort(seconds, steps=steps, warm_start_limit=warm_start_limit)
        cases = [(batch, old_steps) for s, batch, old_steps in planned if s is setting]
        missing += _compare(setting, engines, effort, cases, result, out, log)
    if missing:
        hint = "pip install 'ddpm-fast[baselines]'"
        click.echo(f"not installed: {', '.join(dict.fromkeys(missing))}; {hint}", err=True)
    _progress("measuring the roofline and every kernel")
    result["ceilings"] = ceilings(on, settings[-1].dtype)
    result["kernels"] = kernel_times(settings[-1].workload(), batches[-1])
    results.write(out, result)
    if figure is not None:
        draw(result, figure)
    log(
        f"-> {out}" + (f", {figure}" if figure else "; for a figure: pip install 'ddpm-fast[plot]'")
    )
    _report([] if old is None else results.changes(old, result), threshold, result, as_json, log)


def _compare(
    setting: Setting,
    engines: list[str],
    effort: Effort,
    cases: list[tuple[int, int | None]],
    result: results.Result,
    out: Path,
    log: Callable[[str], None],
) -> list[str]:
    """Adds the cases of one precision to the result; returns the engines that are not installed."""
    _progress(f"{setting.dtype}: starting {engines[0]}")
    with comparison(setting, engines[:1], cases[0][0], effort, _silent) as c:
        for engine in engines[1:]:
            _progress(f"{setting.dtype}: starting {engine}")
            c.start(engine, cases[0][0])
        for batch, steps in cases:
            names = ", ".join(process.name for process in c.processes)
            _progress(f"batch {batch}: {names} in turns, {effort.seconds:g} s or more")
            result["cases"].append(c.case(batch, steps))
            results.write(out, result)
            log(results.table_of(result["cases"][-1], result["network"]))
            if any("warm_first_image_s" in row for row in result["cases"][-1]["rows"]):
                log(
                    "  first image: from the start of a process, with empty caches, then with filled ones"
                )
            log("")
        return [name for name, reason in c.left_out.items() if _is_missing(reason)]


def _progress(line: str) -> None:
    click.echo(line, err=True)


def _silent(line: str) -> None:
    """The table lists the engines that were left out, with the reasons."""


def _is_missing(reason: str) -> bool:
    return "No module named" in reason or "not installed" in reason


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


def _figure_path(out: Path) -> Path | None:
    """Path of the figure, next to the results file; None without the extra `plot`. ValueError if `out` cannot be written."""
    if out.suffix != ".json" or not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"--out is {out}; expected the name of a .json file in an existing folder")
    try:
        return check_out(out.with_suffix(".png"))
    except ValueError:
        return None
