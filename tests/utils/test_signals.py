import os
import signal
import threading

import pytest

from ddpm_fast.utils.signals import graceful_shutdown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_recorded_and_the_second_has_its_previous_effect(number):
    before = signal.getsignal(number)
    with graceful_shutdown() as shutdown:
        assert not shutdown() and not shutdown and shutdown.name == ""
        os.kill(os.getpid(), number)
        assert shutdown() and shutdown and shutdown.exit_code == 128 + number
        assert shutdown.signal is number and shutdown.name == number.name
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_no_handler_is_installed():
    before, results = signal.getsignal(signal.SIGINT), []

    def run():
        with graceful_shutdown() as shutdown:
            results.append((shutdown(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [(False, before)]
