"""ddpm-fast train: train a network on images."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import Any

import click

from .common import action, print_report
from .train_options import training_options


@click.command()
@training_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout at the end.")
def train(as_json: bool, **options: Any) -> None:
    """Train a network on your images. --resume_from_checkpoint latest resumes a stopped run."""
    log = partial(_log, err=as_json)
    # PyTorch is imported after this line.
    log(f"training in {options['output_dir']}: loading PyTorch and the images")
    source, command_line = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    explicit = {name for name in options if source.get_parameter_source(name) == command_line}
    report, text, exit_code = action("train").train(options, explicit, log)
    print_report(report, as_json, text)
    if exit_code:
        click.echo("ddpm-fast: interrupted", err=True)
        sys.exit(exit_code)


def _log(line: str, err: bool) -> None:
    with contextlib.suppress(BrokenPipeError):  # a closed pipe does not stop training
        click.echo(line, err=err)
