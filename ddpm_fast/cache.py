"""The folder where the package keeps what it need not find out twice: verdicts of self-checks.

`DDPM_FAST_CACHE` names it, by default ~/.cache/ddpm_fast. Compiled kernels are Triton's to keep, in its own cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cache_dir() -> Path:
    """The folder, which need not exist yet."""
    named = os.environ.get("DDPM_FAST_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_fast"


def cached_files() -> list[Path]:
    """Every file in it, sorted."""
    return sorted(p for p in cache_dir().rglob("*") if p.is_file())


def clear_cache() -> int:
    """Removes what is in the folder; returns how many files there were."""
    count = len(cached_files())
    shutil.rmtree(cache_dir(), ignore_errors=True)
    return count
