"""What a long training run needs: several averages, losses by quartile of t, a late decay of the rate, KID on the way."""

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
from ddpm_fast.training.log import read_log
from ddpm_fast.training.monitor import Monitor
from ddpm_fast.training.timestep_sampler import quartile_sums
from ddpm_fast.training.trainer import Trainer

pytest.importorskip("click")
pytest.importorskip("safetensors")
cli = import_module("ddpm_fast.cli.main")
DATA = ImageData(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
SCHEDULE = NoiseSchedule.cosine(100)
DECAYS = (0.3, 0.6, 0.9)
V = ("--prediction-type", "v", "--ddpm-beta-schedule", "squaredcos-cap-v2")
AVERAGES = ("--ema-decays", "0.3,0.6,0.9", "--lr-decay-start", 0.5)
TINY = (
    "--resolution",
    8,
    "--channels",
    "8,8,16",
    "--layers",
    "1,1,2",
    "--attention",
    "1,2",
    "--head-dim",
    8,
)
TINY += ("--train-batch-size", 4, "--lr-warmup-steps", 2, "--ddpm-num-steps", 20)


def trainer(**options):
    torch.manual_seed(0)
    config = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        layers=1,
        attention=(False, True),
    )
    options = {
        "train_batch_size": 8,
        "max_train_steps": 50,
        "lr_warmup_steps": 3,
        "learning_rate": 1e-2,
        **options,
    }
    return Trainer(
        UNet(UNetConfig(**config, norm_groups=4)), SCHEDULE, DATA, TrainConfig(**options), "cpu"
    )


@pytest.fixture
def call(capsys, tmp_path):
    np.savez(tmp_path / "images.npz", x_train=DATA.images, x_test=DATA.images[::-1])

    def call(command, *arguments):
        given = ("--train-data-dir", tmp_path / "images.npz", *TINY) if command == "train" else ()
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in (command, *given, *arguments)])
        return end.value.code, *capsys.readouterr()

    return call


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
        vector = torch.cat(
            [
                p.permute(0, 2, 3, 1).flatten() if p.ndim == 4 else p.flatten()
                for p in t.averages[name].parameters()
            ]
        )
        assert torch.equal(vector, state[name])  # the network reads the vector
    assert not torch.equal(state["ema"], state["ema_0.9"])


def test_one_average_more_changes_nothing_else():
    one, three = trainer(ema_decays=(0.3,)), trainer(ema_decays=DECAYS)
    for t in (one, three):
        for _ in range(4):
            t.step()
    assert all(torch.equal(value, three.state()[name]) for name, value in one.state().items())


def test_state_with_several_averages_goes_on_to_the_bit():
    straight, resumed = trainer(ema_decays=DECAYS), trainer(ema_decays=DECAYS)
    for _ in range(3):
        straight.step()
    resumed.load_state({k: v.clone() for k, v in straight.state().items()}, 3)
    for t in (straight, resumed):
        for _ in range(3):
            t.step()
    expected, results = straight.state(), resumed.state()
    assert expected.keys() == results.keys() and all(
        torch.equal(expected[k], results[k]) for k in expected
    )
    for other in ((0.3,), (0.3, 0.6, 0.9, 0.99), (0.3, 0.6, 0.8), (0.6, 0.3, 0.9)):
        with pytest.raises(
            ValueError,
            match=r"the averages are ema.*expected ema, ema_0.6, ema_0.9, as in the checkpoint",
        ):
            trainer(ema_decays=other).load_state(straight.state(), 6)
    trainer(ema_decays=(0.5, 0.6, 0.9)).load_state(
        straight.state(), 6
    )  # the main average's decay may change


# ---- losses by quartile


def test_quartile_sums():
    t, losses = torch.tensor([0, 24, 25, 74, 75, 99]), torch.tensor([1.0, 2, 4, 8, 16, 32])
    assert quartile_sums(t, losses, 100).tolist() == [3, 4, 8, 48, 2, 1, 1, 2]
    assert quartile_sums(torch.tensor([0, 1, 2]), losses[:3], 3).tolist() == [
        1,
        2,
        4,
        0,
        1,
        1,
        1,
        0,
    ]  # T = 3: none in the last


@pytest.mark.parametrize("sampling", ["uniform", "loss_aware"])
def test_losses_by_quartile_are_those_of_the_images(monkeypatch, sampling):
    t = trainer(
        train_batch_size=4,
        gradient_accumulation_steps=2,
        prediction_type="v",
        timestep_sampling=sampling,
    )
    seen, losses = [], Trainer._losses

    def recorded(self, model, inputs):
        out = losses(self, model, inputs)
        seen.append((inputs.t, out.detach().double(), self.done))
        return (
            out * math.nan if self.done == 2 else out
        )  # a step that is skipped, and its losses with it

    monkeypatch.setattr(Trainer, "_losses", recorded)
    for _ in range(4):
        t.step()
    means = t.means()
    at, each = (torch.cat([s[i] for s in seen if s[2] != 2]) for i in (0, 1))
    for quartile in range(4):
        chosen = each[at // 25 == quartile]
        assert means[f"loss_q{quartile}"] == pytest.approx(
            float(chosen.mean()), rel=1e-5, nan_ok=True
        )
    assert means["skipped"] == 1 and all(
        math.isnan(v) for k, v in t.means().items() if k != "skipped"
    )


# ---- the rate


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_begins_late(name):
    config = TrainConfig(
        lr_scheduler=name,
        lr_warmup_steps=10,
        max_train_steps=100,
        learning_rate=2.0,
        lr_decay_start=0.6,
    )
    assert [config.rate(step) for step in (9, 10, 37, 59, 60)] == [2.0] * 5
    for step in (61, 80, 99, 100, 120):
        left = max(0, (100 - step) / 40)
        expected = 2 * left if name == "linear" else 1 + math.cos(math.pi * (1 - left))
        assert config.rate(step) == pytest.approx(expected, abs=1e-12)
    early = TrainConfig(
        lr_scheduler=name, lr_warmup_steps=10, max_train_steps=100, lr_decay_start=0.05
    )
    assert all(
        early.rate(s)
        == TrainConfig(lr_scheduler=name, lr_warmup_steps=10, max_train_steps=100).rate(s)
        for s in range(100)
    )


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
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


# ---- the command


def test_v_prediction_with_the_cosine_schedule_from_training_to_scores(call, tmp_path):
    run = tmp_path / "run"
    options = (
        *V,
        *AVERAGES,
        "--max-train-steps",
        12,
        "--logging-steps",
        4,
        "--save-images-epochs",
        1,
    )
    code, out, err = call("train", "--output-dir", run, *options)
    assert code == 0, err
    state, _ = read_checkpoint(run / "checkpoint-00000012.safetensors")
    for folder, name in (
        ("model", "ema"),
        ("model-ema-0.6", "ema_0.6"),
        ("model-ema-0.9", "ema_0.9"),
    ):
        c = load_pretrained(run / folder)
        vector = torch.cat(
            [
                p.permute(0, 2, 3, 1).flatten() if p.ndim == 4 else p.flatten()
                for p in c.unet.parameters()
            ]
        )
        assert torch.equal(vector, state[name])
        assert c.prediction == "v" and np.array_equal(
            c.schedule.beta, NoiseSchedule.cosine(20).beta
        )
        assert c.unet.config.layers == (1, 1, 2) and c.unet.config.attention == (False, True, True)
    assert (
        json.loads((run / "model/scheduler/scheduler_config.json").read_text())["prediction_type"]
        == "v_prediction"
    )
    checked = log_of(run, "ema_loss")
    assert [line["step"] for line in checked] == [5, 10, 12]
    assert all(
        line.keys() >= {"ema_loss", "ema_0.6_loss", "ema_0.9_loss", "raw_loss"} for line in checked
    )
    assert "ema_0.9 " in out and all(
        len([k for k in line if k.startswith("loss_q")]) == 4 for line in log_of(run, "lr")
    )
    # the file's samples are those of a DDIM loop written out: x_0 = sqrt(bar) x - sqrt(1 - bar) v (Salimans & Ho 2022)
    x, unet = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
        load_pretrained(run / "model").unet.double(),
    )
    bar = torch.from_numpy(NoiseSchedule.cosine(20).alpha_bar.copy())
    expected = x.double()
    with torch.no_grad():
        for i in range(19, -1, -1):
            v = unet(expected, i)
            x_0 = (bar[i].sqrt() * expected - (1 - bar[i]).sqrt() * v).clamp(-1, 1)
            eps = (expected - bar[i].sqrt() * x_0) / (1 - bar[i]).sqrt()
            before = bar[i - 1] if i else torch.ones(())
            expected = before.sqrt() * x_0 + (1 - before).sqrt() * eps
    for engine in ("reference", "auto"):
        sampler = Sampler.from_pretrained(run / "model", "cpu", engine=engine)
        drawn = sampler.sample(2, solver="ddim", steps=20, start=(x, 19), output="float")
        assert torch.allclose(drawn.double(), expected, atol=2e-4)
    pytest.importorskip("efficientnet_lite_pytorch")
    given = (
        "--weights",
        run / "model",
        "--data-dir",
        tmp_path / "images.npz",
        "--images",
        8,
        "--steps",
        5,
        "--json",
    )
    code, out, err = call("eval", *given)
    assert code == 0 and math.isfinite(json.loads(out)["kid"][0]), err


def test_a_run_with_all_of_it_goes_on_to_the_bit(call, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    options = (
        *V,
        *AVERAGES,
        "--logging-steps",
        4,
        "--checkpointing-steps",
        5,
        "--save-images-epochs",
        1,
        "--save-model-epochs",
        1,
    )
    scored = (*options, "--eval-images-every", 20, "--eval-images", 6)
    runs = straight, stopped, unscored = [
        tmp_path / name for name in ("straight", "stopped", "unscored")
    ]
    assert call("train", "--output-dir", straight, *scored, "--max-train-steps", 14)[0] == 0
    step = Trainer.step

    def interrupted(self):
        step(self)
        if self.done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_fast.training.trainer.Trainer.step", interrupted)
        assert call("train", "--output-dir", stopped, *scored, "--max-train-steps", 14)[0] == 143
    again = ("--resume-from-checkpoint", "latest")
    refused = call(
        "train",
        "--output-dir",
        stopped,
        *scored,
        "--max-train-steps",
        14,
        *again,
        "--ema-decays",
        "0.3,0.6",
    )
    assert (
        refused[0] == 2
        and "the averages are ema, ema_0.6; expected ema, ema_0.6, ema_0.9" in refused[2]
    )
    code, out, _ = call("train", "--output-dir", stopped, *scored, "--max-train-steps", 14, *again)
    assert code == 0 and "changed since" not in out
    assert call("train", "--output-dir", unscored, *options, "--max-train-steps", 14)[0] == 0
    states = [read_checkpoint(run / "checkpoint-00000014.safetensors")[0] for run in runs]
    for state in states[1:]:
        assert state.keys() == states[0].keys() and all(
            torch.equal(state[k], states[0][k]) for k in state
        )
    for key in ("loss", "loss_q2", "ema_0.6_loss", "ema_kid"):
        lines = [[line[key] for line in log_of(run, key)] for run in (straight, stopped)]
        assert lines[0] == lines[1] and lines[0], key
    assert [line["step"] for line in log_of(straight, "ema_kid")] == [5, 10, 14]
    for folder in ("model", "model-ema-0.6", "model-ema-0.9"):
        files = [
            (run / folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
            for run in (straight, stopped)
        ]
        assert files[0] == files[1]


def test_logged_kid_is_that_of_the_saved_model(call, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    from ddpm_fast.evaluation.metrics import Features, kid

    run, scored = (
        tmp_path / "run",
        ("--eval-images-every", 10**6, "--eval-images", 12, "--ema-decays", "0.3,0.9"),
    )
    code, out, err = call(
        "train",
        "--output-dir",
        run,
        *V,
        *scored,
        "--max-train-steps",
        3,
        "--validation-data-dir",
        tmp_path / "images.npz",
    )
    assert code == 0 and "KID of 12 images: ema " in out, err
    (line,) = log_of(run, "ema_kid")
    extract, held_out = Features(), torch.from_numpy(np.ascontiguousarray(DATA.images[::-1]))
    real = extract(held_out[[i * 20 // 12 for i in range(12)]])
    for folder, name in (("model", "ema"), ("model-ema-0.9", "ema_0.9")):
        sampler = Sampler.from_pretrained(run / folder, "cpu", engine="auto")
        expected = kid(real, extract(sampler.sample(12, solver="ddim", steps=20)))
        assert (line[f"{name}_kid"], line[f"{name}_kid_deviation"]) == pytest.approx(
            expected, rel=1e-6
        )
    assert line["held_out"] and line["eval_images"] == 12


def test_a_signal_ends_an_evaluation(call, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    seen, steps = [], Sampler.steps

    def stopped(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        for done in steps(self, *arguments, **options):
            seen.append(done)
            yield done

    monkeypatch.setattr(Sampler, "steps", stopped)
    code, out, _ = call(
        "train", "--output-dir", tmp_path / "run", "--max-train-steps", 5, "--eval-images-every", 8
    )
    assert (
        code == 130
        and "SIGINT: step 2" in out
        and len(seen) == 1
        and not log_of(tmp_path / "run", "ema_kid")
    )
    assert read_checkpoint(tmp_path / "run" / "checkpoint-00000002.safetensors")[1]["step"] == 2


def test_speed_is_that_of_the_steps_alone(call, tmp_path, monkeypatch):
    """Regression: the time of checkpoints, grids and validation was part of the next interval."""
    pytest.importorskip("efficientnet_lite_pytorch")
    clock, run = [0.0], import_module("ddpm_fast.training.run")
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds, method):
        def timed(self, *arguments):
            clock[0] += seconds
            return method(self, *arguments)

        return timed

    monkeypatch.setattr(Trainer, "step", taking(2, Trainer.step))
    for name in ("save_checkpoint", "save_model"):
        monkeypatch.setattr(run.TrainingRun, name, taking(100, getattr(run.TrainingRun, name)))
    for name in ("validate", "draw", "evaluate"):
        monkeypatch.setattr(Monitor, name, taking(100, getattr(Monitor, name)))
    every = (
        "--logging-steps",
        3,
        "--checkpointing-steps",
        2,
        "--save-images-epochs",
        1,
        "--save-model-epochs",
        1,
    )
    options = (*every, "--eval-images-every", 16, "--eval-images", 4, "--max-train-steps", 10)
    assert call("train", "--output-dir", tmp_path / "run", *options)[0] == 0
    assert [line["images_per_second"] for line in log_of(tmp_path / "run", "lr")] == [2.0] * 4
    assert clock[0] > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "1,2"), "--layers 1,2; expected one count of at least 1, or 3"),
        (("--layers", "0"), "--layers 0"),
        (("--layers", "1,x,2"), "such as 1,1,2"),
        (("--ema-decays", "0.9,x"), "--ema-decays 0.9,x; expected numbers"),
        (("--ema-decays", "0.9", "--ema-max-decay", 0.9), "leave out --ema-max-decay"),
        (("--lr-decay-start", 0.5, "--lr-scheduler", "constant"), "never decays"),
        (("--eval-images-every", 8, "--eval-images", 3), "--eval-images"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(call, tmp_path, options, message):
    code, _, err = call("train", "--output-dir", tmp_path / "run", "--max-train-steps", 1, *options)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "torchmetrics"])
def test_a_missing_extra_is_one_line_before_the_run(call, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = call(
        "train", "--output-dir", tmp_path / "run", "--max-train-steps", 1, "--eval-images-every", 8
    )
    assert (
        code == 2
        and "pip install 'ddpm-fast[metrics]'" in err
        and err.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_the_name_of_diffusers_for_one_decay(call, tmp_path):
    assert (
        call(
            "train",
            "--output-dir",
            tmp_path / "run",
            "--max_train_steps",
            1,
            "--ema_max_decay",
            0.5,
        )[0]
        == 0
    )
    _, header = read_checkpoint(tmp_path / "run" / "checkpoint-00000001.safetensors")
    assert header["settings"]["ema_decays"] == [0.5]


def test_leftovers_of_a_kill_go_and_a_model_that_is_the_only_one_stays(call, tmp_path):
    run, options = (
        tmp_path / "run",
        ("--ema-decays", "0.3,0.9", "--resume-from-checkpoint", "latest"),
    )
    assert call("train", "--output-dir", run, *options, "--max-train-steps", 1)[0] == 0
    (run / ".model-abcdefgh").mkdir()
    (run / "model-ema-0.9").rename(run / ".model-ema-0.9-abcdefgh-old")
    run_of = import_module("ddpm_fast.training.run").TrainingRun
    swept, save = [], run_of.save_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_of,
            "save_model",
            lambda self: (swept.append(sorted(p.name for p in run.glob(".model*"))), save(self)),
        )
        assert call("train", "--output-dir", run, *options, "--max-train-steps", 1)[0] == 0
    assert swept == [[".model-ema-0.9-abcdefgh-old"]]
