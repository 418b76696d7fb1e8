"""Graceful shutdown on SIGINT and SIGTERM: the running step ends, then results are written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ShutdownRequest:
    """Whether a signal has requested a shutdown: call it, or test its truth value.

    Attributes:
        signal: the signal that was received, or None.
    """

    signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    __bool__ = __call__

    @property
    def name(self) -> str:
        """The signal's name, such as "SIGTERM"; "" before one is received."""
        return "" if self.signal is None else self.signal.name

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.signal or 0)


@contextmanager
def graceful_shutdown() -> Iterator[ShutdownRequest]:
    """Records the first SIGINT or SIGTERM; the second has its previous effect.

    Outside the main thread, where Python cannot install signal handlers, nothing is recorded.

    Yields:
        The request, to be polled between steps.
    """
    request = ShutdownRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {}

    def record(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        _restore(previous)

    for number in SIGNALS:
        previous[number] = signal.signal(number, record)
    try:
        yield request
    finally:
        _restore(previous)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
