"""Result of a conversion: a network, its process, and where their settings come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..diffusion.schedule import NoiseSchedule
from ..models.unet import UNet
from ..utils.files import write_directory_atomically
from .checkpoint import Checkpoint, save_pretrained
from .diffusers import network_files


@dataclass(frozen=True)
class Process:
    """The diffusion process of a network, which its weights do not say.

    Attributes:
        schedule: The noise schedule that it was trained with.
        prediction: "eps", "x_0" or "v".
        variance: "fixed_small", "fixed_large" or "learned_range".
        clip: Limit of |x_0| in sampling; None: no clipping.
    """

    schedule: NoiseSchedule
    prediction: str
    variance: str
    clip: float | None


class Setting(NamedTuple):
    """A setting that no weight says: its value, and where it comes from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True)
class Conversion:
    """A converted network.

    Attributes:
        unet: The network, in fp32, on the CPU.
        process: None if only the network was converted.
        codebase: Where the weights come from.
        source: The file that was read.
        sha256: Of that file.
        settings: What the weights do not say.
        notes: What was chosen, renamed or left out.
    """

    unet: UNet
    process: Process | None
    codebase: str
    source: Path
    sha256: str
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint. ValueError if only the network was converted."""
        if self.process is None:
            raise ValueError("the process is missing; convert with process=Process(...)")
        p = self.process
        return Checkpoint(self.unet, p.schedule, p.prediction, p.variance, p.clip)

    def save(self, directory: str | Path) -> None:
        """Writes the folder for `load_pretrained`; without a process, config.json and weights only.

        The folder appears whole or not at all. ValueError as in `save_pretrained`.
        """
        directory = Path(directory)
        if self.process is not None:
            c = self.checkpoint
            save_pretrained(directory, c.unet, c.schedule, c.prediction, c.variance, c.clip)
            return
        if directory.exists() and (directory.is_file() or any(directory.iterdir())):
            raise ValueError(f"{directory} exists and is not empty; choose another directory")
        if not directory.absolute().parent.is_dir():
            raise ValueError(f"{directory.absolute().parent} is not a directory; create it first")
        write_directory_atomically(directory, network_files(self.unet))
