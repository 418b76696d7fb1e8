"""The work of ddpm-fast train."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from ...training.checkpoints import checkpoints
from ...training.run import Every, TrainingRun
from ...training.trainer import Trainer
from .train_setup import set_up, start_checkpoint


def train(
    options: dict[str, Any], explicit: Set[str], log: Callable[[str], Any]
) -> tuple[dict[str, Any], str, int]:
    """Trains. Returns a report as a dictionary and as text, and the exit code."""
    directory: Path = options["output_dir"]
    before = _modification_times(directory)
    start = start_checkpoint(directory, options["resume_from_checkpoint"], log)
    setup = set_up(options, explicit, start, log)
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
        if _modification_times(directory) != before:
            raise ValueError(f"another process has trained in {directory} meanwhile; start again")
        if start is not None:
            run.resume(start)
            log(f"resuming from {start.path}")
            del start  # frees its tensors
        _announce(trainer, log)
        max_seconds = options["max_seconds"]
        end = run.train(math.inf if max_seconds is None else max_seconds)
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


def _modification_times(directory: Path) -> dict[str, int]:
    """Modification times of the checkpoints in a directory, by name."""
    return {path.name: path.stat().st_mtime_ns for path in checkpoints(directory)}


def _every(options: dict[str, Any], images: int) -> Every:
    """The intervals of a run, in steps."""
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


def _announce(trainer: Trainer, log: Callable[[str], Any]) -> None:
    count, side, _, channels = trainer.data.images.shape
    steps, classes = trainer.config.max_train_steps, trainer.unet.config.num_classes or "no"
    log(
        f"{count} images of {channels} x {side} x {side}, {classes} classes; "
        f"{trainer.weights.numel():,} parameters; {steps} steps on {trainer.device}"
    )
    if trainer.norm_fallback:
        log(f"PyTorch computes GroupNorm, which is slower: {trainer.norm_fallback}")
    if trainer.done >= steps:
        log(f"all {steps} steps are done; train longer with --num_epochs or --max_train_steps")
