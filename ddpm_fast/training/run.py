"""Training runs: a resumable loop over a `Trainer`'s steps, and its directory.

model/                            averaged weights, a diffusers folder for `Sampler.from_pretrained`
model-ema-0.9995/                 the same for every further average, named after its decay
checkpoint-00001000.safetensors   the state for a bit-exact resume
log.jsonl                         one JSON object per line
samples/00001000.png              a grid of images drawn with the averaged weights
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from ..checkpoints.checkpoint import save_pretrained
from ..data.datasets import ImageData
from ..utils.signals import graceful_shutdown
from .checkpoints import (
    TrainingCheckpoint,
    checkpoints,
    lock,
    model_folder,
    named_file,
    remove_partial_files,
    step_of,
    write_checkpoint,
)
from .identity import check_fit, differences
from .log import LOG, TrainingLog
from .monitor import SAMPLES, Monitor
from .progress import Progress
from .trainer import Trainer

# Consecutive skipped steps after which a run has diverged. Loss scaling skips steps while it halves
# the scale; no scale needs 50 halvings.
_SKIPS_WITH_SCALING, _SKIPS = 50, 5


@dataclass(frozen=True)
class Every:
    """Intervals of a run, in steps; 0 means never."""

    log: int = 50
    checkpoint: int = 500
    model: int = 0
    samples: int = 0
    validation: int = 0
    evaluation: int = 0


@dataclass(frozen=True)
class RunEnd:
    """Reason for the end of a run, and the exit code of its process."""

    reason: str
    exit_code: int = 0  # 128 + the number of the signal that ended the run


class TrainingRun:
    """Training run with a directory: `with TrainingRun(...) as run: run.train()`.

    Args:
        directory: The run's directory, created if it is missing; locked until the run is closed.
        trainer: Trained in place.
        every: Intervals of the log, checkpoints, grids and evaluations.
        checkpoints_total_limit: Number of checkpoints; older ones are deleted.
        validation: Images for validation loss and KID; None for the training data.
        log: Called with one line of text per event.
        eval_images: Images drawn from every average for KID, at least 4.
        options: Stored in checkpoints for the program that resumes the run; JSON.
        progress: Stream of a progress bar, which is drawn only on a terminal.

    Attributes:
        spent: Seconds of training since the start of the run, including previous processes.

    Raises:
        ValueError: The directory's parent is missing, a file of the run is invalid, the validation
            images do not fit the network, or another process trains in the directory.
        OSError: The directory is not writable.
    """

    def __init__(
        self,
        directory: str | Path,
        trainer: Trainer,
        every: Every,
        checkpoints_total_limit: int = 2,
        validation: ImageData | None = None,
        log: Callable[[str], Any] = print,
        eval_images: int = 2000,
        options: Mapping[str, Any] | None = None,
        progress: TextIO | None = None,
    ) -> None:
        self.directory, self.trainer, self.every = Path(directory), trainer, every
        self.limit, self.validation, self.options = checkpoints_total_limit, validation, options
        self.spent = 0.0
        self._log, self._terminal, self._progress = log, progress, Progress(trainer, log)
        if not self.directory.absolute().parent.is_dir():
            raise ValueError(f"{self.directory.absolute().parent} does not exist; create it first")
        self._paused = 0.0  # seconds outside of steps since the start or resume
        self._saved = trainer.done  # step of the last checkpoint
        self._pending: set[str] = set()  # work that waits for a finite gradient
        self._stop: Callable[[], bool] = lambda: False
        self._identity = trainer.identity()
        self._training_log = TrainingLog(self.directory)
        self._check()
        count = eval_images if every.evaluation else 0
        self._monitor = Monitor(
            trainer, self.directory, self._training_log, validation, self._write, count
        )
        self.directory.mkdir(exist_ok=True)
        self._lock = lock(self.directory)
        remove_partial_files(self.directory, self._folders().values())

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _check(self) -> None:
        """ValueError for errors that would otherwise occur during the run."""
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
        log, samples = self.directory / LOG, self.directory / SAMPLES
        for path, is_valid, kind in (
            (log, log.is_file(), "file"),
            (samples, samples.is_dir(), "directory"),
        ):
            if path.exists() and not is_valid:
                raise ValueError(
                    f"{path} is not a {kind}; move it, or choose another directory for the run"
                )

    # ---- resume

    def resume(self, checkpoint: TrainingCheckpoint) -> None:
        """Restores a checkpoint as read by `read_checkpoint` or `latest_checkpoint`.

        Later checkpoints in the directory are renamed, and later entries of the log removed.

        Raises:
            ValueError: The run's identity differs from the checkpoint's; the message says where.
        """
        path, state, header = checkpoint
        settings = header["settings"]
        if changed := [
            f"{k} {settings.get(k)} -> {v}"
            for k, v in self._settings().items()
            if settings.get(k) != v
        ]:
            self._write(f"changed since {path.name}: {', '.join(changed)}")
        saved, options = header["identity"], header.get("options")
        if changed := differences(saved, self._identity, options, self.options):
            raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
        self.trainer.load_state(state, header["step"])
        if header["scaler"]:  # empty without loss scaling
            self.trainer.scaler.load_state_dict(header["scaler"])
        self.spent = header["seconds"]
        self._training_log.truncate(header["step"])
        for later in checkpoints(self.directory):
            if step_of(later) > header["step"]:  # abandoned by this resume, or damaged
                later.rename(later.with_name(f"abandoned-{later.name}"))

    # ---- the loop

    def train(self, max_seconds: float = math.inf) -> RunEnd:
        """Trains to the last step, the time limit or a signal; writes a checkpoint and the model.

        Args:
            max_seconds: Time limit of this call.

        Raises:
            RuntimeError: Training diverged, or a file cannot be written. The last checkpoint and
                model are unchanged.
        """
        self._progress = Progress(self.trainer, self._log, self._terminal)
        try:
            return self._train(max_seconds)
        except OSError as error:
            raise RuntimeError(f"{error}; {self._last_checkpoint()}") from None
        finally:
            self._progress.close()

    def _train(self, max_seconds: float) -> RunEnd:
        trainer, every, last = self.trainer, self.every, self.trainer.config.max_train_steps
        start, before, self._saved = time.perf_counter(), self.spent, trainer.done
        if not trainer.done:  # entries of a run that was killed before its first checkpoint
            self._training_log.clear()
        logged, logged_at, self._paused = trainer.done, 0.0, 0.0  # step; seconds of training
        end = RunEnd("all steps done")
        with graceful_shutdown() as shutdown:
            self._stop = lambda: shutdown() or time.perf_counter() - start >= max_seconds
            while trainer.done < last:
                if self._stop():
                    reason = shutdown.name or f"time limit of {max_seconds:g} s reached"
                    end = RunEnd(reason, shutdown.exit_code if shutdown else 0)
                    break
                trainer.step()
                step, self.spent = trainer.done, before + time.perf_counter() - start
                is_logged = _due(step, every.log) or step == last
                if is_logged or trainer.device.type == "cpu":  # the check waits for a GPU
                    self._check_divergence()
                if is_logged:
                    means = trainer.means()
                    seconds = time.perf_counter() - start - self._paused  # after the device is done
                    self._log_means(means, step - logged, seconds - logged_at)
                    logged, logged_at = step, seconds
                self._work_between_steps(step, step == last)
                elapsed = time.perf_counter() - start
                self._progress.update(elapsed - self._paused, elapsed)
        self._finish(end.exit_code > 0)
        return end

    def _finish(self, interrupted: bool) -> None:
        """Writes the last checkpoint and the model, unless the weights are not finite."""
        trainer = self.trainer
        if not trainer.is_finite():
            if not interrupted:
                raise self._divergence(max(1, trainer.consecutive_skips))
            self._write(f"the loss is NaN or Inf: nothing is written; {self._last_checkpoint()}")
            return
        if trainer.done > self._saved or not checkpoints(self.directory):
            self.save_checkpoint()
        self.save_model()

    def _work_between_steps(self, step: int, at_end: bool) -> None:
        """Does the work that is due after a step; images_per_second does not count its time.

        Work is postponed to a step with a finite gradient, so no file of a finite state is replaced
        by one of a state that is not.
        """
        every, evaluate = self.every, partial(self._monitor.evaluate, self._stop)
        work: dict[str, tuple[Callable[[], object], bool]] = (
            dict(  # the checkpoint first, the slowest last
                checkpoint=(self.save_checkpoint, _due(step, every.checkpoint) or at_end),
                validation=(self._monitor.validate, _due(step, every.validation, at_end)),
                samples=(self._monitor.draw, _due(step, every.samples, at_end)),
                model=(self.save_model, _due(step, every.model)),
                evaluation=(evaluate, _due(step, every.evaluation, at_end)),
            )
        )
        self._pending |= {name for name, (_, is_due) in work.items() if is_due}
        if not self._pending:
            return
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)  # steps that are still running are training
        start = time.perf_counter()
        if (at_end or not self.trainer.consecutive_skips) and self.trainer.is_finite():
            for name, (do, _) in work.items():
                if name in self._pending:
                    do()
            self._pending.clear()
        self._paused += time.perf_counter() - start

    def _check_divergence(self) -> None:
        skips, scaling = self.trainer.consecutive_skips, self.trainer.scaler.is_enabled()
        if skips >= (_SKIPS_WITH_SCALING if scaling else _SKIPS):
            raise self._divergence(skips)

    def _divergence(self, skips: int) -> RuntimeError:
        step = self.trainer.done
        return RuntimeError(
            f"training diverged: gradients are NaN or Inf since step {step - skips + 1} "
            f"(now step {step}); {self._last_checkpoint()}; use a lower --learning_rate, or a "
            "higher precision"
        )

    def _last_checkpoint(self) -> str:
        """Instruction for the user after a failure."""
        if not (paths := checkpoints(self.directory)):
            return "no checkpoint was written; start again"
        return f"the last checkpoint is {paths[-1]}; resume with --resume_from_checkpoint latest"

    def _log_means(self, means: dict[str, float], steps: int, seconds: float) -> None:
        trainer, step = self.trainer, self.trainer.done
        config = trainer.config
        images = config.train_batch_size * config.gradient_accumulation_steps
        entry = dict(
            step=step,
            images=step * images,
            epoch=round(step * images / len(trainer.data), 3),
            **means,
            lr=config.rate(step - 1),
            images_per_second=round(steps * images / seconds, 2),
            seconds=round(self.spent, 1),
        )
        self._training_log.append(entry)
        self._progress.show_loss(means["loss"])
        self._write(
            f"step {step} of {config.max_train_steps}, epoch {entry['epoch']:.2f}: "
            f"loss {means['loss']:.4f}, {entry['images_per_second']:.0f} images/s"
        )

    def _write(self, line: str) -> None:
        self._progress.write(line)

    # ---- files

    def save_model(self) -> None:
        """Writes every average as a diffusers folder."""
        trainer = self.trainer
        prediction, variance = trainer.config.prediction_type, trainer.objective.variance
        for name, folder in self._folders().items():
            with named_file(folder):
                save_pretrained(
                    folder, trainer.averages[name], trainer.schedule, prediction, variance
                )

    def _folders(self) -> dict[str, Path]:
        """Folder of each average, by name."""
        return {name: self.directory / model_folder(name) for name in self.trainer.averages}

    def save_checkpoint(self) -> None:
        """Writes the state as one file, then deletes the oldest checkpoints over the limit."""
        trainer = self.trainer
        header = dict(step=trainer.done, seconds=self.spent, scaler=trainer.scaler.state_dict())
        header.update(identity=self._identity, settings=self._settings())
        header.update(options=self.options, beta=trainer.schedule.beta.tolist())
        write_checkpoint(
            self.directory / f"checkpoint-{trainer.done:08d}.safetensors", trainer.state(), header
        )
        paths = [path for path in checkpoints(self.directory) if step_of(path) <= trainer.done]
        for old in paths[: -self.limit]:
            old.unlink()
        self._saved = trainer.done

    def _settings(self) -> dict[str, Any]:
        """Settings whose changes are reported when a run resumes, as JSON values."""
        trainer, threads = self.trainer, torch.get_num_threads()
        config = asdict(trainer.config) | dict(ema_decays=list(trainer.config.ema_decays))
        return dict(**config, device=str(trainer.device), threads=threads, torch=torch.__version__)


def _due(step: int, every: int, at_end: bool = False) -> bool:
    return every > 0 and (at_end or step % every == 0)
