"""A training run and its directory, which always holds something whole to go on from.

model/                            the averaged weights, a diffusers folder: what `Sampler.from_pretrained` reads
model-ema-0.9995/                 the same for every further average, named after its decay
checkpoint-00001000.safetensors   everything that the run needs to go on to the bit
log.jsonl                         one JSON object a line
samples/00001000.png              a grid drawn from the averaged weights
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import save_pretrained
from ..data.datasets import ImageData
from ..data.image_io import save_grid
from ..models.unet import UNet
from ..sampling.sampler import Sampler
from ..utils.files import write_atomically
from ..utils.signals import graceful_shutdown
from .checkpoints import (
    LOG,
    checkpoints,
    lock,
    read_checkpoint,
    read_log,
    step_of,
    write_checkpoint,
)
from .ema import MAIN
from .scores import ImageScore
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
    evaluation: int = 0


@dataclass(frozen=True)
class RunEnd:
    """Why a run ended: a reason for the log, and whether a signal interrupted it."""

    reason: str
    interrupted: bool = False


class TrainingRun:
    """Drives a `Trainer` and keeps its directory, for itself alone: `with TrainingRun(...) as run: run.train()`.

    checkpoints_total_limit   older checkpoints are deleted
    validation                images for the loss of averages and weights over time, and for KID; None: the training data
    eval_images               how many images each evaluation draws from every average, for KID; at least 4
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
        eval_images: int = 2000,
    ) -> None:
        self.directory, self.trainer, self.every, self.limit = (
            Path(directory),
            trainer,
            every,
            checkpoints_total_limit,
        )
        self.validation, self.say = validation, say
        self.spent = 0.0  # seconds of training, all parts of the run together
        if not self.directory.absolute().parent.is_dir():
            raise ValueError(f"{self.directory.absolute().parent} does not exist; create it first")
        self._aside = 0.0  # seconds since the last line of the log that were no training
        self._saved = trainer.done  # step of the last checkpoint
        self._stop: Callable[[], bool] = lambda: False
        self._fruitless = 0  # steps in a row without a finite gradient, as far as the log knows
        self._identity = trainer.identity()
        self._check()
        self._score = (
            ImageScore(self._held_out, eval_images, trainer.device) if every.evaluation else None
        )
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
        for model in self._folders().values():
            if model.exists() and not (model / "model_index.json").is_file():
                raise ValueError(
                    f"{model} exists and is not a checkpoint; choose another directory"
                )
        for path, is_right in (
            (self.directory / LOG, Path.is_file),
            (self.directory / SAMPLES, Path.is_dir),
        ):
            if path.exists() and not is_right(path):
                raise ValueError(f"{path} is in the way; move it, or choose another directory")

    # ---- resume

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint. ValueError if it is damaged, or from a run with other settings, naming them."""
        state, header = read_checkpoint(path)
        settings = header["settings"]
        if changed := [
            f"{k} {settings.get(k)} -> {v}"
            for k, v in self._settings().items()
            if settings.get(k) != v
        ]:
            self.say(f"changed since {path.name}: {', '.join(changed)}")
        then, now = header["identity"], self._identity
        if changed := [
            f"{k} was {_short(then.get(k))} and is {_short(now[k])}"
            for k in now
            if now[k] != then.get(k)
        ]:
            raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
        self.trainer.load_state(state, header["step"])
        if header["scaler"]:  # empty where there was no loss scaling
            self.trainer.scaler.load_state_dict(header["scaler"])
        self.spent = header["seconds"]
        kept = [line for line in read_log(self.directory / LOG) if line["step"] <= header["step"]]
        write_atomically(
            self.directory / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode()
        )
        for later in checkpoints(self.directory):
            if step_of(later) > header["step"]:  # of a course that is left now, or damaged
                later.rename(later.with_name(f"abandoned-{later.name}"))

    # ---- the loop

    def train(self, max_seconds: float = math.inf) -> RunEnd:
        """Trains until the last step, the time limit or a signal; writes a checkpoint and the model. Returns why it ended.

        RuntimeError when no step so far, or none of fifty in a row, had a finite gradient, OSError when a file cannot be
        written: the last checkpoint and model are then left as they are.
        """
        try:
            return self._train(max_seconds)
        except OSError as error:
            kept = (
                "the run can go on from its last checkpoint"
                if checkpoints(self.directory)
                else "no checkpoint was there yet"
            )
            raise OSError(f"{error}; what was finished before is kept: {kept}") from None

    def _train(self, max_seconds: float) -> RunEnd:
        trainer, every, last = self.trainer, self.every, self.trainer.config.max_train_steps
        began, before, self._saved = time.perf_counter(), self.spent, trainer.done
        if not trainer.done:  # lines of a run that was killed before its first checkpoint
            (self.directory / LOG).unlink(missing_ok=True)
        logged, logged_at, self._aside = trainer.done, began, 0.0
        end = RunEnd("all steps done")
        with graceful_shutdown() as shutdown:
            self._stop = lambda: shutdown() or time.perf_counter() - began >= max_seconds
            while trainer.done < last:
                if self._stop():
                    end = RunEnd(
                        shutdown.name or f"{max_seconds:g} seconds are over", interrupted=shutdown()
                    )
                    break
                trainer.step()
                step, self.spent = trainer.done, before + time.perf_counter() - began
                if _due(step, every.log) or step == last:
                    self._log_means(step, step - logged, logged_at)
                    logged, logged_at, self._aside = step, time.perf_counter(), 0.0
                self._work_aside(step, step == last)
        if trainer.done > self._saved or not checkpoints(self.directory):
            self.save_checkpoint()
        self.save_model()
        return end

    def _work_aside(self, step: int, at_end: bool) -> None:
        """What is due after a step and is no training; its time counts in no images_per_second."""
        every = self.every
        due = [  # the checkpoint before anything that is not needed, what takes longest at the end
            (self.save_checkpoint, _due(step, every.checkpoint) or at_end),
            (self._validate, _due(step, every.validation) or (at_end and every.validation)),
            (self._draw, _due(step, every.samples) or (at_end and every.samples)),
            (self.save_model, _due(step, every.model)),
            (self._evaluate, _due(step, every.evaluation) or (at_end and every.evaluation)),
        ]
        work = [do for do, is_due in due if is_due]
        if work and self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)  # steps that are still running are training
        began = time.perf_counter()
        for do in work:
            do()
        self._aside += time.perf_counter() - began

    def _log_means(self, step: int, steps: int, since: float) -> None:
        trainer = self.trainer
        config, means = trainer.config, trainer.means()
        seconds = (
            time.perf_counter() - since - self._aside
        )  # after `means`, which waits for the device
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
            **{k: v if math.isfinite(v) else None for k, v in means.items() if k != "skipped"},
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
        trainer, data = self.trainer, self._held_out
        networks = {**trainer.averages, "raw": trainer.unet}
        losses = {
            f"{name}_loss": trainer.validation_loss(unet, data) for name, unet in networks.items()
        }
        self._append(dict(step=trainer.done, **losses, held_out=self.validation is not None))
        which = "held-out images" if self.validation else "training images"
        self.say(
            f"step {trainer.done}: loss on {which}: {', '.join(f'{k[:-5]} {v:.4f}' for k, v in losses.items())}"
        )

    def _evaluate(self) -> None:
        """KID of every average, over the same noise; no line at all where a signal or the time ends it."""
        if self._score is None:
            return
        scores: dict[str, float] = {}
        for name, unet in self.trainer.averages.items():
            score = self._score.of(self._sampler(unet), self._batch, self._stop)
            if score is None:
                return
            scores[f"{name}_kid"], scores[f"{name}_kid_deviation"] = score
        held_out = self.validation is not None
        self._append(
            dict(step=self.trainer.done, **scores, eval_images=self._score.count, held_out=held_out)
        )
        kids = ", ".join(f"{name} {scores[f'{name}_kid']:.4f}" for name in self.trainer.averages)
        self.say(f"step {self.trainer.done}: KID of {self._score.count} images: {kids}")

    def _draw(self) -> None:
        """Images 0 ... of seed 0: a column for each class and four rows, or 8 x 8."""
        trainer = self.trainer
        classes = min(trainer.unet.config.num_classes or 0, 16)
        count, columns = (4 * classes, classes) if classes else (64, 8)
        labels = torch.arange(count) % classes if classes else None
        steps, sampler = min(50, len(trainer.schedule)), self._sampler(trainer.ema)
        images = sampler.sample(
            count, seed=0, solver="ddim", steps=steps, labels=labels, batch_size=self._batch
        )
        (self.directory / SAMPLES).mkdir(exist_ok=True)
        save_grid(self.directory / SAMPLES / f"{trainer.done:08d}.png", images.numpy(), columns)

    def _sampler(self, unet: UNet) -> Sampler:
        trainer, (h, w) = self.trainer, self.trainer.data.images.shape[1:3]
        shape = (unet.config.in_channels, h, w)
        return Sampler(unet, trainer.schedule, shape, trainer.config.prediction_type)

    @property
    def _batch(self) -> int:
        return min(64, self.trainer.config.train_batch_size)

    @property
    def _held_out(self) -> ImageData:
        return self.validation or self.trainer.data

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.directory / LOG, "a") as f:
            f.write(json.dumps(line) + "\n")

    # ---- files

    def save_model(self) -> None:
        """Every average as a diffusers folder."""
        trainer = self.trainer
        prediction, variance = trainer.config.prediction_type, trainer.objective.variance
        for name, folder in self._folders().items():
            save_pretrained(folder, trainer.averages[name], trainer.schedule, prediction, variance)

    def _folders(self) -> dict[str, Path]:
        """Name of an average -> its folder."""
        folder = lambda name: MODEL if name == MAIN else f"{MODEL}-{name.replace('_', '-')}"
        return {name: self.directory / folder(name) for name in self.trainer.averages}

    def save_checkpoint(self) -> None:
        """Everything, in one file that appears whole; then the oldest ones over the limit go."""
        trainer = self.trainer
        header = dict(step=trainer.done, seconds=self.spent, scaler=trainer.scaler.state_dict())
        header.update(identity=self._identity, settings=self._settings())
        write_checkpoint(
            self.directory / f"checkpoint-{trainer.done:08d}.safetensors", trainer.state(), header
        )
        for old in [path for path in checkpoints(self.directory) if step_of(path) <= trainer.done][
            : -self.limit
        ]:
            old.unlink()
        self._saved = trainer.done

    def _settings(self) -> dict[str, Any]:
        """What may change between the parts of a run, but not unnoticed."""
        threads = torch.get_num_threads()
        config = dict(
            asdict(self.trainer.config), ema_decays=list(self.trainer.config.ema_decays)
        )  # as JSON has it
        return dict(
            **config, device=str(self.trainer.device), threads=threads, torch=torch.__version__
        )

    def _sweep(self) -> None:
        """Removes what a kill left half written. A hidden model stays where it is the only one."""
        for path in [*self.directory.glob(".*.tmp"), *self.directory.glob(f"{SAMPLES}/.*.tmp")]:
            path.unlink()
        for model in self._folders().values():
            staged = re.compile(
                rf"\.{re.escape(model.name)}-[a-z0-9_]{{8}}(-old)?"
            )  # as `save_pretrained` names them
            for path in self.directory.glob(f".{MODEL}-*"):
                if staged.fullmatch(path.name) and model.exists():
                    shutil.rmtree(path)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."
