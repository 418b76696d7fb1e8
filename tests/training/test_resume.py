"""Resuming without options, errors that name options, and runs that diverge."""

import hashlib
import json

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, UNet, UNetConfig
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.training.checkpoints import checkpoints, read_checkpoint, step_of
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.run import Every, TrainingRun
from ddpm_fast.training.trainer import Trainer

pytest.importorskip("click")
pytest.importorskip("safetensors")
PIXELS = np.random.default_rng(0).integers(0, 256, (22, 8, 8, 1), dtype=np.uint8)
TINY = "--resolution 8 --channels 8,16 --layers 1 --head_dim 8 --train_batch_size 4"
TINY += " --lr_warmup_steps 2"
RESUME = "--resume_from_checkpoint latest"


@pytest.fixture
def train(command, tmp_path, monkeypatch):
    """Runs `ddpm-fast train` in tmp_path."""
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=PIXELS, labels=np.arange(22) % 3)
    return lambda *options: command("train", *options)


def state(run, step):
    return read_checkpoint(run / f"checkpoint-{step:08d}.safetensors").state


def is_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def error_of(result):
    code, _, err = result
    assert code == 2 and err.startswith("ddpm-fast: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--dropout 0.2 --random_flip --seed 5",
        "--prediction_type v --ddpm_beta_schedule squaredcos_cap_v2 --rescale_betas_zero_snr"
        " --ema_max_decay 0.5",
        "--loss_type hybrid --ddpm_num_steps 40 --no-class-labels",
    ],
)
def test_resumes_without_repeating_any_option(train, tmp_path, more, monkeypatch):
    """The options come from the checkpoint, in another working directory too."""
    options = f"--train_data_dir images.npz {TINY} --save_images_epochs 0 {more}"
    assert train(options, "--output_dir straight --max_train_steps 6")[0] == 0
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: (step(self), self.done == 3 and 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train(options, "--output_dir killed --max_train_steps 6 --checkpointing_steps 2")
    monkeypatch.setattr(Trainer, "step", step)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = train("--output_dir ../killed", RESUME)
    assert code == 0, err
    assert "options from the checkpoint: " in out and "--channels 8,16" in out
    assert is_equal(state(tmp_path / "straight", 6), state(tmp_path / "killed", 6))
    code, out, _ = train("--output_dir ../killed", RESUME)
    assert code == 0 and "all 6 steps are done" in out
    code, out, _ = train("--output_dir ../killed --num_epochs 2", RESUME)  # replaces the steps
    assert code == 0 and "all steps done: step 11" in out


def test_an_error_names_the_options(train):
    assert train("--train_data_dir images.npz --output_dir run --max_train_steps 1", TINY)[0] == 0
    np.savez("fewer.npz", images=PIXELS[:-1], labels=np.arange(21) % 3)
    np.savez("other.npz", images=PIXELS[::-1], labels=np.arange(22) % 3)
    np.savez("classes.npz", images=PIXELS, labels=np.arange(22) % 4)
    resume = ("--output_dir run", RESUME)
    for option, message in (
        ("--channels 8,24", "--channels 8,16 in the checkpoint, 8,24 now"),
        ("--layers 1,2", "--layers 1 in the checkpoint, 1,2 now"),
        ("--attention 0,1", "--attention 1 in the checkpoint, 0,1 now"),
        ("--dropout 0.5", "--dropout 0.0 in the checkpoint, 0.5 now"),
        ("--resolution 16", "--resolution 8 in the checkpoint, 16 now"),
        ("--loss_type vlb", "--loss_type simple in the checkpoint, vlb now"),
        ("--seed 3 --random_flip", "--random_flip False in the checkpoint, True now; --seed 0"),
        ("--ddpm_num_steps 9", "--ddpm_num_steps 1000 in the checkpoint, 9 now"),
        ("--train_data_dir fewer.npz", "22 images in the checkpoint, 21 now"),
        ("--train_data_dir other.npz", "22 images as before, but other pixels"),
        ("--train_data_dir classes.npz", "3 classes in the checkpoint, 4 now"),
    ):
        assert message in error_of(train(*resume, option)), option


# ---- divergence


def test_divergence_ends_the_run_and_keeps_the_last_finite_state(train, tmp_path):
    """Regression: exit code 0, finite checkpoints and model/ overwritten, NaN after a resume."""
    common = f"--train_data_dir images.npz {TINY} --lr_scheduler constant --checkpointing_steps 1"
    common += " --logging_steps 1 --save_model_epochs 1"
    assert train(common, "--output_dir run --max_train_steps 4")[0] == 0
    run = tmp_path / "run"
    files = [*checkpoints(run), *(p for p in (run / "model").rglob("*") if p.is_file())]
    before = [hashlib.sha256(p.read_bytes()).digest() for p in files]
    diverging = "--learning_rate 1e30 --max_train_steps 40 --save_images_epochs 1"
    code, _, err = train("--output_dir run", diverging, RESUME)
    assert code == 1 and err.count("\n") == 1
    assert "training diverged: gradients are NaN or Inf since step 6 (now step 10)" in err
    assert "checkpoint-00000004.safetensors; resume with" in err
    assert [hashlib.sha256(p.read_bytes()).digest() for p in files] == before
    assert [p.name[-16:] for p in checkpoints(run)] == ["0003.safetensors", "0004.safetensors"]

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (run / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    again = "--learning_rate 1e-4 --max_train_steps 6"
    assert train("--output_dir run", again, RESUME)[0] == 0
    assert train(common, "--output_dir straight --max_train_steps 6")[0] == 0
    assert is_equal(state(run, 6), state(tmp_path / "straight", 6))


def test_divergence_in_the_last_steps_is_an_error(train, tmp_path):
    options = f"--train_data_dir images.npz {TINY} --lr_scheduler constant --learning_rate 1e30"
    code, _, err = train(options, "--output_dir run --max_train_steps 3 --checkpointing_steps 1")
    assert code == 1 and "training diverged: gradients are NaN or Inf since step 2" in err
    assert "no checkpoint was written; start again" in err
    assert not checkpoints(tmp_path / "run") and not (tmp_path / "run" / "model").exists()


def trainer(**options):
    network = dict(sample_size=8, in_channels=1, out_channels=1, norm_groups=4, layers=1)
    unet = UNet(UNetConfig(**network, channels=(8, 16), attention=(False, False)))
    options = {"train_batch_size": 8, "lr_warmup_steps": 0, **options}
    return Trainer(unet, NoiseSchedule.linear(), ImageData(PIXELS), TrainConfig(**options), "cpu")


def test_skipped_steps_of_loss_scaling_are_not_divergence(tmp_path):
    """The scale starts 2^24 above its default; checkpoints wait for a step that is not skipped."""
    t = trainer(mixed_precision="fp16", max_train_steps=60)
    t.scaler.update(2.0**40)
    with TrainingRun(tmp_path / "run", t, Every(log=60, checkpoint=2), 99, log=str) as run:
        assert run.train().reason == "all steps done"
    (line,) = [json.loads(s) for s in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 5 < line["skipped"] < 50
    assert step_of(checkpoints(tmp_path / "run")[0]) == line["skipped"] + 1


@pytest.mark.parametrize(("precision", "limit"), [("no", 5), ("fp16", 50)])
def test_limit_of_consecutive_skipped_steps(tmp_path, monkeypatch, precision, limit):
    losses = Trainer._losses
    monkeypatch.setattr(
        Trainer, "_losses", lambda self, *a: losses(self, *a) * (np.nan if self.done >= 3 else 1)
    )
    t = trainer(mixed_precision=precision, max_train_steps=200)
    t.scaler.update(1.0) if t.scaler.is_enabled() else None
    message = rf"since step 4 \(now step {3 + limit}\)"
    with (
        TrainingRun(tmp_path / "run", t, Every(log=1), log=str) as run,
        pytest.raises(RuntimeError, match=message),
    ):
        run.train()
