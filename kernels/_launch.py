"""Launch options of the network's kernels.

Overlapped launches (programmatic dependent launch, sm_90 and newer) hide the launch latency. A
kernel's programs start while the previous kernel finishes, and wait until its writes are visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ._triton import tl, triton

_OVERLAPPED: ContextVar[bool] = ContextVar("overlapped", default=False)


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the previous kernel; called before the first read or write."""
    if PDL:
        # before any loop: Triton may move loads ahead of a wait inside a loop
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@contextmanager
def overlapped(on: bool) -> Iterator[None]:
    """Context manager that turns overlapped launches on or off."""
    token = _OVERLAPPED.set(on)
    try:
        yield
    finally:
        _OVERLAPPED.reset(token)


def launch_options(warps: int, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a launch. Fused multiply-add is on, independent of Triton's default."""
    on = _OVERLAPPED.get()
    return dict(
        PDL=on,
        num_warps=warps,
        enable_fp_fusion=True,
        **more,
        **(dict(launch_pdl=True) if on else {}),
    )
