"""Checkpoints of a training run, with a checksum, and the lock of its directory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..utils.files import write_atomically
from ..utils.input_files import regular_file_size
from .ema import MAIN

MODEL = "model"
_PATTERN = "checkpoint-" + 8 * "[0-9]" + ".safetensors"
_VERSION = "2"


class TrainingCheckpoint(NamedTuple):
    """Content of a checkpoint whose checksum was verified: tensors by name, and a JSON header."""

    path: Path
    state: dict[str, Tensor]
    header: dict[str, Any]


def lock(directory: Path) -> Any:
    """Locks a directory until the returned file is closed or the process ends.

    Raises:
        ValueError: Another process holds the lock.
    """
    file = open(directory / ".lock", "w")  # noqa: SIM115  # open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"another process is training in {directory}; wait for it, or choose another directory"
        ) from None
    return file


def checkpoints(directory: Path) -> list[Path]:
    """Paths of a run's checkpoints, oldest first."""
    return sorted(directory.glob(_PATTERN))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rpartition("-")[2])


def latest_checkpoint(
    directory: Path, log: Callable[[str], Any] = print
) -> TrainingCheckpoint | None:
    """The newest intact checkpoint, or None. Damaged ones are reported to `log` and skipped."""
    for path in reversed(checkpoints(directory)):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            log(f"{error}; trying the previous checkpoint")
    return None


def write_checkpoint(path: Path, state: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a JSON header to one safetensors file, with a checksum of both."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = dict(format="pt", version=_VERSION, header=text, sha256=_checksum(tensors, text))
    with named_file(path):
        write_atomically(path, save(tensors, metadata))


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """Reads a checkpoint and verifies its checksum.

    Raises:
        ValueError: The file is missing, damaged, or not a checkpoint of this format.
    """
    from safetensors import SafetensorError, safe_open

    regular_file_size(path)
    try:
        with safe_open(path, "pt") as f:
            metadata, names = f.metadata() or {}, f.keys()
            tensors = {name: f.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} is not a training checkpoint of format {_VERSION}; "
            "resume with the version that wrote it"
        )
    if not {"header", "sha256"} <= set(metadata):
        raise ValueError(f"{path} is damaged: its header is incomplete")
    if _checksum(tensors, metadata["header"]) != metadata["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not match its content")
    return TrainingCheckpoint(path, tensors, json.loads(metadata["header"]))


def model_folder(average: str) -> str:
    """Folder name of an average's weights in a run's directory: "model", or "model-ema-0.9995"."""
    return MODEL if average == MAIN else f"{MODEL}-{average.replace('_', '-')}"


def remove_partial_files(directory: Path, models: Iterable[Path]) -> None:
    """Removes partly written files of a killed run, but no hidden model that is the only copy."""
    for path in [*directory.glob(".*.tmp"), *directory.glob("samples/.*.tmp")]:
        path.unlink()
    for model in models:
        staged = re.compile(rf"\.{re.escape(model.name)}-[a-z0-9_]{{8}}(-old)?")
        for path in directory.glob(f".{MODEL}-*"):  # as `save_pretrained` names them
            if staged.fullmatch(path.name) and model.exists():
                shutil.rmtree(path)


@contextmanager
def named_file(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError of the body: a full disk reports none."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from None


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
