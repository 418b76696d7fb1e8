"""Memory of this machine."""

from __future__ import annotations

import os


def physical_memory() -> int:
    """Bytes of memory that this process can have: of the machine, or of its control group if less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max") as f:
            return min(total, int(f.read()))
    except (OSError, ValueError):  # no control group, or "max"
        return total
