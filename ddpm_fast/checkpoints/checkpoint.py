"""Checkpoints: loading and saving trained networks. Weights are safetensors, never pickles."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.schedule import NoiseSchedule
from ..models.unet import UNet
from ..utils.files import write_directory_atomically
from ..utils.validation import shown
from .diffusers import (
    CLIP,
    INDEX,
    PREDICTIONS,
    SCHEDULER,
    SCHEDULER_LIMIT,
    VARIANCES,
    folder_files,
    read_folder,
)
from .hub import download, is_repository_id


@dataclass(frozen=True)
class Checkpoint:
    """Trained network and the diffusion process it was trained for.

    Attributes:
        unet: The network.
        schedule: Its noise schedule.
        prediction, variance, clip: As in `Sampler`.
    """

    unet: UNet
    schedule: NoiseSchedule
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: float | None = 1.0


def load_pretrained(directory: str | Path) -> Checkpoint:
    """Loads a diffusers folder (DDPM or DDIM pipeline) on the CPU, in fp32.

    `directory` may be a repository of the Hugging Face hub, such as "google/ddpm-cifar10-32", if
    huggingface_hub is installed: its JSON and safetensors files are downloaded.

    The result does not depend on torch's default dtype or device. Only regular files are read, and
    nothing is unpickled. `config.json` may have 1 MiB and `scheduler_config.json` 16 MiB.

    Raises:
        ValueError: A file, key or value is missing, unknown, unsupported, out of range, of the
            wrong shape or type, or contains NaN or Inf. The message is one line and names the file.
    """
    if not os.path.isdir(directory) and is_repository_id(directory):
        directory = download(directory)
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise ValueError(
            f"{directory} is not a directory; expected a checkpoint with unet/ and scheduler/"
        )
    return Checkpoint(*read_folder(directory))


def save_pretrained(
    directory: str | Path,
    unet: UNet,
    schedule: NoiseSchedule,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: float | None = 1.0,
) -> None:
    """Saves the folder that `load_pretrained` and diffusers' `DDPMPipeline.from_pretrained` load.

    The write is atomic; an existing checkpoint is replaced.

    Args:
        directory: Folder to write; its parent must exist.
        unet, schedule, prediction, variance, clip: As in `Checkpoint`.

    Raises:
        ValueError: An argument is unknown or out of range, or `directory` exists and is not a
            checkpoint.
    """
    for name, value, known in (
        ("prediction", prediction, PREDICTIONS),
        ("variance", variance, VARIANCES),
    ):
        if value not in known.values():
            raise ValueError(
                f"{name} {value!r}; expected one of {', '.join(sorted(set(known.values())))}"
            )
    expected, fits = CLIP
    if clip is not None and not fits(clip):
        raise ValueError(f"clip = {shown(clip)}; expected {expected}, or None")
    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / INDEX).is_file()
        and (directory.is_file() or any(directory.iterdir()))
    ):
        raise ValueError(f"{directory} exists and is not a checkpoint; choose another directory")
    if not directory.absolute().parent.is_dir():
        raise ValueError(f"{directory.absolute().parent} is not a directory; create it first")
    files = folder_files(unet, schedule, prediction, variance, clip)
    if len(files[SCHEDULER]) > SCHEDULER_LIMIT:
        raise ValueError(
            f"schedule has {len(schedule)} betas that are not linear; expected at most "
            f"{SCHEDULER_LIMIT} bytes of {SCHEDULER}: use fewer timesteps"
        )
    write_directory_atomically(directory, files)
