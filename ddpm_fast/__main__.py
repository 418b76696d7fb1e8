"""Entry point of `ddpm-fast` and of `python -m ddpm_fast`."""

import signal
from typing import NoReturn

from .cli.interrupts import exit_at_once


def run() -> NoReturn:
    """Runs the command line. Ctrl-C during imports or at exit prints no traceback."""
    signal.signal(signal.SIGINT, exit_at_once)
    from .cli.main import main  # after the handler is installed, because it imports click

    try:
        main()
    finally:
        signal.signal(signal.SIGINT, exit_at_once)


if __name__ == "__main__":
    run()
