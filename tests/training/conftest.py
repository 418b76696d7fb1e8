"""Fixtures that run the command line in this process."""

from importlib import import_module

import pytest


@pytest.fixture
def words():
    """Function that splits strings at spaces, for a command; other arguments stay whole."""
    return lambda *arguments: [
        word
        for argument in arguments
        for word in (argument.split() if isinstance(argument, str) else [str(argument)])
    ]


@pytest.fixture
def command(capsys, words):
    """Function that runs `ddpm-fast` and returns exit code, stdout and stderr."""
    main = import_module("ddpm_fast.cli.main").main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(words(*arguments))
        return end.value.code, *capsys.readouterr()

    return call
