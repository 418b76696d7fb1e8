"""Memory that is available for images."""

from __future__ import annotations

from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = (  # of cgroup v2 and v1: limit, usage, and the page cache within it, which is reclaimable
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int | None:
    """Returns the bytes that can be allocated on a device; None if unknown.

    On the CPU, this is the least of MemAvailable in /proc/meminfo and the remaining memory of this
    process's control groups, without swap. On a GPU, it is the free memory plus PyTorch's unused
    blocks.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [*_of_system(Path("/proc/meminfo")), *_of_groups(Path("/proc/self/cgroup"), CGROUPS)]
    return max(0, min(known)) if known else None


def check_fits(images: int, size: int, device: torch.device, instead: str) -> None:
    """Raises if images do not fit in memory.

    Args:
        images: Number of images.
        size: Bytes per image.
        device: Device of the images.
        instead: End of the message: what to do instead.

    Raises:
        ValueError: The images need more than `available_memory`.
    """
    available = available_memory(device)
    if available is not None and images * size > available:
        raise ValueError(
            f"{images} images take {images * size / 2**30:,.1f} GiB and {available / 2**30:,.1f} "
            f"GiB of memory are available on {device}; {instead}"
        )


def _of_system(meminfo: Path) -> list[int]:
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return [int(fields["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return []  # not Linux


def _of_groups(membership: Path, root: Path) -> list[int]:
    """Remaining memory of the process's control groups and of their parents."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    groups = []
    for _, controllers, path in lines:
        if controllers == "":
            base = root
        elif "memory" in controllers.split(","):
            base = root / "memory"
        else:
            continue
        group = base / path.lstrip("/")
        groups += [group, *(p for p in group.parents if p.is_relative_to(base))]
    return [
        left for group in groups for names in LIMITS if (left := _left(group, *names)) is not None
    ]


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        stat = {}
    return most - used + int(stat.get(reclaimable, 0))
