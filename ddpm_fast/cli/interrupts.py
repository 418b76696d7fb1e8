"""Ctrl-C during imports: one line on stderr and exit code 130."""

from __future__ import annotations

import os
import signal
import threading
from importlib import import_module
from types import FrameType, ModuleType

INTERRUPTED = 130  # exit code: 128 + SIGINT


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler that ends the process.

    An extension module that is being initialised can suppress a KeyboardInterrupt or convert it to
    another exception. During imports there is nothing to clean up.
    """
    os.write(2, b"ddpm-fast: interrupted\n")
    os._exit(INTERRUPTED)


def import_interruptibly(name: str, package: str | None = None) -> ModuleType:
    """Imports a module. Until it returns, Ctrl-C ends the process."""
    replaced = threading.current_thread() is threading.main_thread() and signal.getsignal(
        signal.SIGINT
    ) in (signal.default_int_handler, exit_at_once)
    if replaced:
        signal.signal(signal.SIGINT, exit_at_once)
    try:
        return import_module(name, package)
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
