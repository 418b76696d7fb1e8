"""Progress of a training run: a bar on a terminal, the estimated time, and hints to shorten it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TextIO

import torch

from .cpu_ops import is_native
from .trainer import Trainer

_LEAST_STEPS, _LEAST_SECONDS = 3, 5.0  # of training before the time left is estimated
_ESTIMATE_FROM, _HINT_FROM = 60.0, 3600.0  # seconds left
_REFRESH = 0.5  # seconds between two updates of the bar
_SMALL = (32, 64, 96)  # channels of the network in the hint, with one residual block per level
_FORMAT = "{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps{postfix}"


class Progress:
    """Progress bar on a terminal; otherwise one line with the estimated time.

    The speed counts the time of the steps only. The estimate includes the grids, validations and
    evaluations so far.

    Args:
        trainer: The trainer when the run starts or resumes.
        log: Called with one line of text per event.
        stream: Stream of the bar, which is drawn if it is a terminal; None draws no bar.
    """

    def __init__(
        self, trainer: Trainer, log: Callable[[str], Any], stream: TextIO | None = None
    ) -> None:
        self._trainer, self._log = trainer, log
        self._steps = trainer.config.max_train_steps
        self._images = trainer.config.train_batch_size * trainer.config.gradient_accumulation_steps
        self._first: tuple[int, float, float] | None = None  # after the first step, which is slower
        self._refreshed, self._loss, self._estimated = 0.0, "", False
        self._bar: Any = None
        if stream is not None and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._steps, initial=trainer.done, file=stream, bar_format=_FORMAT
            )

    def write(self, line: str) -> None:
        """Logs a line without damaging the bar."""
        with self._bar.external_write_mode() if self._bar is not None else nullcontext():
            self._log(line)

    def update(self, training: float, elapsed: float) -> None:
        """Records a finished step.

        Args:
            training: Seconds of steps since the start or resume.
            elapsed: Seconds since the start or resume, including grids, validation, evaluation and
                checkpoints.
        """
        step = self._trainer.done
        if self._first is None:
            self._first = step, training, elapsed
        first, training_before, elapsed_before = self._first
        done, training = step - first, training - training_before
        is_due = elapsed - self._refreshed >= _REFRESH or step == self._steps
        if done and self._bar is not None and is_due:
            self._refresh(done, training, elapsed - elapsed_before)
            self._refreshed = elapsed
        if not self._estimated and done >= _LEAST_STEPS and training >= _LEAST_SECONDS:
            self._estimated = True
            left = (self._steps - step) * (elapsed - elapsed_before) / done
            self._estimate(left, done / training)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _refresh(self, done: int, training: float, elapsed: float) -> None:
        if self._trainer.device.type == "cpu":  # on a GPU this would wait for the device
            self.show_loss(self._trainer.means(reset=False)["loss"])
        left = (self._steps - self._trainer.done) * elapsed / done
        speed = done * self._images / training if training else 0.0
        self._bar.n = self._trainer.done
        self._bar.set_postfix_str(f"{self._loss}{speed:.0f} images/s, {duration(left)} left")

    def show_loss(self, loss: float) -> None:
        """Sets the loss that the bar shows; NaN changes nothing."""
        if loss == loss:
            self._loss = f"loss {loss:.4f}, "

    def _estimate(self, left: float, steps_per_second: float) -> None:
        if left < _ESTIMATE_FROM:
            return
        count, speed = self._steps - self._trainer.done, steps_per_second * self._images
        self.write(f"about {duration(left)} for {count} more steps ({speed:.0f} images/s)")
        if left > _HINT_FROM:
            self.write(f"to train faster: {', '.join(faster_choices(self._trainer))}")


def faster_choices(trainer: Trainer) -> list[str]:
    """Options of `ddpm-fast train` that shorten a run on this machine."""
    network, choices = trainer.unet.config, []
    on_cpu = trainer.device.type == "cpu"
    is_small = sum(network.channels) <= sum(_SMALL) and max(network.levels_of("layers")) == 1
    if on_cpu and not is_small:
        widths = ",".join(map(str, _SMALL))
        choices.append(f"a smaller network (--channels {widths} --layers 1)")
    choices.append("fewer epochs (--num_epochs)")
    if trainer.config.mixed_precision == "no" and (not on_cpu or is_native(torch.bfloat16)):
        choices.append("bf16 (--mixed_precision bf16)")
    return choices


def duration(seconds: float) -> str:
    """A time as text in seconds, minutes or hours: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
