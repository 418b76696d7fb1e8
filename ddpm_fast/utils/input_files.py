"""Reading of input files that may be damaged or hostile: regular files of bounded size only."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .validation import shown

MIB = 2**20
JSON_LIMIT = MIB  # bytes of a configuration file; real ones have about 1 KB


def regular_file_size(path: Path) -> int:
    """Returns the size in bytes of a regular file.

    FIFOs and devices are not opened: a read could block or never end.

    Raises:
        ValueError: `path` is missing, cannot be accessed, or is not a regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # a loop of links, a long name, or one with a null
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a FIFO, device or socket"
        raise ValueError(f"{path} is {kind}; expected a regular file")
    return status.st_size


def read_regular_file(path: Path, limit: int) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes. ValueError otherwise."""
    size = regular_file_size(path)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)  # the size may change after the check
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    if max(size, len(content)) > limit:
        raise ValueError(f"{path} has {size} bytes; expected at most {limit}")
    return content


def read_json_object(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Returns the object in a JSON file in UTF-8, with or without a byte order mark.

    NaN and Infinity are accepted, because diffusers writes them; callers validate the values.

    Raises:
        ValueError: The file is not a regular file of at most `limit` bytes, not JSON, not an
            object, nested too deeply, has an integer of more than 309 digits, or has a key twice.
    """
    content = read_regular_file(path, limit)
    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=_unique_keys,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; expected a flat JSON object") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not JSON in UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefixes the message of a ValueError with the path of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shown(key)} occurs twice; keep one")
        result[key] = value
    return result


def _integer(text: str) -> int:
    # Python raises for more than 4300 digits
    if len(text) > 309:
        raise ValueError(f"a number of {len(text)} digits; expected one in the range of fp64")
    return int(text)
