"""Checkpoints: loading and saving trained networks. Weights are safetensors: data, never code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..diffusion.schedule import NoiseSchedule
from ..models.unet import UNet
from ..utils.files import write_directory_atomically
from .diffusers import (
    INDEX,
    PREDICTIONS,
    SCHEDULER,
    VARIANCES,
    folder_files,
    read_json,
    read_scheduler,
    read_unet,
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and the process it was trained for.

    Attributes:
        unet: the network.
        schedule: its noise schedule.
        prediction, variance, clip: as in `Sampler`.
    """

    unet: UNet
    schedule: NoiseSchedule
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: float | None = 1.0


def load_pretrained(directory: str | Path) -> Checkpoint:
    """Loads a diffusers folder (DDPM or DDIM pipeline) on the CPU, in fp32.

    Raises:
        ValueError: something is missing, unknown, unsupported, of the wrong shape, or contains NaN or Inf.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; expected a checkpoint with unet/ and scheduler/"
        )
    return Checkpoint(read_unet(directory), *read_scheduler(read_json(directory / SCHEDULER)))


def save_pretrained(
    directory: str | Path,
    unet: UNet,
    schedule: NoiseSchedule,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: float | None = 1.0,
) -> None:
    """Saves the folder that `load_pretrained` and diffusers' `DDPMPipeline.from_pretrained` load.

    The folder appears whole or not at all; an existing checkpoint is replaced (`write_directory_atomically`).

    Raises:
        ValueError: an argument is unknown or out of range, or `directory` exists and is not a checkpoint.
    """
    for name, value, known in (
        ("prediction", prediction, PREDICTIONS),
        ("variance", variance, VARIANCES),
    ):
        if value not in known.values():
            raise ValueError(
                f"{name} {value!r}; expected one of {', '.join(sorted(set(known.values())))}"
            )
    if clip is not None and not clip > 0:
        raise ValueError(f"clip = {clip}; expected a positive bound, or None")
    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / INDEX).is_file()
        and (directory.is_file() or any(directory.iterdir()))
    ):
        raise ValueError(f"{directory} exists and is not a checkpoint; choose another directory")
    if not directory.absolute().parent.is_dir():
        raise ValueError(f"{directory.absolute().parent} is not a directory; create it first")
    write_directory_atomically(directory, folder_files(unet, schedule, prediction, variance, clip))
