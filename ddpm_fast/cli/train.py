"""The command line of training: ddpm-fast train. PyTorch is imported after the first line of output."""

from __future__ import annotations

import contextlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from .train_options import training_options


@click.command()
@training_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
def train(as_json: bool, **options: Any) -> None:
    """Train a network on your images. A killed run goes on with --resume_from_checkpoint latest."""
    log = partial(_log, err=as_json)
    directory: Path = options["output_dir"]
    log(f"training in {directory}: loading PyTorch and the images")
    context = click.get_current_context()
    given = {
        name
        for name in options
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    report, text, exit_code = _train(directory, options, given, log)

    from .common import print_report

    print_report(report, as_json, text)
    if exit_code:
        click.echo("ddpm-fast: interrupted", err=True)
        sys.exit(exit_code)


def _train(
    directory: Path, options: dict[str, Any], given: set[str], log: Any
) -> tuple[dict[str, Any], str, int]:
    """Trains. Returns the report as a dictionary and as text, and the exit code."""
    from ..training.run import TrainingRun
    from .train_setup import set_up, start_checkpoint

    resume = options["resume_from_checkpoint"]
    start = start_checkpoint(directory, resume, log)
    setup = set_up(options, given, start, log)
    trainer, options = setup.trainer, {**options, **setup.options}
    with TrainingRun(
        directory,
        trainer,
        _every(options, len(trainer.data)),
        options["checkpoints_total_limit"],
        setup.validation,
        log,
        options["eval_images"],
        setup.options,
        sys.stderr,
    ) as run:
        if start_checkpoint(directory, resume, log) != start:
            raise ValueError(f"another process has trained in {directory} meanwhile; start again")
        if start is not None:
            run.resume(start)
            log(f"going on from {start}")
        _announce(trainer, log)
        end = run.train(math.inf if options["max_seconds"] is None else options["max_seconds"])
    model = directory / "model"
    report = dict(
        directory=str(directory),
        model=str(model),
        step=trainer.done,
        seconds=round(run.spent, 1),
        ended=end.reason,
    )
    text = f"{end.reason}: step {trainer.done}, {run.spent:.0f} s of training -> {model}"
    return report, text, end.exit_code


def _every(options: dict[str, Any], images: int) -> Any:
    """The intervals of a run, in steps."""
    from ..training.run import Every

    per_step = options["train_batch_size"] * options["gradient_accumulation_steps"]
    epoch = math.ceil(images / per_step)
    return Every(
        log=options["logging_steps"],
        checkpoint=options["checkpointing_steps"],
        model=options["save_model_epochs"] * epoch,
        samples=options["save_images_epochs"] * epoch,
        validation=options["save_images_epochs"] * epoch,
        evaluation=math.ceil(options["eval_images_every"] / per_step),
    )


def _announce(trainer: Any, log: Any) -> None:
    count, side, _, channels = trainer.data.images.shape
    steps, classes = trainer.config.max_train_steps, trainer.unet.config.num_classes or "no"
    log(
        f"{count} images of {channels} x {side} x {side}, {classes} classes; {trainer.weights.numel():,} parameters; "
        f"{steps} steps on {trainer.device}"
    )
    if trainer.norm_fallback:
        log(f"PyTorch computes GroupNorm, which is slower: {trainer.norm_fallback}")
    if trainer.done >= steps:
        log(
            f"all {steps} steps were done before; train longer with --num_epochs or --max_train_steps"
        )


def _log(line: str, err: bool) -> None:
    with contextlib.suppress(BrokenPipeError):  # a closed pipe is no reason to stop training
        click.echo(line, err=err)
