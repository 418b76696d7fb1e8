"""Output paths of sampling, validated before the run. Imports neither torch nor numpy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

GRIDS, ARRAYS = (".png",), (".npy", ".npz")
KNOWN = GRIDS + ARRAYS
# Longest file name in bytes: file systems allow 255, and a temporary name has up to 32 more.
LONGEST = 220
_IMAGE = re.compile(r"(\d{6,})\.png")  # a file that `FolderSink` writes


def kind_of(path: Path) -> str:
    """Returns the suffix in lower case: x.PNG is a PNG file."""
    return path.suffix.lower()


def check_path(path: str | Path) -> Path:
    """Returns a path that `open_sink` can write to. ValueError for any other."""
    text, path = str(path), Path(path)
    if not text or "\0" in text or (text.endswith("/") and path.suffix and not path.is_dir()):
        raise ValueError(f"path is {text!r}; expected the name of a file or of a directory")
    if text == "-":
        raise ValueError("-: cannot write images to stdout; expected the name of a file")
    if len(os.fsencode(path.name)) > LONGEST:
        length = len(os.fsencode(path.name))
        raise ValueError(f"{text[:40]}... is a name of {length} bytes; expected at most {LONGEST}")
    if path.suffix and kind_of(path) not in KNOWN and not path.is_dir():
        raise ValueError(
            f"{text}: unknown kind of file; expected {', '.join(KNOWN)}, or a directory"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"{text}: the directory {path.absolute().parent} does not exist; create it first"
        )
    if kind_of(path) in KNOWN and path.is_dir():
        raise ValueError(f"{text} is a directory; expected a file name")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(
            f"{text} is a device or a pipe; expected the name of a file or of a directory"
        )
    if not path.suffix and path.is_file():
        raise ValueError(
            f"{text} is a file; expected a directory, or a name ending in {', '.join(KNOWN)}"
        )
    writable = path if path.is_dir() else path.absolute().parent
    if not os.access(writable, os.W_OK):
        raise ValueError(f"{text}: the directory {writable} is not writable; choose another one")
    return path


def images_in(directory: str | Path) -> Iterator[int]:
    """Yields the indices of images NNNNNN.png in a directory; none if it does not exist."""
    if not os.path.isdir(directory):
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if match := _IMAGE.fullmatch(entry.name):
                yield int(match[1])
