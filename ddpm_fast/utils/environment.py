"""Environment information for measurements and bug reports."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__

_PACKAGES = (
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "click",
    "diffusers",
    "matplotlib",
    "pytest-benchmark",
)


def environment() -> dict[str, Any]:
    """Returns versions and hardware as a JSON-serializable dictionary."""
    return {
        "ddpm_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        **{name: _version(name) for name in _PACKAGES},
    }


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpu(index: int) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(index)
    return dict(
        name=p.name,
        capability=f"{p.major}.{p.minor}",
        memory_gib=round(p.total_memory / 2**30, 1),
        processors=p.multi_processor_count,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(
                line.split(":", 1)[1].strip() for line in f if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: of torch's allocator on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as f:  # getrusage would include the parent process
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
