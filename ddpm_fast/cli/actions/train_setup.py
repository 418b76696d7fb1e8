"""Data, network, schedule and trainer of `ddpm-fast train`, from its options."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoints.checkpoint import Checkpoint, load_pretrained
from ...checkpoints.diffusers import schedule_of_diffusers
from ...data.datasets import ImageData, has_test_split, load_dataset, load_images
from ...diffusion.losses import LEARNING_VARIANCE
from ...diffusion.schedule import NoiseSchedule
from ...models.config import UNetConfig
from ...models.unet import UNet
from ...training.checkpoints import (
    TrainingCheckpoint,
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
)
from ...training.config import TrainConfig, config_warnings
from ...training.identity import config_identity, data_identity, differences
from ...training.trainer import Trainer
from ...utils.input_files import read_json_object
from ..common import pick_device
from ..train_options import DIFFUSERS_PREDICTIONS

Options = dict[str, Any]
_NETWORK = {"channels", "layers", "attention", "head_dim", "dropout"}
_SCHEDULE = {"ddpm_beta_schedule", "ddpm_num_steps"}
_NOT_STORED = {"output_dir", "resume_from_checkpoint", "weights", "device", "max_seconds"}
_PATHS = ("train_data_dir", "validation_data_dir", "model_config_name_or_path")
# Options that exclude each other: one on the command line replaces the other in the checkpoint.
_ALTERNATIVES = (
    ({"train_data_dir"}, {"dataset_name"}),
    ({"num_epochs"}, {"max_train_steps"}),
    ({"ema_decays"}, {"ema_max_decay"}),
    (_NETWORK, {"model_config_name_or_path"}),
)


class Setup(NamedTuple):
    """A trainer, its held-out images or None, and the options for its checkpoints."""

    trainer: Trainer
    validation: ImageData | None
    options: Options


def set_up(
    options: Options,
    explicit: Set[str],
    start: TrainingCheckpoint | None,
    log: Callable[[str], Any],
) -> Setup:
    """Builds the trainer of a run.

    Args:
        options: Options by parameter name, with their defaults.
        explicit: Names of the options on the command line; a checkpoint replaces all others.
        start: Checkpoint to resume from, or None.
        log: Called with one line of text per event.

    Raises:
        ValueError: An option or the data is invalid, or does not fit the checkpoint.
    """
    header: Mapping[str, Any] = {} if start is None else start.header
    options = _merged(options, explicit, header.get("options") or {}, log)
    weights = _weights(options, explicit)
    data, validation = _data(options)
    if options["deterministic"]:
        _use_deterministic_kernels()
    device = pick_device(options["device"])
    config = _config(options, explicit, len(data), weights)
    if start is not None:
        now = {**config_identity(config), **data_identity(data)}
        if changed := differences(header["identity"], now):
            raise ValueError(f"{start.path} belongs to another run: {'; '.join(changed)}")
    torch.manual_seed(config.seed % 2**63)
    if weights is not None:
        unet = weights.unet
    elif header and not explicit & (_NETWORK | {"model_config_name_or_path"}):
        unet = UNet(UNetConfig.from_config(header["identity"]["network"]))
    else:
        unet = _unet(options, data)
    unet.config = replace(unet.config, sample_size=options["resolution"])
    if data.labels is not None and unet.config.num_classes is None:
        log("the network is unconditional: the labels are not used")
    schedule = _schedule(options, explicit, weights, header)
    trainer = Trainer(unet, schedule, data, config, device)
    for line in config_warnings(config, len(data)):
        log(f"warning: {line}")
    return Setup(trainer, validation, _stored(options, config))


def start_checkpoint(
    directory: Path, resume: str | None, log: Callable[[str], Any]
) -> TrainingCheckpoint | None:
    """Reads the checkpoint to resume from. ValueError if a new run would overwrite another."""
    if resume not in (None, "latest"):
        return read_checkpoint(Path(resume))
    paths = checkpoints(directory)
    if resume is None:
        if paths:
            raise ValueError(
                f"{directory} contains a run; resume it with --resume_from_checkpoint latest, or "
                "choose another --output_dir"
            )
        return None
    latest = latest_checkpoint(directory, log)
    if paths and latest is None:
        raise ValueError(f"every checkpoint in {directory} is damaged; remove them to start again")
    return latest


def _merged(
    options: Options, explicit: Set[str], stored: Mapping[str, Any], log: Callable[[str], Any]
) -> Options:
    """The options, with those of the checkpoint in place of defaults."""
    restored = {
        k: Path(v) if k in _PATHS and v is not None else v
        for k, v in stored.items()
        if k in options and k not in explicit
    }
    for pair in _ALTERNATIVES:
        for one, other in (pair, pair[::-1]):
            if one & explicit:
                restored = {k: v for k, v in restored.items() if k not in other}
    if changed := [f"--{k} {v}" for k, v in restored.items() if v != options[k] and v is not None]:
        log(f"options from the checkpoint: {' '.join(changed)}")
    return {**options, **restored}


def _stored(options: Options, config: TrainConfig) -> Options:
    """The options to store in checkpoints; paths are absolute, for any working directory."""
    stored = {k: v for k, v in options.items() if k not in _NOT_STORED}
    for name in _PATHS:
        if stored[name] is not None:
            stored[name] = str(Path(stored[name]).absolute())
    prediction = options["prediction_type"]
    if DIFFUSERS_PREDICTIONS.get(prediction, prediction) != config.prediction_type:
        stored["prediction_type"] = config.prediction_type  # that of --weights
    return stored


def _flags(explicit: Set[str], *names: str) -> list[str]:
    """The flags of the options that were given on the command line."""
    return [f"--{name.replace('_', '-')}" for name in names if name in explicit]


def _weights(options: Options, explicit: Set[str]) -> Checkpoint | None:
    """The checkpoint of --weights. ValueError if other options also define the network."""
    if options["weights"] is not None or options["model_config_name_or_path"] is not None:
        names = ("channels", "layers", "attention", "head_dim", "dropout")
        flags = _flags(explicit, "weights", "model_config_name_or_path", *names)
        if len(flags) > 1:
            raise ValueError(f"{flags[0]} defines the network; remove {', '.join(flags[1:])}")
    return None if options["weights"] is None else load_pretrained(options["weights"])


def _schedule(
    options: Options, explicit: Set[str], weights: Checkpoint | None, header: Mapping[str, Any]
) -> NoiseSchedule:
    """The schedule of the options; by default that of the checkpoint or of --weights."""
    if "beta" in header and not explicit & (_SCHEDULE | {"rescale_betas_zero_snr", "weights"}):
        return NoiseSchedule(header["beta"])
    if weights is not None and not explicit & _SCHEDULE:
        schedule = weights.schedule
    else:
        schedule = schedule_of_diffusers(
            options["ddpm_beta_schedule"].replace("-", "_"), options["ddpm_num_steps"]
        )
    return schedule.zero_terminal_snr() if options["rescale_betas_zero_snr"] else schedule


def _data(options: Options) -> tuple[ImageData, ImageData | None]:
    source, name = options["train_data_dir"], options["dataset_name"]
    if (source is None) == (name is None):
        raise ValueError(
            "give --train-data-dir or --dataset-name: a folder of images, an .npz, .npy or IDX "
            "file, or a data set"
        )
    size = options["resolution"], options["fit"]
    if name is not None:
        data, held_out = load_dataset(name, *size), None
    else:
        data = load_images(source, *size)
        held_out = load_images(source, *size, split="test") if has_test_split(source) else None
    if options["validation_data_dir"] is not None:
        held_out = load_images(
            options["validation_data_dir"], *size, channels=data.images.shape[3], split="test"
        )
        held_out = held_out.with_classes_of(data)
    if not options["class_labels"]:
        data, held_out = ImageData(data.images), held_out and ImageData(held_out.images)
    return data, held_out


def _config(
    options: Options, explicit: Set[str], images: int, weights: Checkpoint | None
) -> TrainConfig:
    values = {k: v for k, v in options.items() if k in TrainConfig.__dataclass_fields__}
    per_step = max(1, options["train_batch_size"] * options["gradient_accumulation_steps"])
    if options["max_train_steps"] is None:
        values["max_train_steps"] = math.ceil(options["num_epochs"] * images / per_step)
    for name in ("lr_scheduler", "loss_type", "timestep_sampling"):
        values[name] = options[name].replace("-", "_")
    values["ema_decays"] = _ema_decays(options, explicit)
    values["prediction_type"] = DIFFUSERS_PREDICTIONS.get(
        options["prediction_type"], options["prediction_type"]
    )
    if weights is not None and "prediction_type" not in explicit:
        values["prediction_type"] = weights.prediction
    return TrainConfig(**values)


def _ema_decays(options: Options, explicit: Set[str]) -> tuple[float, ...]:
    if options["ema_max_decay"] is None:
        return tuple(_numbers("--ema-decays", options["ema_decays"], float, "0.999,0.9999"))
    if "ema_decays" in explicit:
        raise ValueError("--ema-max-decay and --ema-decays were both given; remove --ema-max-decay")
    return (options["ema_max_decay"],)


def _unet(options: Options, data: ImageData) -> UNet:
    path = options["model_config_name_or_path"]
    if path is not None:
        try:
            return UNet(UNetConfig.from_config(read_json_object(Path(path))))
        except ValueError as error:
            raise ValueError(f"--model-config-name-or-path {path}: {error}") from None
    channels = _numbers("--channels", options["channels"])
    layers = _numbers("--layers", options["layers"], example="1,1,2")
    if not channels or any(c < 8 or c % 8 for c in channels):
        raise ValueError(f"--channels {options['channels']}; expected multiples of 8")
    if len(layers) not in (1, len(channels)) or min(layers) < 1:
        raise ValueError(
            f"--layers {options['layers']}; expected one count of at least 1, or {len(channels)}: "
            "one per level"
        )
    coarsest = len(channels) - 1
    attention = [coarsest]
    if options["attention"] is not None:
        attention = _numbers("--attention", options["attention"])
    if not all(0 <= level <= coarsest for level in attention):
        raise ValueError(f"--attention {options['attention']}; expected levels of 0..{coarsest}")
    for level in {*attention, coarsest}:  # the middle block's attention has the coarsest width
        if channels[level] % options["head_dim"]:
            raise ValueError(
                f"--head_dim {options['head_dim']}; expected a divisor of {channels[level]}, the "
                f"channels of level {level}"
            )
    return UNet(
        UNetConfig(
            sample_size=options["resolution"],
            in_channels=data.images.shape[3],
            out_channels=data.images.shape[3] * (1 + (options["loss_type"] in LEARNING_VARIANCE)),
            channels=tuple(channels),
            layers=layers[0] if len(layers) == 1 else tuple(layers),
            attention=tuple(i in attention for i in range(len(channels))),
            head_dim=options["head_dim"],
            norm_groups=max(g for g in (8, 16, 32) if all(c % g == 0 for c in channels)),
            downsample_padding=1,
            dropout=options["dropout"],
            num_classes=data.num_classes,
        )
    )


def _use_deterministic_kernels() -> None:
    """Selects kernels without atomics, for a bit-exact resume; call it before CUDA starts."""
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
            f"{name} {text}; expected numbers separated by commas, such as {example}"
        ) from None
