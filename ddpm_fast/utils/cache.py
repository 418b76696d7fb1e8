"""Cache folder for results of self-checks and compiled machine code.

`DDPM_FAST_CACHE` names it, by default ~/.cache/ddpm_fast. Compiled kernels are Triton's to keep, in its own cache.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CHECKS = "checks"  # results of self-checks
CPU = "cpu"  # machine code of the CPU engine
FOLDERS = (CHECKS, CPU)  # other files in the folder are left alone: it may serve more than this package


def cache_dir() -> Path:
    """The folder, which need not exist yet."""
    named = os.environ.get("DDPM_FAST_CACHE")
    if named:
        return Path(named)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"ddpm_fast-{os.getuid()}"
    return home / "ddpm_fast"


def cached_files() -> list[Path]:
    """Every file that is kept, sorted."""
    return sorted(p for folder in FOLDERS for p in (cache_dir() / folder).rglob("*") if p.is_file())


def clear_cache() -> int:
    """Removes what is kept; returns how many files there were."""
    files = cached_files()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)
