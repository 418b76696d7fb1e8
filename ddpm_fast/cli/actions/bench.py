"""Action of ddpm-fast bench."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ...benchmark import results
from ...benchmark.figures import draw
from ...benchmark.runner import Effort, Progress, Stage, compare
from ...benchmark.workload import Cause
from ...plotting.style import check_out
from ..common import pick_device, print_report


def bench(
    batches: list[int],
    dtypes: list[str] | None,
    engines: list[str],
    *,
    weights: Path,
    device: str | None,
    size: tuple[int, int] | None,
    seconds: float,
    steps: int | None,
    out: Path,
    older: Path | None,
    threshold: float,
    as_json: bool,
    warm_start_limit: float = 0,
    with_fp8: bool = False,
) -> None:
    """Compares the engines, the first of which is ddpm_fast; writes results, a table and a figure.

    `dtypes` is None for the default; `with_fp8` adds fp8 to the default on a GPU.
    """
    figure = _figure_path(out)
    on = pick_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtypes is None and with_fp8 and on.type == "cuda":
        dtypes = ["bf16", "fp8"]
    old = _older(older, out)
    log: Callable[[str], None] = lambda line: click.echo(line, err=as_json)
    missing: list[str] = []

    def show(progress: Progress) -> None:
        if progress.stage is Stage.CASE:
            results.write(out, progress.result)
            log(progress.message + "\n")
        elif progress.stage is not Stage.LEFT_OUT:  # the table lists engines that are left out
            click.echo(progress.message, err=True)
        elif progress.cause is Cause.NOT_INSTALLED and progress.engine not in missing:
            missing.append(progress.engine)

    effort = Effort(seconds, steps=steps, warm_start_limit=warm_start_limit)
    options: dict[str, Any] = dict(device=on, size=size, older=old, progress=show)
    result = compare(weights, batches, dtypes, engines, effort, **options)
    if missing:
        hint = "pip install 'ddpm-fast[baselines]'"
        click.echo(f"not installed: {', '.join(missing)}; {hint}", err=True)
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
    """Logs the changes since the older file; exit code 1 if ddpm_fast is slower."""
    for change in changes:
        log(change.line())
    worse = results.slower(changes, threshold / 100)
    if as_json:
        print_report(result | dict(slower=[change.line() for change in worse]), True, "")
    if worse:
        click.echo(
            f"ddpm-fast: {len(worse)} of {len(changes)} times are longer by more than "
            f"{threshold:g} %",
            err=True,
        )
        sys.exit(1)


def _older(path: Path | None, out: Path) -> results.Result | None:
    """Reads the older result; raises ValueError if it is not one or would be overwritten."""
    if path is None:
        return None
    if path.resolve() == out.resolve():
        raise ValueError(
            f"--compare is {path}, the file that --out would overwrite; give another --out"
        )
    return results.read(path)


def _figure_path(out: Path) -> Path | None:
    """Path of the figure, next to the results file; None without the extra `plot`.

    Raises ValueError if `out` cannot be written.
    """
    if out.suffix != ".json" or not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"--out is {out}; expected the name of a .json file in an existing folder")
    try:
        return check_out(out.with_suffix(".png"))
    except ValueError:
        return None
