"""The command line of training: ddpm-fast train."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ..checkpoints.checkpoint import Checkpoint, load_pretrained
from ..checkpoints.diffusers import schedule_of_diffusers
from ..data.datasets import ImageData, has_test_split, load_dataset, load_images
from ..diffusion.losses import LEARNING_VARIANCE
from ..diffusion.schedule import NoiseSchedule
from ..models.config import UNetConfig
from ..models.unet import UNet
from ..training.checkpoints import checkpoints, latest_checkpoint
from ..training.config import TrainConfig
from ..training.run import Every, TrainingRun
from ..training.trainer import Trainer
from .common import pick_device, print_report
from .train_options import DIFFUSERS_PREDICTIONS, training_options


@click.command()
@training_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
def train(as_json: bool, **options: Any) -> None:
    """Train a network on your images. A killed run goes on with --resume-from-checkpoint latest."""
    directory: Path = options["output_dir"]
    say = partial(_say, err=as_json)
    start = _start(directory, options["resume_from_checkpoint"], say)
    checkpoint = _checkpoint(options)
    data, validation = _data(options)
    if options["deterministic"]:
        _repeat_to_the_bit()
    device = pick_device(options["device"])
    config = _config(options, len(data), checkpoint)
    torch.manual_seed(config.seed % 2**63)
    unet = _unet(options, data) if checkpoint is None else checkpoint.unet
    unet.config = replace(unet.config, sample_size=options["resolution"])
    if data.labels is not None and unet.config.num_classes is None:
        say("the network is unconditional: the labels are not used")
    trainer = Trainer(unet, _schedule(options, checkpoint), data, config, device)
    per_step = config.train_batch_size * config.gradient_accumulation_steps
    epoch, evaluation = (
        math.ceil(len(data) / per_step),
        math.ceil(options["eval_images_every"] / per_step),
    )
    every = Every(
        log=options["logging_steps"],
        checkpoint=options["checkpointing_steps"],
        model=options["save_model_epochs"] * epoch,
        samples=options["save_images_epochs"] * epoch,
        validation=options["save_images_epochs"] * epoch,
        evaluation=evaluation,
    )
    limit = options["checkpoints_total_limit"]
    with TrainingRun(
        directory, trainer, every, limit, validation, say, options["eval_images"]
    ) as run:
        if _start(directory, options["resume_from_checkpoint"], say) != start:
            raise ValueError(f"another process has trained in {directory} meanwhile; start again")
        if start is not None:
            run.resume(start)
            say(f"going on from {start}")
        classes, (count, side, _, channels) = (
            trainer.unet.config.num_classes or "no",
            data.images.shape,
        )
        say(
            f"{count} images of {channels} x {side} x {side}, {classes} classes; {trainer.weights.numel():,} parameters; "
            f"{config.max_train_steps} steps on {trainer.device}"
        )
        end = run.train(math.inf if options["max_seconds"] is None else options["max_seconds"])
    report = dict(
        directory=str(directory),
        model=str(directory / "model"),
        step=trainer.done,
        seconds=round(run.spent, 1),
        ended=end.reason,
    )
    print_report(
        report,
        as_json,
        f"{end.reason}: step {trainer.done}, {run.spent:.0f} s of training -> {directory / 'model'}",
    )
    if end.interrupted:
        raise click.Abort


def _say(line: str, err: bool) -> None:
    with contextlib.suppress(
        BrokenPipeError
    ):  # nobody listens any more: no reason to stop training
        click.echo(line, err=err)


def _given(*names: str) -> list[str]:
    """Those of the options that were given on the command line."""
    source = click.get_current_context().get_parameter_source
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if source(name) == click.core.ParameterSource.COMMANDLINE
    ]


def _checkpoint(options: dict[str, Any]) -> Checkpoint | None:
    """What --weights names. ValueError where other options would contradict it."""
    if options["weights"] is not None or options["model_config_name_or_path"] is not None:
        given = _given(
            "weights",
            "model_config_name_or_path",
            "channels",
            "layers",
            "attention",
            "head_dim",
            "dropout",
        )
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} says what the network is; leave out {', '.join(given[1:])}"
            )
    return None if options["weights"] is None else load_pretrained(options["weights"])


def _schedule(options: dict[str, Any], checkpoint: Checkpoint | None) -> NoiseSchedule:
    """diffusers' schedule of that name, or the checkpoint's own where no other was asked for."""
    if checkpoint is not None and not _given("ddpm_beta_schedule", "ddpm_num_steps"):
        schedule = checkpoint.schedule
    else:
        schedule = schedule_of_diffusers(
            options["ddpm_beta_schedule"].replace("-", "_"), options["ddpm_num_steps"]
        )
    return schedule.zero_terminal_snr() if options["rescale_betas_zero_snr"] else schedule


def _start(directory: Path, wanted: str | None, say: Any) -> Path | None:
    """The checkpoint to go on from. ValueError where a run would be written over another."""
    if wanted not in (None, "latest"):
        return Path(wanted)
    held = checkpoints(directory)
    if wanted is None:
        if held:
            raise ValueError(
                f"{directory} holds a run already; go on with --resume-from-checkpoint latest, or choose another --output-dir"
            )
        return None
    found = latest_checkpoint(directory, say)
    if held and found is None:
        raise ValueError(
            f"every checkpoint in {directory} is damaged; move them away to start anew"
        )
    return found


def _data(options: dict[str, Any]) -> tuple[ImageData, ImageData | None]:
    source, name = options["train_data_dir"], options["dataset_name"]
    if (source is None) == (name is None):
        raise ValueError(
            "give --train-data-dir or --dataset-name: a folder of images, an .npz, .npy or IDX file, or a data set"
        )
    how = options["resolution"], options["fit"]
    if name is not None:
        data, held_out = load_dataset(name, *how), None
    else:
        data = load_images(source, *how)
        held_out = load_images(source, *how, split="test") if has_test_split(source) else None
    if options["validation_data_dir"] is not None:
        held_out = load_images(
            options["validation_data_dir"], *how, channels=data.images.shape[3], split="test"
        )
        held_out = held_out.with_classes_of(data)
    if not options["class_labels"]:
        data, held_out = ImageData(data.images), held_out and ImageData(held_out.images)
    return data, held_out


def _config(options: dict[str, Any], images: int, checkpoint: Checkpoint | None) -> TrainConfig:
    given = {k: v for k, v in options.items() if k in TrainConfig.__dataclass_fields__}
    per_step = max(1, options["train_batch_size"] * options["gradient_accumulation_steps"])
    if options["max_train_steps"] is None:
        given["max_train_steps"] = math.ceil(options["num_epochs"] * images / per_step)
    for name in ("lr_scheduler", "loss_type", "timestep_sampling"):
        given[name] = options[name].replace("-", "_")
    given["ema_decays"] = _ema_decays(options)
    given["prediction_type"] = DIFFUSERS_PREDICTIONS.get(
        options["prediction_type"], options["prediction_type"]
    )
    if checkpoint is not None and not _given("prediction_type"):
        given["prediction_type"] = checkpoint.prediction
    return TrainConfig(**given)


def _ema_decays(options: dict[str, Any]) -> tuple[float, ...]:
    if options["ema_max_decay"] is None:
        return tuple(_numbers("--ema-decays", options["ema_decays"], float, "0.999,0.9999"))
    if _given("ema_decays"):
        raise ValueError(
            "--ema-max-decay and --ema-decays were both given; leave out --ema-max-decay"
        )
    return (options["ema_max_decay"],)


def _unet(options: dict[str, Any], data: ImageData) -> UNet:
    path = options["model_config_name_or_path"]
    if path is not None:
        try:
            config = json.loads(Path(path).read_text())
            if not isinstance(config, dict):
                raise ValueError("expected a JSON object")
            return UNet(UNetConfig.from_diffusers(config))
        except (OSError, ValueError) as error:
            raise ValueError(f"--model-config-name-or-path {path}: {error}") from None
    channels = _numbers("--channels", options["channels"])
    layers = _numbers("--layers", options["layers"], example="1,1,2")
    if len(layers) not in (1, len(channels)) or min(layers) < 1:
        raise ValueError(
            f"--layers {options['layers']}; expected one count of at least 1, or {len(channels)}: one per level"
        )
    attention = (
        [len(channels) - 1]
        if options["attention"] is None
        else _numbers("--attention", options["attention"])
    )
    if not all(0 <= level < len(channels) for level in attention):
        raise ValueError(
            f"--attention {options['attention']}; expected levels of 0..{len(channels) - 1}"
        )
    groups = (
        max(g for g in (8, 16, 32) if all(c % g == 0 for c in channels))
        if all(c % 8 == 0 for c in channels)
        else 0
    )
    if not groups:
        raise ValueError(f"--channels {options['channels']}; expected multiples of 8")
    return UNet(
        UNetConfig(
            sample_size=options["resolution"],
            in_channels=data.images.shape[3],
            out_channels=data.images.shape[3] * (1 + (options["loss_type"] in LEARNING_VARIANCE)),
            channels=tuple(channels),
            layers=layers[0] if len(layers) == 1 else tuple(layers),
            attention=tuple(i in attention for i in range(len(channels))),
            head_dim=options["head_dim"],
            norm_groups=groups,
            downsample_padding=1,
            dropout=options["dropout"],
            num_classes=data.num_classes,
        )
    )


def _repeat_to_the_bit() -> None:
    """Before CUDA starts: libraries choose kernels without atomics, so that a resumed run ends in the same weights."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _numbers(
    name: str, text: str, kind: Callable[[str], Any] = int, example: str = "64,128,128"
) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"{name} {text}; expected numbers with commas between them, such as {example}"
        ) from None
