"""Repositories of the Hugging Face hub: only JSON and safetensors are downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from .diffusers import INDEX, SCHEDULER, UNET
from .weights import WEIGHTS

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# both layouts: components in folders, and the older one with all files at the top
FILES = (INDEX, UNET, f"unet/{WEIGHTS}", SCHEDULER, "config.json", WEIGHTS, "scheduler_config.json")


def is_repository_id(source: str | Path) -> bool:
    """True for a name such as google/ddpm-cifar10-32 whose first part is no local path."""
    text = Path(source).as_posix()
    return _ID.fullmatch(text) is not None and not Path(text.partition("/")[0]).exists()


def download(repository: str | Path) -> Path:
    """The local folder with the files of a repository; they are cached by `huggingface_hub`.

    Raises:
        ValueError: Huggingface_hub is not installed, or the repository cannot be reached.
    """
    name = Path(repository).as_posix()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is not a directory; "
            "to load it from the Hugging Face hub, install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of several libraries, without a common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{name} is not a directory, and the Hugging Face hub has not delivered it; "
            f"check the name and the connection: {first}"
        ) from None
