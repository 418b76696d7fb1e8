"""First line, progress bar, time estimates and warnings of a run."""

import io
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, UNet, UNetConfig
from ddpm_fast.data import datasets
from ddpm_fast.diffusion import losses, prediction
from ddpm_fast.training import config as training_config
from ddpm_fast.training.config import TrainConfig, config_warnings
from ddpm_fast.training.progress import Progress, duration, faster_choices
from ddpm_fast.training.run import Every, TrainingRun
from ddpm_fast.training.trainer import Trainer

pytest.importorskip("click")
DATA = datasets.ImageData(np.zeros((20, 8, 8, 1), np.uint8))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trainer(channels=(8, 16), layers=1, **options):
    network = dict(sample_size=8, in_channels=1, out_channels=1, norm_groups=4, layers=layers)
    network |= dict(channels=channels, attention=(False,) * len(channels))
    config = TrainConfig(
        **dict(train_batch_size=8, max_train_steps=10, lr_warmup_steps=0) | options
    )
    return Trainer(UNet(UNetConfig(**network)), NoiseSchedule.linear(), DATA, config, "cpu")


def test_the_first_line_comes_before_torch():
    """Regression: the first line appeared only after seconds of imports and loading."""
    code = """
import sys
import click
echo, lines = click.echo, []
def recorded(message=None, **options):
    lines.append((message, "torch" in sys.modules or "numpy" in sys.modules))
    echo(message, **options)
click.echo = recorded
from ddpm_fast.cli.main import main
try:
    main(["train", "--train_data_dir", "nowhere", "--output_dir", "run"])
except SystemExit as end:
    assert end.code == 2
assert lines[0] == ("training in run: loading PyTorch and the images", False), lines
assert "nowhere does not exist" in lines[-1][0]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_choices_are_those_of_the_library():
    options = import_module("ddpm_fast.cli.train_options")
    for names, expected in (
        (options.FITS, datasets.FITS),
        (options.LOSSES, losses.LOSSES),
        (options.LR_SCHEDULERS, training_config.LR_SCHEDULERS),
        (options.PRECISIONS, training_config.PRECISIONS),
        (options.TIMESTEP_SAMPLING, training_config.TIMESTEP_SAMPLING),
    ):
        assert tuple(name.replace("-", "_") for name in names) == expected
    assert options.PREDICTIONS == prediction.PREDICTIONS


def test_the_bar_of_a_run_on_a_terminal(tmp_path):
    terminal, lines = Terminal(), []
    every = Every(log=5, samples=5, validation=5)
    with TrainingRun(
        tmp_path / "run", trainer(), every, log=lines.append, progress=terminal
    ) as run:
        run.train()
    bar = terminal.getvalue().split("\r")[-1]
    assert "10/10 steps" in bar and "loss " in bar and "images/s, 0 s left" in bar
    order = [line.split(":")[1].split(" ")[1] for line in lines if ": " in line]
    assert order == ["loss", "computing", "loss", "drawing"] * 2  # announced when it starts
    quiet = io.StringIO()
    Progress(trainer(), lines.append, quiet).update(1.0, 1.0)
    assert quiet.getvalue() == ""


def test_speed_is_that_of_the_steps_and_the_estimate_includes_the_rest():
    """A step of 10 s, four of 2 s (8 images each), and grids of 10 s: 4.5 s per step."""
    terminal, lines = Terminal(), []
    t = trainer(max_train_steps=1000)
    progress = Progress(t, lines.append, terminal)
    times = ((10, 10), (12, 12), (14, 24), (16, 26), (18, 28))
    for t.done, (training, elapsed) in enumerate(times, start=1):
        progress.update(training, elapsed)
    assert "4 images/s, 75 min left" in terminal.getvalue().split("\r")[-1]
    assert lines[0] == "about 89 min for 996 more steps (4 images/s)"  # after 4 steps
    assert lines[1].startswith("to train faster: fewer epochs (--num_epochs)")
    progress.update(20, 30)
    assert len(lines) == 2


def test_a_short_run_has_no_estimate():
    lines, t = [], trainer(max_train_steps=20)
    progress = Progress(t, lines.append)
    for t.done in range(1, 11):
        progress.update(2.0 * t.done, 2.0 * t.done)
    assert not lines


def test_hints_that_shorten_a_run(monkeypatch):
    progress = import_module("ddpm_fast.training.progress")
    smaller = "a smaller network (--channels 32,64,96 --layers 1)"
    fewer, bf16 = "fewer epochs (--num_epochs)", "bf16 (--mixed_precision bf16)"
    for is_native in (False, True):
        monkeypatch.setattr(progress, "is_native", lambda dtype, value=is_native: value)
        assert faster_choices(trainer((64, 128, 128), 2)) == [smaller, fewer] + [bf16] * is_native
        assert faster_choices(trainer((32, 64, 96))) == [fewer] + [bf16] * is_native
        assert faster_choices(trainer(mixed_precision="bf16")) == [fewer]


def test_durations():
    texts = {0: "0 s", 40: "40 s", 89: "89 s", 600: "10 min", 5300: "88 min", 12600: "3.5 h"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(lr_warmup_steps=500, max_train_steps=375), "to 7.5e-05; set --lr_warmup_steps 37"),
        (dict(lr_warmup_steps=500, max_train_steps=375, lr_scheduler="constant"), None),
        (dict(lr_warmup_steps=30, max_train_steps=300), None),
        (
            dict(lr_warmup_steps=200, max_train_steps=300, lr_decay_start=0.5),
            "lr_decay_start is 0.5, step 150 of 300",
        ),
        (
            dict(train_batch_size=400, max_train_steps=1000),
            "train_batch_size is 400 with 300 images",
        ),
    ],
    ids=str,
)
def test_warnings(options, expected):
    lines = config_warnings(TrainConfig(**options), 300)
    assert len(lines) == (expected is not None) and all(expected in line for line in lines)


def test_a_batch_much_larger_than_the_data():
    """Regression: one step of 100,000 images ignored every signal until SIGKILL."""
    with pytest.raises(ValueError, match="train_batch_size is 100000 with 20 images"):
        trainer(train_batch_size=100_000)
    assert torch.is_tensor(trainer(train_batch_size=64).weights)
