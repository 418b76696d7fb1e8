"""A training run and its directory, which always holds something whole to go on from.

model/                            the averaged weights, a diffusers folder: what `Sampler.from_pretrained` reads
checkpoint-00001000.safetensors   everything that the run needs to go on to the bit
log.jsonl                         one JSON object a line
samples/00001000.png              a grid drawn from the averaged weights
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import save_pretrained
from ..data.datasets import ImageData
from ..data.image_io import save_grid
from ..sampling.sampler import Sampler
from ..utils.files import write_atomically
from .checkpoints import LOG, checkpoints, lock, read_checkpoint, read_log, step_of, write_checkpoint
from .trainer import Trainer, check_fit

MODEL, SAMPLES = "model", "samples"
_PATIENCE = 50  # steps without a finite gradient; loss scaling skips one now and then


@dataclass(frozen=True)
class Every:
    """How often, in steps; 0: never."""

    log: int = 50
    checkpoint: int = 500
    model: int = 0
    samples: int = 0
    validation: int = 0


class TrainingRun:
    """Drives a `Trainer` and keeps its directory, for itself alone: `with TrainingRun(...) as run: run.train()`.

    checkpoints_total_limit   older checkpoints are deleted
    validation                images for the loss of `ema` and weights over time; None: some of the training data
    say                       gets one line for a person now and then

    ValueError if the directory's parent is missing or another process trains there, OSError if it cannot be written to.
    """

    def __init__(
        self,
        directory: str | Path,
        trainer: Trainer,
        every: Every,
        checkpoints_total_limit: int = 2,
        validation: ImageData | None = None,
        say: Callable[[str], Any] = print,
    ) -> None:
        self.directory, self.trainer, self.every, self.limit = Path(directory), trainer, every, checkpoints_total_limit
        self.validation, self.say = validation, say
        self.spent = 0.0  # seconds of training, all parts of the run together
        if not self.directory.absolute().parent.is_dir():
            raise ValueError(f"{self.directory.absolute().parent} does not exist; create it first")
        self._fruitless = 0  # steps in a row without a finite gradient, as far as the log knows
        self._identity = trainer.identity()
        self._check()
        self.directory.mkdir(exist_ok=True)
        self._lock = lock(self.directory)
        self._sweep()

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _check(self) -> None:
        """What would stop the run later stops it now."""
        if self.validation is not None:
            try:
                check_fit(self.trainer.unet, self.validation, self.trainer.config.learned_variance)
            except ValueError as error:
                raise ValueError(f"validation: {error}") from None
        model = self.directory / MODEL
        if model.exists() and not (model / "model_index.json").is_file():
            raise ValueError(f"{model} exists and is not a checkpoint; choose another directory")
        for path, is_right in ((self.directory / LOG, Path.is_file), (self.directory / SAMPLES, Path.is_dir)):
            if path.exists() and not is_right(path):
                raise ValueError(f"{path} is in the way; move it, or choose another directory")

    # ---- resume

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint. ValueError if it is damaged, or from a run with other settings, naming them."""
        state, header = read_checkpoint(path)
        settings = header["settings"]
        if changed := [f"{k} {settings.get(k)} -> {v}" for k, v in self._settings().items() if settings.get(k) != v]:
            self.say(f"changed since {path.name}: {', '.join(changed)}")
        then, now = header["identity"], self._identity
        if changed := [f"{k} was {_short(then.get(k))} and is {_short(now[k])}" for k in now if now[k] != then.get(k)]:
            raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
        self.trainer.load_state(state, header["step"])
        if header["scaler"]:  # empty where there was no loss scaling
            self.trainer.scaler.load_state_dict(header["scaler"])
        self.spent = header["seconds"]
        kept = [line for line in read_log(self.directory / LOG) if line["step"] <= header["step"]]
        write_atomically(self.directory / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode())
        for later in checkpoints(self.directory):
            if step_of(later) > header["step"]:  # of a course that is left now, or damaged
                later.rename(later.with_name(f"abandoned-{later.name}"))

    # ---- the loop

    def train(self, max_seconds: float = math.inf) -> str:
        """Trains until the last step, the time or a signal ends it, and leaves a checkpoint and the model. Returns which it was.

        RuntimeError when no step so far, or none of fifty in a row, had a finite gradient, OSError when a file cannot be
        written: the last checkpoint and model are then left as they are.
        """
        try:
            return self._train(max_seconds)
        except OSError as error:
            kept = "the run can go on from its last checkpoint" if checkpoints(self.directory) else "no checkpoint was there yet"
            raise OSError(f"{error}; what was finished before is kept: {kept}") from None

    def _train(self, max_seconds: float) -> str:
        trainer, every, last = self.trainer, self.every, self.trainer.config.max_train_steps
        began, before, saved = time.perf_counter(), self.spent, trainer.done
        if not trainer.done:  # lines of a run that was killed before its first checkpoint
            (self.directory / LOG).unlink(missing_ok=True)
        logged, logged_at = trainer.done, began
        ended = "all steps done"
        with _signals() as stopped:
            while trainer.done < last:
                if stopped or time.perf_counter() - began >= max_seconds:
                    ended = stopped[0] if stopped else f"{max_seconds:g} seconds are over"
                    break
                trainer.step()
                step, self.spent = trainer.done, before + time.perf_counter() - began
                if _due(step, every.log) or step == last:
                    self._log_means(step, step - logged, time.perf_counter() - logged_at)
                    logged, logged_at = step, time.perf_counter()
                if _due(step, every.checkpoint) or step == last:  # before anything that is not needed
                    self.save_checkpoint()
                    saved = step
                if _due(step, every.validation) or (step == last and every.validation):
                    self._validate()
                if _due(step, every.samples) or (step == last and every.samples):
                    self._draw()
                if _due(step, every.model):
                    self.save_model()
        if trainer.done > saved or not checkpoints(self.directory):
            self.save_checkpoint()
        self.save_model()
        return ended

    def _log_means(self, step: int, steps: int, seconds: float) -> None:
        trainer = self.trainer
        config, means = trainer.config, trainer.means()
        finite = not math.isnan(means["loss"])
        self._fruitless = 0 if finite else self._fruitless + steps
        if self._fruitless >= _PATIENCE or self._fruitless == step:
            raise RuntimeError(
                f"no gradient was finite in the {self._fruitless} steps before step {step}; lower the rate, or widen the precision"
            )
        images = config.train_batch_size * config.gradient_accumulation_steps
        line = dict(
            step=step,
            images=step * images,
            epoch=round(step * images / len(trainer.data), 3),
            **{k: v if finite else None for k, v in means.items() if k != "skipped"},
            skipped=means["skipped"],
            lr=config.rate(step - 1),
            images_per_second=round(steps * images / seconds, 2),
            seconds=round(self.spent, 1),
        )
        self._append(line)
        self.say(
            f"step {step} of {config.max_train_steps}, epoch {line['epoch']:.2f}: loss {means['loss']:.4f}, "
            f"{line['images_per_second']:.0f} images/s"
        )

    def _validate(self) -> None:
        trainer, data = self.trainer, self.validation or self.trainer.data
        average, raw = (trainer.validation_loss(unet, data) for unet in (trainer.ema, trainer.unet))
        self._append(dict(step=trainer.done, ema_loss=average, raw_loss=raw, held_out=self.validation is not None))
        which = "held-out images" if self.validation else "training images"
        self.say(f"step {trainer.done}: loss on {which} {average:.4f} with the averaged weights, {raw:.4f} without")

    def _draw(self) -> None:
        """Images 0 ... of seed 0: a column for each class and four rows, or 8 x 8."""
        trainer = self.trainer
        h, w = trainer.data.images.shape[1:3]
        c = trainer.unet.config
        sampler = Sampler(trainer.ema, trainer.schedule, (c.in_channels, h, w), trainer.config.prediction_type, engine="reference")
        classes = min(c.num_classes or 0, 16)
        count, columns = (4 * classes, classes) if classes else (64, 8)
        labels = torch.arange(count) % classes if classes else None
        steps, batch = min(50, len(trainer.schedule)), min(64, trainer.config.train_batch_size)
        images = sampler.sample(count, seed=0, solver="ddim", steps=steps, labels=labels, batch_size=batch)
        (self.directory / SAMPLES).mkdir(exist_ok=True)
        save_grid(self.directory / SAMPLES / f"{trainer.done:08d}.png", images.numpy(), columns)

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.directory / LOG, "a") as f:
            f.write(json.dumps(line) + "\n")

    # ---- files

    def save_model(self) -> None:
        """The averaged weights as a diffusers folder."""
        trainer = self.trainer
        prediction, variance = trainer.config.prediction_type, trainer.objective.variance
        save_pretrained(self.directory / MODEL, trainer.ema, trainer.schedule, prediction, variance)

    def save_checkpoint(self) -> None:
        """Everything, in one file that appears whole; then the oldest ones over the limit go."""
        trainer = self.trainer
        header = dict(step=trainer.done, seconds=self.spent, scaler=trainer.scaler.state_dict())
        header.update(identity=self._identity, settings=self._settings())
        write_checkpoint(self.directory / f"checkpoint-{trainer.done:08d}.safetensors", trainer.state(), header)
        for old in [path for path in checkpoints(self.directory) if step_of(path) <= trainer.done][: -self.limit]:
            old.unlink()

    def _settings(self) -> dict[str, Any]:
        """What may change between the parts of a run, but not unnoticed."""
        threads = torch.get_num_threads()
        return dict(**asdict(self.trainer.config), device=str(self.trainer.device), threads=threads, torch=torch.__version__)

    def _sweep(self) -> None:
        """Removes what a kill left half written. A hidden model stays where it is the only one."""
        for path in [*self.directory.glob(".*.tmp"), *self.directory.glob(f"{SAMPLES}/.*.tmp")]:
            path.unlink()
        for path in self.directory.glob(f".{MODEL}-*"):
            if (self.directory / MODEL).exists():
                shutil.rmtree(path)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."


@contextmanager
def _signals() -> Iterator[list[str]]:
    """SIGINT and SIGTERM end the run after the step at hand: the list then names the signal."""
    came: list[str] = []
    caught = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, lambda n, _: came.append(signal.Signals(n).name)) for number in caught]
    except ValueError:  # not the main thread: signals are somebody else's business
        yield came
        return
    try:
        yield came
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)
