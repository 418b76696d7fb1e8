"""Launch options of the network's kernels.

Overlapped (programmatic dependent launch, sm_90 and newer), a kernel's programs come onto the processors while those of the launch
before it are still finishing, and wait there until everything it wrote is visible: what remains of a launch's cost is hidden.
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
    """The first thing a kernel does, before it reads or writes anything."""
    if PDL:
        # before any loop: Triton may move loads above a wait that stands in one
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@contextmanager
def overlapped(on: bool) -> Iterator[None]:
    """Context in which launches are overlapped, or are not."""
    token = _OVERLAPPED.set(on)
    try:
        yield
    finally:
        _OVERLAPPED.reset(token)


def launch_options(warps: int, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a launch. Multiplications and additions fuse here, whatever this release of Triton does by default."""
    on = _OVERLAPPED.get()
    return dict(
        PDL=on,
        num_warps=warps,
        enable_fp_fusion=True,
        **more,
        **(dict(launch_pdl=True) if on else {}),
    )
