"""Graceful shutdown on SIGINT and SIGTERM, polled between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ShutdownRequest:
    """True, as a call or as a truth value, after a signal has requested a shutdown.

    Attributes:
        signal: The signal that was received, or None.
    """

    signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    __bool__ = __call__

    @property
    def name(self) -> str:
        """Name of the signal, such as "SIGTERM"; "" before a signal is received."""
        return "" if self.signal is None else self.signal.name

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in shells."""
        return 128 + (self.signal or 0)


@contextmanager
def graceful_shutdown() -> Iterator[ShutdownRequest]:
    """Records the first SIGINT or SIGTERM; for the second, the previous handlers are restored.

    Outside the main thread, Python cannot install signal handlers, and no signal is recorded.

    Yields:
        The request.
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
