"""Ctrl-C and SIGTERM as a wish, granted between two steps, so that what is finished can still be written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stop:
    """Called, it says whether to stop; `signal` is the one that asked."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal, as a shell has it."""
        return 128 + (self.signal or 0)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """While it lasts, the first Ctrl-C or SIGTERM asks; the second does what it always does."""
    stop = Stop()
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        _restore(before)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        _restore(before)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
