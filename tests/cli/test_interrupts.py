"""Signals: Ctrl-C during the first two seconds, and exit codes of stopped runs."""

import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("safetensors")
WEIGHTS = Path(__file__).parents[2] / "weights" / "fashion-mnist-32"
# prints a line when the entry point is reached: before that, the interpreter is starting
START = "from ddpm_fast.__main__ import run; print('started', flush=True); run()"


def interrupt(after, out):
    """Returns (exit code, stderr) of a run that is interrupted `after` seconds after its start."""
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
    generator = random.Random(0)
    for _ in range(repetitions):
        after = generator.uniform(0.001, 2)
        code, err = interrupt(after, tmp_path / "x.png")
        assert code == 130 and err.count("\n") == 1, f"after {after:.3f} s: {code}, {err}"
        assert err.startswith(("ddpm-fast: interrupted", "ddpm-fast: stopped after"))
        assert not [p for p in tmp_path.iterdir() if p.name != "x.png"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_and_sample_exit_with_128_plus_the_signal(number, tmp_path, monkeypatch, capsys):
    main = import_module("ddpm_fast.cli.main").main
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    train = f"train --train-data-dir {tmp_path / 'images.npz'} --output-dir {tmp_path / 'run'} "
    train += "--resolution 8 --channels 8 --layers 1 --head-dim 8 --train-batch-size 2"
    weights = tmp_path / "run" / "model"
    sample = f"sample --weights {weights} --images 2 --steps 2 --out {tmp_path / 'x.png'} "
    sample += "--engine reference"
    for line, name in ((train, "training.trainer.Trainer"), (sample, "engines.eager.EagerEngine")):
        module, _, engine = name.rpartition(".")
        step = getattr(import_module(f"ddpm_fast.{module}"), engine).step

        def interrupted(*arguments, step=step):
            os.kill(os.getpid(), number)
            return step(*arguments)

        monkeypatch.setattr(f"ddpm_fast.{name}.step", interrupted)
        with pytest.raises(SystemExit) as end:
            main(line.split())
        assert end.value.code == 128 + number, capsys.readouterr().err
