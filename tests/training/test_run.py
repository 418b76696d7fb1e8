"""What a training run leaves behind when it ends, is killed, or has no room."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import Sampler, load_pretrained
from ddpm_fast.training.checkpoints import (
    checkpoints,
    latest_checkpoint,
    lock,
    read_checkpoint,
    write_checkpoint,
)
from ddpm_fast.training.log import read_log

pytest.importorskip("click")
pytest.importorskip("safetensors")
cli = import_module("ddpm_fast.cli.main")
TINY = (
    "--resolution",
    8,
    "--channels",
    "8,16",
    "--layers",
    1,
    "--head-dim",
    8,
    "--train-batch-size",
    4,
    "--lr-warmup-steps",
    2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    generator = np.random.default_rng(0)
    np.savez(
        path,
        images=generator.integers(0, 256, (22, 8, 8, 1), dtype=np.uint8),
        labels=np.arange(22) % 3,
    )
    return path


@pytest.fixture
def train(capsys, data, tmp_path):
    def call(*more, out=tmp_path / "run"):
        with pytest.raises(SystemExit) as end:
            cli.main(
                [
                    str(a)
                    for a in ("train", "--train-data-dir", data, "--output-dir", out, *TINY, *more)
                ]
            )
        return end.value.code, *capsys.readouterr()

    return call


def state_of(run, step):
    state, header = read_checkpoint(run / f"checkpoint-{step:08d}.safetensors")
    return state, header


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_leaves_everything(train, tmp_path):
    code, out, _ = train(
        "--max-train-steps",
        12,
        "--logging-steps",
        4,
        "--checkpointing-steps",
        5,
        "--save-images-epochs",
        1,
    )
    run = tmp_path / "run"
    assert code == 0 and "all steps done: step 12" in out
    assert [p.name for p in checkpoints(run)] == [
        "checkpoint-00000010.safetensors",
        "checkpoint-00000012.safetensors",
    ]
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "ema_loss" in line] == [6, 12] and not lines[-1][
        "held_out"
    ]
    assert lines[0].keys() >= {
        "images",
        "epoch",
        "loss",
        "grad_norm",
        "skipped",
        "lr",
        "images_per_second",
        "seconds",
    }
    assert {p.name for p in (run / "samples").iterdir()} == {"00000006.png", "00000012.png"}
    trained, _ = state_of(run, 12)
    shipped = load_pretrained(run / "model").unet
    vector = torch.cat(
        [
            p.permute(0, 2, 3, 1).flatten() if p.ndim == 4 else p.flatten()
            for p in shipped.parameters()
        ]
    )
    assert torch.equal(vector, trained["ema"])  # the average is what is shipped
    assert Sampler.from_pretrained(run / "model", "cpu").sample(2, steps=2).shape == (2, 8, 8, 1)


def test_json_goes_to_stdout_and_words_to_stderr(train):
    code, out, err = train("--max-train-steps", 2, "--logging-steps", 1, "--json")
    assert code == 0 and json.loads(out)["step"] == 2 and "step 1 of 2" in err


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--mixed-precision", "fp16"), marks=pytest.mark.full),
        pytest.param(("--random-flip", "--dropout", "0.1"), marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_twenty_steps_are_ten_a_kill_and_ten(train, data, tmp_path, options):
    steps = (
        "--max-train-steps",
        20,
        "--checkpointing-steps",
        10,
        "--logging-steps",
        4,
        *map(str, options),
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(*steps, out=straight)[0] == 0
    command = [
        sys.executable,
        "-m",
        "ddpm_fast",
        "train",
        "--train-data-dir",
        data,
        "--output-dir",
        killed,
        *TINY,
        *steps,
    ]
    child = subprocess.Popen([str(a) for a in command], stdout=subprocess.DEVNULL)
    while not checkpoints(killed):
        assert child.poll() is None
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert [p.name for p in checkpoints(killed)] in (
        ["checkpoint-00000010.safetensors"],
        ["checkpoint-00000010.safetensors", "checkpoint-00000020.safetensors"],
    )
    (killed / "checkpoint-00000020.safetensors").unlink(
        missing_ok=True
    )  # the kill came too late: ten steps are quick
    assert train(*steps, "--resume-from-checkpoint", "latest", out=killed)[0] == 0
    (want, header), (got, _) = state_of(straight, 20), state_of(killed, 20)
    assert same_state(want, got) and header["step"] == 20
    assert (straight / "model/unet/diffusion_pytorch_model.safetensors").read_bytes() == (
        killed / "model/unet/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    losses = [
        [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]
        for run in (straight, killed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5


# One process imports everything and forks a training for each kill: so a kill falls into training, not into imports.
KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no thread pool yet, so a fork is safe
from ddpm_fast.cli.main import main
from ddpm_fast import load_pretrained
import ddpm_fast.cli.train, ddpm_fast.cli.train_setup, ddpm_fast.training.run
from ddpm_fast.training.checkpoints import MODEL, checkpoints, read_checkpoint
from ddpm_fast.kernels import noise
from pathlib import Path

noise.words(*[torch.zeros(1, dtype=torch.int64)] * 3, 0, 1)  # the first call imports for seconds

def train(steps):
    out = os.dup(1)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main([*sys.argv[2:], "--max-train-steps", str(steps)])
        except SystemExit as end:
            os._exit(end.code)
    return child

def logged():
    log = run / "log.jsonl"
    return log.stat().st_size if log.exists() else 0

random.seed(0)
run, steps, whole = Path(sys.argv[1]), 100_000, 0
for kill in range(20):
    before, child = logged(), train(steps)
    while kill % 2 and logged() == before:  # half of the kills fall into training on a busy machine too
        time.sleep(0.002)
    time.sleep(random.uniform(0.05, 0.7))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"training had ended: {status}"
    held = [read_checkpoint(path)[1]["step"] for path in checkpoints(run)]  # raises for a damaged one
    assert not whole or max(held) >= whole, "a checkpoint was lost"
    whole = max([whole, *held])
    if whole >= 4:
        load_pretrained(run / MODEL)
last = whole + 3
assert os.waitpid(train(last), 0)[1] == 0
print(last)
"""


@pytest.mark.full
def test_twenty_kills_lose_nothing(train, data, tmp_path, figure):
    run, more = (
        tmp_path / "run",
        (
            "--checkpointing-steps",
            2,
            "--logging-steps",
            1,
            "--save-model-epochs",
            1,
            "--lr-scheduler",
            "constant",
        ),
    )
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    arguments = (
        "train",
        "--train-data-dir",
        data,
        "--output-dir",
        run,
        *TINY,
        *more,
        "--train-batch-size",
        8,
    )
    command = [sys.executable, script, run, *arguments, "--resume-from-checkpoint", "latest"]
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    last = int(done.stdout.split()[-1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert (
            train(
                *more, "--train-batch-size", 8, "--max-train-steps", last, out=tmp_path / "straight"
            )[0]
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    assert same_state(state_of(run, last)[0], state_of(tmp_path / "straight", last)[0])
    steps = [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, last + 1))  # no step twice, none missing
    assert not [p for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    figure("kill -9 at 20 random moments, then to the end: equal to the bit after", f"{last} steps")


def test_a_signal_ends_it_with_a_checkpoint(train, tmp_path, monkeypatch):
    step = import_module("ddpm_fast.training.trainer").Trainer.step

    def interrupted(self):
        step(self)
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ddpm_fast.training.trainer.Trainer.step", interrupted)
    code, out, err = train("--max-train-steps", 50)
    assert code == 143 and "SIGTERM: step 3" in out and "interrupted" in err
    assert state_of(tmp_path / "run", 3)[1]["step"] == 3 and load_pretrained(
        tmp_path / "run" / "model"
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_max_seconds(train, tmp_path):
    code, out, _ = train("--max-train-steps", 10**6, "--max-seconds", 0.5)
    assert code == 0 and "0.5 seconds are over" in out and latest_checkpoint(tmp_path / "run")


# ---- what goes wrong


def one_line(result, message, code=2):
    exit_code, _, err = result
    assert (
        exit_code == code
        and message in err
        and err.startswith("ddpm-fast: error: ")
        and err.count("\n") == 1
    )
    return True


def test_a_full_disk_keeps_what_was_finished(train, data, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle, as ENOSPC does."""
    run, rate = tmp_path / "run", ("--lr-scheduler", "constant")
    assert train("--max-train-steps", 4, *rate)[0] == 0
    before = {
        p: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in run.rglob("*")
        if p.is_file() and p.name != "log.jsonl"
    }
    limit = (run / "checkpoint-00000004.safetensors").stat().st_size // 2
    command = [
        sys.executable,
        "-m",
        "ddpm_fast",
        "train",
        "--train-data-dir",
        data,
        "--output-dir",
        run,
        *TINY,
        *rate,
    ]
    command += [
        "--max-train-steps",
        8,
        "--checkpointing-steps",
        2,
        "--resume-from-checkpoint",
        "latest",
    ]
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(
        [str(a) for a in command], capture_output=True, text=True, preexec_fn=full
    )
    result = (done.returncode, done.stdout, done.stderr)  # a failed run, not invalid input
    assert one_line(result, "checkpoint-00000004.safetensors is kept: go on from it", code=1)
    assert "checkpoint-00000006.safetensors" in done.stderr  # the file that was too large
    assert {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in before} == before
    assert not list(run.glob(".*.tmp"))
    assert train("--max-train-steps", 8, *rate, "--resume-from-checkpoint", "latest")[0] == 0
    assert train("--max-train-steps", 8, *rate, out=tmp_path / "straight")[0] == 0
    assert same_state(state_of(run, 8)[0], state_of(tmp_path / "straight", 8)[0])


def test_places_that_cannot_be_written_to(train, tmp_path):
    assert one_line(train(out=Path("/proc/run")), "/proc/run")  # not even by root
    assert one_line(train(out=tmp_path / "no" / "where"), "create it first")
    (tmp_path / "file").write_text("")
    assert one_line(train(out=tmp_path / "file"), "file")


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path):
    run = tmp_path / "run"
    assert train("--max-train-steps", 6, "--checkpointing-steps", 3)[0] == 0
    newest = run / "checkpoint-00000006.safetensors"
    whole = bytearray(newest.read_bytes())
    for content in (whole[:-100], whole[:-8] + b"\xff" * 8, b"", b"junk" * 100):
        newest.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(newest)
        said = []
        assert latest_checkpoint(run, said.append) == run / "checkpoint-00000003.safetensors"
        assert "damaged" in said[0]
    code, out, _ = train("--max-train-steps", 6, "--resume-from-checkpoint", "latest")
    assert code == 0 and "going on from" in out
    assert train("--max-train-steps", 6, out=tmp_path / "straight")[0] == 0
    assert same_state(state_of(run, 6)[0], state_of(tmp_path / "straight", 6)[0])
    for path in checkpoints(run):
        path.write_bytes(b"")
    assert one_line(train("--resume-from-checkpoint", "latest"), "every checkpoint in")


def test_refuses_to_go_on_with_other_settings(train, tmp_path):
    assert train("--max-train-steps", 2)[0] == 0
    again = ("--max-train-steps", 4, "--resume-from-checkpoint", "latest")
    assert one_line(train("--max-train-steps", 4), "holds a run already")
    assert one_line(train(*again, "--seed", 1), "--seed 0 in the checkpoint, 1 now")
    assert one_line(
        train(*again, "--train-batch-size", 2), "--train_batch_size 4 in the checkpoint, 2 now"
    )
    assert one_line(
        train(*again, "--channels", "8,24"), "--channels 8,16 in the checkpoint, 8,24 now"
    )
    assert one_line(
        train(*again, "--ddpm-beta-schedule", "squaredcos_cap_v2"),
        "--ddpm_beta_schedule linear in the checkpoint, squaredcos-cap-v2 now",
    )
    assert one_line(train("--resume-from-checkpoint", "nowhere"), "nowhere does not exist")
    assert train(*again, "--learning-rate", 1e-5)[0] == 0  # the rate may change


def test_two_processes_do_not_share_a_run(train, data, tmp_path):
    (tmp_path / "run").mkdir()
    held = lock(tmp_path / "run")
    assert one_line(train("--max-train-steps", 1), "another process is training in")
    held.close()
    assert train("--max-train-steps", 1)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-data-dir", "nowhere"], "nowhere does not exist"),
        ([], "give --train-data-dir or --dataset-name"),
        (
            ["--train-data-dir", "DATA", "--dataset-name", "x"],
            "give --train-data-dir or --dataset-name",
        ),
        (["--train-data-dir", "DATA", "--channels", "8,x"], "expected numbers with commas"),
        (["--train-data-dir", "DATA", "--channels", "8,12"], "expected multiples of 8"),
        (
            ["--train-data-dir", "DATA", "--channels", "8,16", "--attention", "2"],
            "expected levels of 0..1",
        ),
        (["--train-data-dir", "DATA", "--num-epochs", "0"], "--num-epochs"),
        (["--train-data-dir", "DATA", "--max-train-steps", "0"], "--max-train-steps"),
        (["--train-data-dir", "DATA", "--max-seconds", "0"], "--max-seconds"),
        (["--train-data-dir", "DATA", "--layers", "0"], "--layers 0"),
        (["--train-data-dir", "DATA", "--channels", ","], "--channels ,"),
        (["--train-data-dir", "DATA", "--channels", "0,8"], "--channels 0,8"),
        (["--train-data-dir", "DATA", "--dropout", "1"], "--dropout"),
        (["--train-data-dir", "DATA", "--head-dim", "7"], "--head_dim 7"),
        (
            ["--train-data-dir", "DATA", "--resolution", "8", "--train-batch-size", "100000"],
            "expected at most 1024: lower --train_batch_size",
        ),
        (["--train-data-dir", "DATA", "--learning-rate", "0"], "learning_rate = 0"),
        (["--train-data-dir", "DATA", "--resolution", "0"], "--resolution"),
        (["--train-data-dir", "DATA", "--resolution", "9"], "divisible by"),
        (["--train-data-dir", "DATA", "--ddpm-num-steps", "0"], "0"),
        (["--train-data-dir", "DATA", "--device", "toaster"], "--device is 'toaster'"),
        (
            ["--train-data-dir", "DATA", "--model-config-name-or-path", "nowhere.json"],
            "nowhere.json",
        ),
        (["--train-data-dir", "DATA", "--weights", "nowhere"], "nowhere is not a directory"),
    ],
    ids=lambda v: " ".join(v[2:]) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys, data, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *(str(data) if a == "DATA" else a for a in arguments)])
    assert one_line((end.value.code, *capsys.readouterr()), message)
    assert not list(tmp_path.iterdir())


def test_underscores_and_the_names_of_diffusers(train, tmp_path):
    code, *_ = train(
        "--max_train_steps",
        1,
        "--prediction_type",
        "v_prediction",
        "--ddpm_beta_schedule",
        "squaredcos_cap_v2",
    )
    c = load_pretrained(tmp_path / "run" / "model")
    assert code == 0 and c.prediction == "v" and c.schedule.beta[-1] == pytest.approx(0.999)


def test_goes_on_from_given_weights(train, data, tmp_path, capsys):
    """They bring their own prediction and schedule, the size is the new images', and shapes cannot be given besides."""
    more = ("--prediction-type", "v_prediction", "--ddpm-beta-schedule", "squaredcos_cap_v2")
    assert train("--max-train-steps", 3, *more)[0] == 0
    weights = (
        "--max-train-steps",
        1,
        "--learning-rate",
        1e-12,
        "--lr-scheduler",
        "constant",
        "--weights",
        tmp_path / "run" / "model",
    )
    assert one_line(
        train(*weights, out=tmp_path / "no"),
        "--weights says what the network is; leave out --channels, --layers, --head-dim",
    )
    arguments = (
        "train",
        "--train-data-dir",
        data,
        "--fit",
        "pad",
        "--resolution",
        12,
        "--output-dir",
        tmp_path / "next",
        *weights,
    )
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    assert end.value.code == 0
    before, after = (load_pretrained(tmp_path / run / "model") for run in ("run", "next"))
    assert torch.allclose(before.unet.conv_in.weight, after.unet.conv_in.weight, atol=1e-9)
    assert after.prediction == "v" and np.array_equal(before.schedule.beta, after.schedule.beta)
    assert after.unet.config.size == (12, 12)


def test_going_back_leaves_the_later_checkpoints_aside(train, tmp_path):
    """Else `latest` would return to them, and the new ones would be pruned as the oldest."""
    run, steps = tmp_path / "run", ("--lr-scheduler", "constant", "--checkpointing-steps", 2)
    assert train("--max-train-steps", 6, *steps, "--checkpoints-total-limit", 9)[0] == 0
    old = run / "checkpoint-00000002.safetensors"
    more = (*steps, "--checkpoints-total-limit", 2, "--resume-from-checkpoint", old)
    assert train("--max-train-steps", 5, *more)[0] == 0
    assert [p.name for p in checkpoints(run)] == [
        "checkpoint-00000004.safetensors",
        "checkpoint-00000005.safetensors",
    ]
    assert len(list(run.glob("abandoned-*"))) == 2


def test_precision_may_change_on_the_way(train):
    assert train("--max-train-steps", 2)[0] == 0
    for step, precision in ((4, "fp16"), (6, "bf16"), (8, "fp16")):
        more = (
            "--max-train-steps",
            step,
            "--mixed-precision",
            precision,
            "--resume-from-checkpoint",
            "latest",
        )
        assert train(*more)[0] == 0


def test_a_skipped_step_alone_does_not_end_the_run(train, tmp_path, monkeypatch):
    losses = import_module("ddpm_fast.training.trainer").Trainer._losses
    broken = lambda self, *a: losses(self, *a) * (float("nan") if self.done == 3 else 1)
    monkeypatch.setattr("ddpm_fast.training.trainer.Trainer._losses", broken)
    assert train("--max-train-steps", 6, "--logging-steps", 1)[0] == 0
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "lr" in line]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, False, False]
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_loss_scale_is_part_of_the_state(train, tmp_path):
    assert train("--max-train-steps", 2, "--mixed-precision", "fp16")[0] == 0
    path = tmp_path / "run" / "checkpoint-00000002.safetensors"
    state, header = read_checkpoint(path)
    header["scaler"]["scale"] = 128.0
    write_checkpoint(path, state, header)
    assert (
        train(
            "--max-train-steps",
            4,
            "--mixed-precision",
            "fp16",
            "--resume-from-checkpoint",
            "latest",
        )[0]
        == 0
    )
    assert state_of(tmp_path / "run", 4)[1]["scaler"]["scale"] == 128.0


def test_a_kill_before_the_first_checkpoint_leaves_no_lines(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert (
        train("--max-train-steps", 3, "--logging-steps", 1, "--resume-from-checkpoint", "latest")[0]
        == 0
    )
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "lr" in line] == [
        1,
        2,
        3,
    ]


def test_says_what_changed(train):
    assert train("--max-train-steps", 2)[0] == 0
    _, out, _ = train(
        "--max-train-steps", 4, "--learning-rate", 0.5, "--resume-from-checkpoint", "latest"
    )
    assert (
        "max_train_steps 2 -> 4" in out
        and "learning_rate 0.0001 -> 0.5" in out
        and "seed" not in out
    )


def test_checks_first_what_would_fail_later(train, data, tmp_path):
    np.savez(tmp_path / "more.npz", images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.arange(4))
    np.savez(tmp_path / "none.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    assert one_line(
        train("--validation-data-dir", tmp_path / "more.npz"),
        "validation: the network has 3 classes, the data 4",
    )
    assert one_line(
        train("--validation-data-dir", tmp_path / "none.npz"),
        "validation: the network has 3 classes, the data no labels",
    )
    (tmp_path / "run" / "model").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "model" / "mine.txt").write_text("mine")
    assert one_line(train("--max-train-steps", 1), "exists and is not a checkpoint")
    code, *_ = train(
        "--max-train-steps",
        2,
        "--ddpm-num-steps",
        20,
        "--save-images-epochs",
        1,
        out=tmp_path / "short",
    )
    assert code == 0 and (tmp_path / "short" / "samples" / "00000002.png").exists()


def test_sigmoid_is_the_sigmoid_of_diffusers(train, tmp_path):
    from diffusers import DDPMScheduler

    assert (
        train("--max-train-steps", 1, "--ddpm-beta-schedule", "sigmoid", "--ddpm-num-steps", 100)[0]
        == 0
    )
    theirs = DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=100).betas.numpy()
    assert np.allclose(load_pretrained(tmp_path / "run" / "model").schedule.beta, theirs, rtol=1e-5)
