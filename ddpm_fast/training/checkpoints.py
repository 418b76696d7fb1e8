"""The files of a training run: checkpoints with a checksum, the log, the lock."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.files import write_atomically

LOG = "log.jsonl"
_PATTERN = "checkpoint-" + 8 * "[0-9]" + ".safetensors"
_VERSION = "2"


def lock(directory: Path) -> Any:
    """Held until the process ends, however it ends. ValueError if another process holds it."""
    held = open(directory / ".lock", "w")  # noqa: SIM115  # open as long as the run
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"another process is training in {directory}; wait for it, or choose another directory"
        ) from None
    return held


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run's directory, oldest first."""
    return sorted(directory.glob(_PATTERN))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rpartition("-")[2])


def latest_checkpoint(directory: Path, say: Callable[[str], Any] = print) -> Path | None:
    """The newest checkpoint that is whole; None if there is none. Damaged ones are passed over with a word."""
    for path in reversed(checkpoints(directory)):
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            say(f"{error}; trying the one before")
    return None


def write_checkpoint(path: Path, state: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Tensors and a JSON header in one safetensors file, with a checksum of both."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = json.dumps(header, sort_keys=True)
    write_atomically(
        path,
        save(
            tensors,
            dict(format="pt", version=_VERSION, header=text, sha256=_checksum(tensors, text)),
        ),
    )


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` wrote. ValueError for a file that is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            metadata, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} is no training checkpoint of format {_VERSION}; resume with the version that wrote it"
        )
    if _checksum(tensors, metadata["header"]) != metadata["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    return tensors, json.loads(metadata["header"])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a torn last line, as a kill leaves it, and what else is no entry is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
