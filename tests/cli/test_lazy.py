"""The list of commands and the version are printed without importing torch."""

import subprocess
import sys
from importlib import import_module

import pytest

click = pytest.importorskip("click")
main = import_module("ddpm_fast.cli.main")


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_torch_is_not_imported(flag):
    code = f"""
import sys
from ddpm_fast.cli.main import main
try:
    main(["{flag}"])
finally:
    assert not {{"torch", "numpy", "triton"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = ["ddpm-fast", *main._COMMANDS] if flag == "--help" else [main.__version__]
    assert all(name in done.stdout for name in expected)


@pytest.mark.parametrize("name", main._COMMANDS)
def test_the_list_says_what_the_command_says(name):
    context = click.Context(main.cli, **main._SETTINGS)
    command = main.cli.get_command(context, name)
    assert command.name == name
    first = command.help.strip().splitlines()[0]
    if name not in ("bench", "train"):  # their docstrings are phrased elsewhere
        assert first.startswith(main._COMMANDS[name].help.rstrip("."))


def test_underscores_are_accepted():
    context = click.Context(main.cli, **main._SETTINGS)
    assert main.cli.resolve_command(context, ["collect_env"])[0] == "collect-env"
