"""Cache directory for results of kernel verification and compiled CPU code.

It is `DDPM_FAST_CACHE`, by default ~/.cache/ddpm_fast. Triton has a separate cache.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CHECKS = "checks"  # results of kernel verification
CPU = "cpu"  # machine code of the CPU engine
FOLDERS = (CHECKS, CPU)  # other files are never removed: the directory may be shared


def cache_dir() -> Path:
    """Returns the cache directory, which may not exist yet."""
    if path := os.environ.get("DDPM_FAST_CACHE"):
        return Path(path)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home directory
        return Path(tempfile.gettempdir()) / f"ddpm_fast-{os.getuid()}"
    return home / "ddpm_fast"


def cached_files() -> list[Path]:
    """Returns all cached files, sorted."""
    return sorted(p for folder in FOLDERS for p in (cache_dir() / folder).rglob("*") if p.is_file())


def clear_cache() -> int:
    """Removes all cached files; returns their number."""
    files = cached_files()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)
