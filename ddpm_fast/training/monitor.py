"""Monitoring of a training run between its steps: validation loss, sample grids and KID."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import ImageData
from ..data.image_io import save_grid
from ..models.unet import UNet
from ..sampling.sampler import Sampler
from .checkpoints import named_file
from .log import TrainingLog
from .scores import ImageScore
from .trainer import Trainer

SAMPLES = "samples"
_BATCH = 64  # maximum images per forward pass


class Monitor:
    """Evaluation of a `Trainer`'s averages; results are logged.

    Args:
        trainer: Read, never changed.
        directory: The run's directory; grids are written to its folder samples/.
        training_log: Receives the results.
        validation: Held-out images; None for the training data.
        log: Called with one line of text per event.
        eval_images: Images drawn from every average for KID, at least 4; 0 disables KID.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: Path,
        training_log: TrainingLog,
        validation: ImageData | None,
        log: Callable[[str], Any],
        eval_images: int,
    ) -> None:
        self._trainer, self._folder, self._log = trainer, directory / SAMPLES, log
        self._training_log, self._validation = training_log, validation
        self._images = validation or trainer.data
        self._batch = min(_BATCH, trainer.config.train_batch_size)
        self._score = ImageScore(self._images, eval_images, trainer.device) if eval_images else None

    def validate(self) -> None:
        """Logs the losses of every average and of the weights on a fixed set of images."""
        trainer = self._trainer
        kind = "held-out" if self._validation else "training"
        self._log(f"step {trainer.done}: computing the loss on {kind} images")
        networks = {**trainer.averages, "raw": trainer.unet}
        losses = {
            f"{name}_loss": trainer.validation_loss(unet, self._images)
            for name, unet in networks.items()
        }
        held_out = self._validation is not None
        self._training_log.append(dict(step=trainer.done, **losses, held_out=held_out))
        text = ", ".join(f"{name[:-5]} {value:.4f}" for name, value in losses.items())
        self._log(f"step {trainer.done}: loss on {kind} images: {text}")

    def draw(self) -> None:
        """Writes a grid of images of seed 0: 8 x 8, or four rows with a column per class."""
        trainer = self._trainer
        classes = min(trainer.unet.config.num_classes or 0, 16)
        count, columns = (4 * classes, classes) if classes else (64, 8)
        path = self._folder / f"{trainer.done:08d}.png"
        self._log(f"step {trainer.done}: drawing {count} images -> {path}")
        labels = torch.arange(count) % classes if classes else None
        steps, sampler = min(50, len(trainer.schedule)), self._sampler(trainer.ema)
        images = sampler.sample(
            count, seed=0, solver="ddim", steps=steps, labels=labels, batch_size=self._batch
        )
        with named_file(path):
            self._folder.mkdir(exist_ok=True)
            save_grid(path, images.numpy(), columns)

    def evaluate(self, stop: Callable[[], bool]) -> None:
        """Logs KID of every average, for the same noise; nothing if `stop()` ends the sampling."""
        if self._score is None:
            return
        trainer, count = self._trainer, self._score.count
        self._log(f"step {trainer.done}: drawing {count} images per average for KID")
        scores: dict[str, float] = {}
        for name, unet in trainer.averages.items():
            score = self._score.of(self._sampler(unet), self._batch, stop)
            if score is None:
                return
            scores[f"{name}_kid"], scores[f"{name}_kid_deviation"] = score
        held_out = self._validation is not None
        self._training_log.append(
            dict(step=trainer.done, **scores, eval_images=count, held_out=held_out)
        )
        kids = ", ".join(f"{name} {scores[f'{name}_kid']:.4f}" for name in trainer.averages)
        self._log(f"step {trainer.done}: KID of {count} images: {kids}")

    def _sampler(self, unet: UNet) -> Sampler:
        trainer, (h, w) = self._trainer, self._trainer.data.images.shape[1:3]
        shape = (unet.config.in_channels, h, w)
        return Sampler(unet, trainer.schedule, shape, trainer.config.prediction_type)
