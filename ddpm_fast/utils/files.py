"""Atomic writes of files and directories."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary file in the same directory, flushes it to the disk and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory_atomically(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes a directory, replacing an existing one.

    On Linux, one system call exchanges the old and the new directory. If the file system does not
    support it, two renames replace the directory; a kill between them leaves both, complete, in the
    parent directory under hidden names.

    Args:
        directory: Its parent must exist.
        files: Contents by relative path, at most one folder deep.

    Raises:
        OSError: A file cannot be written; `directory` is then unchanged.
    """
    staging = Path(tempfile.mkdtemp(dir=directory.absolute().parent, prefix=f".{directory.name}-"))
    try:
        for name, content in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            write_atomically(staging / name, content)
        staging.chmod(0o755)
        if not directory.exists():
            staging.rename(directory)
        elif not _exchange(staging, directory):
            _replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges the names of two directories in one system call; False if it is unsupported."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _replace(staging: Path, directory: Path) -> None:
    """Replaces a directory by two renames; if the second fails, the first is undone."""
    old = staging.with_name(staging.name + "-old")
    directory.rename(old)
    try:
        staging.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old)
