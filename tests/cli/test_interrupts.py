"""Ctrl-C at a random moment of the first two seconds is one line and exit code 130."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("safetensors")
WEIGHTS = Path(__file__).parents[2] / "weights" / "fashion-mnist-32"
# prints a line when the entry point is reached: before that, the interpreter itself is starting
START = "from ddpm_fast.__main__ import run; print('started', flush=True); run()"


def interrupt(after, out):
    """(exit code, stderr) of a run that is interrupted `after` seconds after its entry point."""
    command = [sys.executable, "-c", START, "sample", "--weights", WEIGHTS, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "started\n"
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=120)[1]
        return process.returncode, err
    finally:
        process.kill()


@pytest.mark.parametrize(
    "repetitions",
    [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.acceptance)],
)
def test_interrupt(repetitions, tmp_path):
    moments = random.Random(0)
    for _ in range(repetitions):
        after = moments.uniform(0.001, 2)
        code, err = interrupt(after, tmp_path / "x.png")
        assert code == 130 and err.count("\n") == 1, f"after {after:.3f} s: {code}, {err}"
        assert err.startswith(("ddpm-fast: interrupted", "ddpm-fast: stopped after"))
        assert not [p for p in tmp_path.iterdir() if p.name != "x.png"]
