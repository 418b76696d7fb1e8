"""Log of a training run: `log.jsonl`, one JSON object per line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically
from .checkpoints import named_file

LOG = "log.jsonl"


class TrainingLog:
    """Writer of the log in a run's directory; NaN and Inf are written as null."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG

    def append(self, entry: dict[str, Any]) -> None:
        """Appends one line."""
        with named_file(self.path), open(self.path, "a") as f:
            f.write(_json(entry) + "\n")

    def truncate(self, step: int) -> None:
        """Removes the entries after `step`, and invalid lines."""
        entries = [entry for entry in read_log(self.path) if entry["step"] <= step]
        with named_file(self.path):
            write_atomically(self.path, "".join(_json(e) + "\n" for e in entries).encode())

    def clear(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a log, without invalid lines such as a partial last line after a kill."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _json(entry: dict[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()
    }
    return json.dumps(finite, allow_nan=False)
