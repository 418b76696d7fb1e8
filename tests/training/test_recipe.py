"""Options of long training runs: several averages, losses by quartile of t, late decay, KID."""

import json
import math
import os
import signal
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, load_pretrained
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.training.checkpoints import read_checkpoint
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.flat_weights import as_vector
from ddpm_fast.training.log import read_log
from ddpm_fast.training.monitor import Monitor
from ddpm_fast.training.timestep_sampler import quartile_sums
from ddpm_fast.training.trainer import Trainer

pytest.importorskip("click")
pytest.importorskip("safetensors")
DATA = ImageData(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
SCHEDULE = NoiseSchedule.cosine(100)
DECAYS = (0.3, 0.6, 0.9)
FOLDERS = {"model": "ema", "model-ema-0.6": "ema_0.6", "model-ema-0.9": "ema_0.9"}
V = "--prediction-type v --ddpm-beta-schedule squaredcos-cap-v2"
AVERAGES = "--ema-decays 0.3,0.6,0.9 --lr-decay-start 0.5"
TINY = "--resolution 8 --channels 8,8,16 --layers 1,1,2 --attention 1,2 --head-dim 8"
TINY += " --train-batch-size 4 --lr-warmup-steps 2 --ddpm-num-steps 20"
RESUME = "--resume-from-checkpoint latest"


def trainer(**options):
    torch.manual_seed(0)
    network = dict(sample_size=8, in_channels=1, out_channels=1, norm_groups=4, layers=1)
    unet = UNet(UNetConfig(**network, channels=(8, 16), attention=(False, True)))
    steps = dict(train_batch_size=8, max_train_steps=50, lr_warmup_steps=3, learning_rate=1e-2)
    return Trainer(unet, SCHEDULE, DATA, TrainConfig(**steps | options), "cpu")


@pytest.fixture
def train(command, tmp_path):
    """Runs `ddpm-fast train` on DATA with its reverse as the test split."""
    images = tmp_path / "images.npz"
    np.savez(images, x_train=DATA.images, x_test=DATA.images[::-1])

    def call(*options, out=tmp_path / "run"):
        return command("train --train-data-dir", images, TINY, "--output-dir", out, *options)

    return call


def checkpoint_of(run, step):
    return read_checkpoint(run / f"checkpoint-{step:08d}.safetensors")


def flat(unet):
    return torch.cat([as_vector(p) for p in unet.parameters()])


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(run, key):
    return [line for line in read_log(run / "log.jsonl") if key in line]


# ---- averages


def test_averages_follow_their_recurrence_in_fp64():
    t = trainer(ema_decays=DECAYS, ema_power=2 / 3)
    expected = [torch.zeros_like(t.weights.detach(), dtype=torch.float64) for _ in DECAYS]
    for step in range(12):
        t.step()
        for average, decay in zip(expected, DECAYS, strict=True):
            d = min(decay, 1 - (1 + step) ** (-2 / 3))
            average.mul_(d).add_(t.weights.detach().double(), alpha=1 - d)
    assert list(t.averages) == ["ema", "ema_0.6", "ema_0.9"] and t.averages["ema"] is t.ema
    state = t.state()
    for name, average in zip(t.averages, expected, strict=True):
        assert torch.allclose(state[name].double(), average, rtol=1e-5, atol=1e-6)
        assert torch.equal(flat(t.averages[name]), state[name])  # the parameters are views of it
    assert not torch.equal(state["ema"], state["ema_0.9"])


def test_further_averages_change_nothing_else():
    one, three = trainer(ema_decays=(0.3,)), trainer(ema_decays=DECAYS)
    for t in (one, three):
        for _ in range(4):
            t.step()
    assert all(torch.equal(value, three.state()[name]) for name, value in one.state().items())


def test_a_resume_with_several_averages_is_bit_exact():
    straight, resumed = trainer(ema_decays=DECAYS), trainer(ema_decays=DECAYS)
    for _ in range(3):
        straight.step()
    resumed.load_state({k: v.clone() for k, v in straight.state().items()}, 3)
    for t in (straight, resumed):
        for _ in range(3):
            t.step()
    assert is_same(straight.state(), resumed.state())
    message = r"the averages are ema.*expected ema, ema_0.6, ema_0.9, as in the checkpoint"
    for other in ((0.3,), (0.3, 0.6, 0.9, 0.99), (0.3, 0.6, 0.8), (0.6, 0.3, 0.9)):
        with pytest.raises(ValueError, match=message):
            trainer(ema_decays=other).load_state(straight.state(), 6)
    # the main average's decay may change
    trainer(ema_decays=(0.5, 0.6, 0.9)).load_state(straight.state(), 6)


# ---- losses by quartile


def test_quartile_sums():
    t, losses = torch.tensor([0, 24, 25, 74, 75, 99]), torch.tensor([1.0, 2, 4, 8, 16, 32])
    assert quartile_sums(t, losses, 100).tolist() == [3, 4, 8, 48, 2, 1, 1, 2]
    sums = quartile_sums(torch.tensor([0, 1, 2]), losses[:3], 3)  # T = 3: none in the last quarter
    assert sums.tolist() == [1, 2, 4, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("sampling", ["uniform", "loss_aware"])
def test_losses_by_quartile_are_those_of_the_images(monkeypatch, sampling):
    t = trainer(
        train_batch_size=4,
        gradient_accumulation_steps=2,
        prediction_type="v",
        timestep_sampling=sampling,
    )
    recorded, losses = [], Trainer._losses

    def recording(self, model, inputs):
        out = losses(self, model, inputs)
        recorded.append((inputs.t, out.detach().double(), self.done))
        return out * math.nan if self.done == 2 else out  # a skipped step is not in the means

    monkeypatch.setattr(Trainer, "_losses", recording)
    for _ in range(4):
        t.step()
    means = t.means()
    at, each = (torch.cat([r[i] for r in recorded if r[2] != 2]) for i in (0, 1))
    for quartile in range(4):
        expected = float(each[at // 25 == quartile].mean())
        assert means[f"loss_q{quartile}"] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert means["skipped"] == 1
    assert all(math.isnan(v) for k, v in t.means().items() if k != "skipped")


# ---- the learning rate


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_late_decay(name):
    steps = dict(lr_scheduler=name, lr_warmup_steps=10, max_train_steps=100)
    config = TrainConfig(**steps, learning_rate=2.0, lr_decay_start=0.6)
    assert [config.rate(step) for step in (9, 10, 37, 59, 60)] == [2.0] * 5
    for step in (61, 80, 99, 100, 120):
        left = max(0, (100 - step) / 40)
        expected = 2 * left if name == "linear" else 1 + math.cos(math.pi * (1 - left))
        assert config.rate(step) == pytest.approx(expected, abs=1e-12)
    early, default = TrainConfig(**steps, lr_decay_start=0.05), TrainConfig(**steps)
    assert all(early.rate(step) == default.rate(step) for step in range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr_decay_start=1.0), "lr_decay_start = 1.0"),
        (dict(lr_decay_start=0.5, lr_scheduler="constant"), "never decays"),
        (dict(ema_decays=()), r"ema_decays = \(\)"),
        (dict(ema_decays=(0.9, 0.9)), "expected different numbers"),
        (dict(ema_decays=(0.9, 1.0)), "from 0 to below 1"),
        (dict(ema_decays=0.9), "ema_decays = 0.9"),
    ],
    ids=str,
)
def test_invalid_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


# ---- the command


def ddim(unet, x, alpha_bar):
    """DDIM with v-prediction: x_0 = sqrt(bar) x - sqrt(1 - bar) v (Salimans & Ho 2022)."""
    for i in range(len(alpha_bar) - 1, -1, -1):
        bar = alpha_bar[i]
        x_0 = (bar.sqrt() * x - (1 - bar).sqrt() * unet(x, i)).clamp(-1, 1)
        eps = (x - bar.sqrt() * x_0) / (1 - bar).sqrt()
        previous = alpha_bar[i - 1] if i else torch.ones(())
        x = previous.sqrt() * x_0 + (1 - previous).sqrt() * eps
    return x


def test_v_prediction_with_the_cosine_schedule_from_training_to_scores(train, command, tmp_path):
    run = tmp_path / "run"
    intervals = "--max-train-steps 12 --logging-steps 4 --save-images-epochs 1"
    code, out, err = train(V, AVERAGES, intervals)
    assert code == 0, err
    state, schedule = checkpoint_of(run, 12).state, NoiseSchedule.cosine(20)
    for folder, name in FOLDERS.items():
        c = load_pretrained(run / folder)
        assert torch.equal(flat(c.unet), state[name])
        assert c.prediction == "v" and np.array_equal(c.schedule.beta, schedule.beta)
        assert c.unet.config.layers == (1, 1, 2) and c.unet.config.attention == (False, True, True)
    saved = json.loads((run / "model/scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    evaluated = log_of(run, "ema_loss")
    assert [line["step"] for line in evaluated] == [5, 10, 12]
    keys = {"ema_loss", "ema_0.6_loss", "ema_0.9_loss", "raw_loss"}
    assert all(line.keys() >= keys for line in evaluated) and "ema_0.9 " in out
    for line in log_of(run, "lr"):
        assert len([k for k in line if k.startswith("loss_q")]) == 4
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        unet = load_pretrained(run / "model").unet.double()
        expected = ddim(unet, x.double(), torch.from_numpy(schedule.alpha_bar.copy()))
    for engine in ("reference", "auto"):
        sampler = Sampler.from_pretrained(run / "model", "cpu", engine=engine)
        drawn = sampler.sample(2, solver="ddim", steps=20, start=(x, 19), output="float")
        assert torch.allclose(drawn.double(), expected, atol=2e-4)
    pytest.importorskip("efficientnet_lite_pytorch")
    images = ("--data-dir", tmp_path / "images.npz", "--images 8 --steps 5 --json")
    code, out, err = command("eval --weights", run / "model", *images)
    assert code == 0 and math.isfinite(json.loads(out)["kid"][0]), err


def test_an_interrupted_run_with_all_options_is_bit_exact(train, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    options = f"{V} {AVERAGES} --max-train-steps 14 --logging-steps 4 --checkpointing-steps 5"
    options += " --save-images-epochs 1 --save-model-epochs 1"
    scored = f"{options} --eval-images-every 20 --eval-images 6"
    runs = [tmp_path / name for name in ("straight", "stopped", "unscored")]
    straight, stopped, unscored = runs
    assert train(scored, out=straight)[0] == 0
    step = Trainer.step

    def interrupted(self):
        step(self)
        if self.done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train(scored, out=stopped)[0] == 143
    code, _, err = train(scored, RESUME, "--ema-decays 0.3,0.6", out=stopped)
    assert code == 2 and "the averages are ema, ema_0.6; expected ema, ema_0.6, ema_0.9" in err
    code, out, _ = train(scored, RESUME, out=stopped)
    assert code == 0 and "changed since" not in out
    assert train(options, out=unscored)[0] == 0
    states = [checkpoint_of(run, 14).state for run in runs]
    assert is_same(states[0], states[1]) and is_same(states[0], states[2])
    for key in ("loss", "loss_q2", "ema_0.6_loss", "ema_kid"):
        lines = [[line[key] for line in log_of(run, key)] for run in (straight, stopped)]
        assert lines[0] == lines[1] and lines[0], key
    assert [line["step"] for line in log_of(straight, "ema_kid")] == [5, 10, 14]
    for folder in FOLDERS:
        file = f"{folder}/unet/diffusion_pytorch_model.safetensors"
        assert (straight / file).read_bytes() == (stopped / file).read_bytes()


def test_logged_kid_is_that_of_the_saved_model(train, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    from ddpm_fast.evaluation.metrics import Features, kid

    run = tmp_path / "run"
    scored = "--eval-images-every 1000000 --eval-images 12 --ema-decays 0.3,0.9"
    held_out = ("--max-train-steps 3 --validation-data-dir", tmp_path / "images.npz")
    code, out, err = train(V, scored, *held_out)
    assert code == 0 and "KID of 12 images: ema " in out, err
    (line,) = log_of(run, "ema_kid")
    extract, images = Features(), torch.from_numpy(np.ascontiguousarray(DATA.images[::-1]))
    real = extract(images[[i * 20 // 12 for i in range(12)]])
    for folder, name in (("model", "ema"), ("model-ema-0.9", "ema_0.9")):
        sampler = Sampler.from_pretrained(run / folder, "cpu", engine="auto")
        expected = kid(real, extract(sampler.sample(12, solver="ddim", steps=20)))
        logged = line[f"{name}_kid"], line[f"{name}_kid_deviation"]
        assert logged == pytest.approx(expected, rel=1e-6)
    assert line["held_out"] and line["eval_images"] == 12


def test_a_signal_ends_an_evaluation(train, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    yielded, steps, run = [], Sampler.steps, tmp_path / "run"

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        for done in steps(self, *arguments, **options):
            yielded.append(done)
            yield done

    monkeypatch.setattr(Sampler, "steps", interrupted)
    code, out, _ = train("--max-train-steps 5 --eval-images-every 8")
    assert code == 130 and "SIGINT: step 2" in out
    assert len(yielded) == 1 and not log_of(run, "ema_kid")
    assert checkpoint_of(run, 2).header["step"] == 2


def test_speed_counts_the_time_of_steps_only(train, tmp_path, monkeypatch):
    """Regression: the time of checkpoints, grids and validation was part of the next interval."""
    pytest.importorskip("efficientnet_lite_pytorch")
    seconds, run = [0.0], import_module("ddpm_fast.training.run")
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def taking(duration, method):
        def timed(self, *arguments):
            seconds[0] += duration
            return method(self, *arguments)

        return timed

    monkeypatch.setattr(Trainer, "step", taking(2, Trainer.step))
    for name in ("save_checkpoint", "save_model"):
        monkeypatch.setattr(run.TrainingRun, name, taking(100, getattr(run.TrainingRun, name)))
    for name in ("validate", "draw", "evaluate"):
        monkeypatch.setattr(Monitor, name, taking(100, getattr(Monitor, name)))
    intervals = "--logging-steps 3 --checkpointing-steps 2 --save-images-epochs 1"
    intervals += " --save-model-epochs 1 --eval-images-every 16 --eval-images 4"
    assert train(intervals, "--max-train-steps 10")[0] == 0
    assert [line["images_per_second"] for line in log_of(tmp_path / "run", "lr")] == [2.0] * 4
    assert seconds[0] > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 1,2", "--layers 1,2; expected one count of at least 1, or 3"),
        ("--layers 0", "--layers 0"),
        ("--layers 1,x,2", "such as 1,1,2"),
        ("--ema-decays 0.9,x", "--ema-decays 0.9,x; expected numbers"),
        ("--ema-decays 0.9 --ema-max-decay 0.9", "remove --ema-max-decay"),
        ("--lr-decay-start 0.5 --lr-scheduler constant", "never decays"),
        ("--eval-images-every 8 --eval-images 3", "--eval-images"),
    ],
)
def test_invalid_options_are_one_line(train, tmp_path, options, message):
    code, _, err = train("--max-train-steps 1", options)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "torchmetrics"])
def test_a_missing_extra_is_one_line_before_the_run(train, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = train("--max-train-steps 1 --eval-images-every 8")
    assert code == 2 and "pip install 'ddpm-fast[metrics]'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_name_of_one_decay_in_diffusers(train, tmp_path):
    assert train("--max_train_steps 1 --ema_max_decay 0.5")[0] == 0
    assert checkpoint_of(tmp_path / "run", 1).header["settings"]["ema_decays"] == [0.5]


def test_partial_files_of_a_kill_are_removed_but_not_the_only_model(train, tmp_path, monkeypatch):
    run, options = tmp_path / "run", f"--ema-decays 0.3,0.9 --max-train-steps 1 {RESUME}"
    assert train(options)[0] == 0
    (run / ".model-abcdefgh").mkdir()
    (run / "model-ema-0.9").rename(run / ".model-ema-0.9-abcdefgh-old")
    training_run = import_module("ddpm_fast.training.run").TrainingRun
    hidden, save = [], training_run.save_model

    def saving(self):
        hidden.extend(path.name for path in run.glob(".model*"))
        save(self)

    monkeypatch.setattr(training_run, "save_model", saving)
    assert train(options)[0] == 0
    assert hidden == [".model-ema-0.9-abcdefgh-old"]
