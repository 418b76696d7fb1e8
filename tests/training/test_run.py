"""Files of a training run after its end, a kill, a signal or a full disk; invalid input."""

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
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_fast import Sampler, load_pretrained
from ddpm_fast.training import checkpoints as checkpoint_files
from ddpm_fast.training.checkpoints import (
    checkpoints,
    latest_checkpoint,
    lock,
    read_checkpoint,
    write_checkpoint,
)
from ddpm_fast.training.flat_weights import as_vector
from ddpm_fast.training.log import read_log
from ddpm_fast.training.trainer import Trainer

pytest.importorskip("click")
pytest.importorskip("safetensors")
train_action = import_module("ddpm_fast.cli.actions.train")
TINY = "--resolution 8 --channels 8,16 --layers 1 --head-dim 8 --train-batch-size 4"
TINY += " --lr-warmup-steps 2"
RESUME = "--resume-from-checkpoint latest"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (22, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(22) % 3)
    return path


@pytest.fixture
def train(command, data, tmp_path):
    def call(*options, out=tmp_path / "run"):
        return command("train --train-data-dir", data, "--output-dir", out, TINY, *options)

    return call


@pytest.fixture
def process(words, data):
    """Command line of a training process."""

    def arguments(out, *options):
        start = (Path(sys.executable), "-m ddpm_fast train --train-data-dir", data)
        return words(*start, "--output-dir", out, TINY, *options)

    return arguments


def checkpoint_of(run, step):
    return run / f"checkpoint-{step:08d}.safetensors"


def state_of(run, step):
    return read_checkpoint(checkpoint_of(run, step)).state


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def digests(paths):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def log_of(run, key="lr"):
    return [line for line in read_log(run / "log.jsonl") if key in line]


def test_files_of_a_finished_run(train, tmp_path):
    intervals = "--logging-steps 4 --checkpointing-steps 5 --save-images-epochs 1"
    code, out, _ = train("--max-train-steps 12", intervals)
    run = tmp_path / "run"
    assert code == 0 and "all steps done: step 12" in out
    assert checkpoints(run) == [checkpoint_of(run, 10), checkpoint_of(run, 12)]
    assert [line["step"] for line in log_of(run, "loss")] == [4, 8, 12]
    evaluated = log_of(run, "ema_loss")
    assert [line["step"] for line in evaluated] == [6, 12] and not evaluated[-1]["held_out"]
    keys = {"images", "epoch", "loss", "grad_norm", "skipped", "lr", "images_per_second", "seconds"}
    assert log_of(run)[0].keys() >= keys
    assert {p.name for p in (run / "samples").iterdir()} == {"00000006.png", "00000012.png"}
    parameters = load_pretrained(run / "model").unet.parameters()
    averages = torch.cat([as_vector(p) for p in parameters])
    assert torch.equal(averages, state_of(run, 12)["ema"])
    assert Sampler.from_pretrained(run / "model", "cpu").sample(2, steps=2).shape == (2, 8, 8, 1)


def test_json_goes_to_stdout_and_text_to_stderr(train):
    code, out, err = train("--max-train-steps 2 --logging-steps 1 --json")
    assert code == 0 and json.loads(out)["step"] == 2 and "step 1 of 2" in err


@pytest.mark.parametrize(
    "options",
    [
        "",
        pytest.param("--mixed-precision fp16", marks=pytest.mark.full),
        pytest.param("--random-flip --dropout 0.1", marks=pytest.mark.full),
    ],
)
def test_a_killed_and_resumed_run_is_bit_exact(train, process, tmp_path, options):
    steps = f"--max-train-steps 20 --checkpointing-steps 10 --logging-steps 4 {options}"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(steps, out=straight)[0] == 0
    child = subprocess.Popen(process(killed, steps), stdout=subprocess.DEVNULL)
    while not checkpoints(killed):
        assert child.poll() is None
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert checkpoints(killed)[0] == checkpoint_of(killed, 10)
    checkpoint_of(killed, 20).unlink(missing_ok=True)  # if the kill was too late for ten fast steps
    assert train(steps, RESUME, out=killed)[0] == 0
    expected, result = (read_checkpoint(checkpoint_of(run, 20)) for run in (straight, killed))
    assert is_same(expected.state, result.state) and expected.header["step"] == 20
    file = "model/unet/diffusion_pytorch_model.safetensors"
    assert (straight / file).read_bytes() == (killed / file).read_bytes()
    losses = [[line["loss"] for line in log_of(run)] for run in (straight, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


# One process imports everything and forks a training process per kill, which falls into training.
KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no thread pool yet, so a fork is safe
from ddpm_fast.cli.main import main
from ddpm_fast import load_pretrained
import ddpm_fast.cli.actions.train
from ddpm_fast.training.checkpoints import MODEL, checkpoints, read_checkpoint
from ddpm_fast.kernels import noise
from pathlib import Path

noise.words(*[torch.zeros(1, dtype=torch.int64)] * 3, 0, 1)  # the first call imports for seconds

def train(steps):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main([*sys.argv[2:], "--max-train-steps", str(steps)])
        except SystemExit as end:
            os._exit(end.code)
    return child

def log_size():
    log = run / "log.jsonl"
    return log.stat().st_size if log.exists() else 0

random.seed(0)
run, steps, newest = Path(sys.argv[1]), 100_000, 0
for kill in range(20):
    before, child = log_size(), train(steps)
    while kill % 2 and log_size() == before:  # half of the kills wait for steps, on a busy machine
        time.sleep(0.002)
    time.sleep(random.uniform(0.05, 0.7))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it ended: {status}"
    steps_saved = [read_checkpoint(path).header["step"] for path in checkpoints(run)]
    assert not newest or max(steps_saved) >= newest, "a checkpoint was lost"
    newest = max([newest, *steps_saved])
    if newest >= 4:
        load_pretrained(run / MODEL)
last = newest + 3
assert os.waitpid(train(last), 0)[1] == 0
print(last)
"""


@pytest.mark.full
def test_twenty_kills_lose_nothing(train, process, tmp_path, figure):
    run, straight, script = (tmp_path / name for name in ("run", "straight", "kills.py"))
    more = "--checkpointing-steps 2 --logging-steps 1 --save-model-epochs 1 --train-batch-size 8"
    more += " --lr-scheduler constant"
    script.write_text(KILLS)
    interpreter, _, _, *arguments = process(run, more, RESUME)
    done = subprocess.run(
        [interpreter, script, run, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = int(done.stdout.split()[-1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert train(more, "--max-train-steps", last, out=straight)[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert is_same(state_of(run, last), state_of(straight, last))
    assert [line["step"] for line in log_of(run)] == list(range(1, last + 1))
    assert not [p for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    figure("kill -9 at 20 random moments, then to the end: bit-exact after", f"{last} steps")


def test_a_signal_ends_a_run_with_a_checkpoint(train, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(self):
        step(self)
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", interrupted)
    code, out, err = train("--max-train-steps 50")
    assert code == 143 and "SIGTERM: step 3" in out and "interrupted" in err
    assert read_checkpoint(checkpoint_of(tmp_path / "run", 3)).header["step"] == 3
    assert load_pretrained(tmp_path / "run" / "model")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_max_seconds(train, tmp_path):
    code, out, _ = train("--max-train-steps 1000000 --max-seconds 0.5")
    assert code == 0 and "time limit of 0.5 s reached" in out
    assert latest_checkpoint(tmp_path / "run")


def test_divergence_before_max_seconds_is_an_error(train, tmp_path, monkeypatch):
    """A run that ends by time after three steps, of which two were skipped, writes nothing."""
    seconds, step = [0.0], Trainer.step
    monkeypatch.setattr(
        "ddpm_fast.training.run.time", SimpleNamespace(perf_counter=lambda: seconds[0])
    )

    def timed(self):
        step(self)
        seconds[0] += 1

    monkeypatch.setattr(Trainer, "step", timed)
    options = "--learning-rate 1e30 --lr-scheduler constant --checkpointing-steps 1"
    result = train(options, "--max-train-steps 50 --max-seconds 3")
    assert is_error(result, "gradients are NaN or Inf since step 2 (now step 3)", code=1)
    assert "no checkpoint was written; start again" in result[2]
    assert not checkpoints(tmp_path / "run") and not (tmp_path / "run" / "model").exists()


# ---- errors


def is_error(result, message, code=2):
    exit_code, _, err = result
    is_one_line = err.startswith("ddpm-fast: error: ") and err.count("\n") == 1
    return exit_code == code and message in err and is_one_line


def test_a_full_disk_changes_no_finished_file(train, process, tmp_path):
    """A file-size limit in place of a full disk: the write fails in the middle, as with ENOSPC."""
    run, rate = tmp_path / "run", "--lr-scheduler constant"
    assert train("--max-train-steps 4", rate)[0] == 0
    before = digests(p for p in run.rglob("*") if p.is_file() and p.name != "log.jsonl")
    limit = checkpoint_of(run, 4).stat().st_size // 2
    limit_size = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(
        process(run, rate, "--max-train-steps 8 --checkpointing-steps 2", RESUME),
        capture_output=True,
        text=True,
        preexec_fn=limit_size,
    )
    result = (done.returncode, done.stdout, done.stderr)  # a failed run, not invalid input
    assert is_error(result, "checkpoint-00000004.safetensors; resume with", code=1)
    assert "checkpoint-00000006.safetensors" in done.stderr  # the file that was too large
    assert digests(before) == before and not list(run.glob(".*.tmp"))
    assert train("--max-train-steps 8", rate, RESUME)[0] == 0
    assert train("--max-train-steps 8", rate, out=tmp_path / "straight")[0] == 0
    assert is_same(state_of(run, 8), state_of(tmp_path / "straight", 8))


def test_directories_that_are_not_writable(train, tmp_path):
    assert is_error(train(out=Path("/proc/run")), "/proc/run")  # not even by root
    assert is_error(train(out=tmp_path / "no" / "where"), "create it first")
    (tmp_path / "file").write_text("")
    assert is_error(train(out=tmp_path / "file"), "file")


def test_a_damaged_checkpoint_is_skipped_or_refused(train, tmp_path):
    run = tmp_path / "run"
    assert train("--max-train-steps 6 --checkpointing-steps 3")[0] == 0
    newest = checkpoint_of(run, 6)
    intact = bytearray(newest.read_bytes())
    for content in (intact[:-100], intact[:-8] + b"\xff" * 8, b"", b"junk" * 100):
        newest.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(newest)
        lines = []
        assert latest_checkpoint(run, lines.append).path == checkpoint_of(run, 3)
        assert "damaged" in lines[0]
        assert is_error(train("--resume-from-checkpoint", newest), f"{newest} is damaged")
    code, out, _ = train("--max-train-steps 6", RESUME)
    assert code == 0 and f"resuming from {checkpoint_of(run, 3)}" in out
    assert train("--max-train-steps 6", out=tmp_path / "straight")[0] == 0
    assert is_same(state_of(run, 6), state_of(tmp_path / "straight", 6))
    for path in checkpoints(run):
        path.write_bytes(b"")
    assert is_error(train(RESUME), "every checkpoint in")


def test_metadata_of_a_checkpoint(tmp_path):
    """Another format, an incomplete header, and a header that does not match the checksum."""
    from safetensors.torch import save_file

    path, tensors = tmp_path / "checkpoint-00000001.safetensors", dict(weights=torch.ones(2))
    for metadata, message in (
        (dict(), "is not a training checkpoint of format 2; resume with the version"),
        (dict(version="1", header="{}", sha256="0"), "is not a training checkpoint of format 2"),
        (dict(version="2", header="{}"), "is damaged: its header is incomplete"),
        (dict(version="2", header="{}", sha256="0"), "is damaged: its checksum does not match"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
        assert latest_checkpoint(tmp_path, str) is None


def test_a_resumed_checkpoint_is_hashed_once(train, tmp_path, monkeypatch):
    """What was hashed is what is restored; a change of the directory meanwhile is an error."""
    assert train("--max-train-steps 2")[0] == 0
    checksum, hashed = checkpoint_files._checksum, []
    monkeypatch.setattr(
        checkpoint_files, "_checksum", lambda *a: (hashed.append(a), checksum(*a))[1]
    )
    for resume in (RESUME, f"--resume-from-checkpoint {checkpoint_of(tmp_path / 'run', 2)}"):
        hashed.clear()
        code, out, _ = train("--max-train-steps 2", resume)
        assert code == 0 and "all 2 steps are done" in out and len(hashed) == 1
    set_up = train_action.set_up
    monkeypatch.setattr(
        train_action,
        "set_up",
        lambda *a: (checkpoint_of(tmp_path / "run", 2).touch(), set_up(*a))[1],
    )
    assert is_error(train(RESUME), "another process has trained in")


def test_settings_that_must_not_change(train, tmp_path):
    assert train("--max-train-steps 2")[0] == 0
    again = f"--max-train-steps 4 {RESUME}"
    assert is_error(train("--max-train-steps 4"), "contains a run; resume it with")
    for option, message in (
        ("--seed 1", "--seed 0 in the checkpoint, 1 now"),
        ("--train-batch-size 2", "--train_batch_size 4 in the checkpoint, 2 now"),
        ("--channels 8,24", "--channels 8,16 in the checkpoint, 8,24 now"),
        (
            "--ddpm-beta-schedule squaredcos_cap_v2",
            "--ddpm_beta_schedule linear in the checkpoint, squaredcos-cap-v2 now",
        ),
        ("--resume-from-checkpoint nowhere", "nowhere does not exist"),
    ):
        assert is_error(train(again, option), message)
    assert train(again, "--learning-rate 1e-5")[0] == 0  # the rate may change


def test_a_directory_is_used_by_one_process(train, tmp_path):
    (tmp_path / "run").mkdir()
    file = lock(tmp_path / "run")
    assert is_error(train("--max-train-steps 1"), "another process is training in")
    file.close()
    assert train("--max-train-steps 1")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train-data-dir nowhere", "nowhere does not exist"),
        ("", "give --train-data-dir or --dataset-name"),
        ("DATA --dataset-name x", "give --train-data-dir or --dataset-name"),
        ("DATA --channels 8,x", "expected numbers separated by commas"),
        ("DATA --channels 8,12", "expected multiples of 8"),
        ("DATA --channels 8,16 --attention 2", "expected levels of 0..1"),
        ("DATA --num-epochs 0", "--num-epochs"),
        ("DATA --max-train-steps 0", "--max-train-steps"),
        ("DATA --max-seconds 0", "--max-seconds"),
        ("DATA --layers 0", "--layers 0"),
        ("DATA --channels ,", "--channels ,"),
        ("DATA --channels 0,8", "--channels 0,8"),
        ("DATA --dropout 1", "--dropout"),
        ("DATA --head-dim 7", "--head_dim 7"),
        (
            "DATA --resolution 8 --train-batch-size 100000",
            "expected at most 1024: lower --train_batch_size",
        ),
        ("DATA --learning-rate 0", "learning_rate = 0"),
        ("DATA --resolution 0", "--resolution"),
        ("DATA --resolution 9", "divisible by"),
        ("DATA --ddpm-num-steps 0", "0"),
        ("DATA --device toaster", "toaster"),
        ("DATA --model-config-name-or-path nowhere.json", "nowhere.json"),
        ("DATA --weights nowhere", "nowhere is not a directory"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    command, data, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    assert is_error(command("train", options.replace("DATA", f"--train-data-dir {data}")), message)
    assert not list(tmp_path.iterdir())


def test_limits_of_a_network_configuration(command, data, tmp_path):
    """--model-config-name-or-path: a regular file of bounded size and depth, with plain values."""
    path = tmp_path / "config.json"
    options = ("--model-config-name-or-path", path, "--output-dir", tmp_path / "run")
    for content, message in (
        (b" " * (2**20 + 1), "expected at most 1048576"),
        (b'{"a":' * 100_000 + b"}" * 100_000, "is nested too deeply"),
        (b'{"norm_eps": 1, "norm_eps": 2}', "key 'norm_eps' occurs twice"),
        (b'{"sample_size": ' + b"9" * 400 + b"}", "400 digits"),
        (b"[]", "expected a JSON object"),
    ):
        path.write_bytes(content)
        assert is_error(command("train --train-data-dir", data, *options), message)
    path.unlink()
    os.mkfifo(path)
    result = command("train --train-data-dir", data, *options)
    assert is_error(result, "is a FIFO, device or socket; expected a regular file")
    assert not (tmp_path / "run").exists()


def test_underscores_and_the_names_of_diffusers(train, tmp_path):
    options = "--prediction_type v_prediction --ddpm_beta_schedule squaredcos_cap_v2"
    assert train("--max_train_steps 1", options)[0] == 0
    checkpoint = load_pretrained(tmp_path / "run" / "model")
    assert checkpoint.prediction == "v"
    assert checkpoint.schedule.beta[-1] == pytest.approx(0.999)


def test_training_from_initial_weights(train, command, data, tmp_path):
    """They define prediction and schedule; the data defines the size; shapes are an error."""
    more = "--prediction-type v_prediction --ddpm-beta-schedule squaredcos_cap_v2"
    assert train("--max-train-steps 3", more)[0] == 0
    rate = "--max-train-steps 1 --learning-rate 1e-12 --lr-scheduler constant"
    weights = (rate, "--weights", tmp_path / "run" / "model")
    message = "--weights defines the network; remove --channels, --layers, --head-dim"
    assert is_error(train(*weights, out=tmp_path / "no"), message)
    size = ("--fit pad --resolution 12 --output-dir", tmp_path / "next")
    assert command("train --train-data-dir", data, *size, *weights)[0] == 0
    before, after = (load_pretrained(tmp_path / run / "model") for run in ("run", "next"))
    assert torch.allclose(before.unet.conv_in.weight, after.unet.conv_in.weight, atol=1e-9)
    assert after.prediction == "v" and np.array_equal(before.schedule.beta, after.schedule.beta)
    assert after.unet.config.size == (12, 12)


def test_resuming_from_an_earlier_checkpoint_renames_the_later_ones(train, tmp_path):
    """Otherwise `latest` would select them, and the new ones would be deleted as the oldest."""
    run, steps = tmp_path / "run", "--lr-scheduler constant --checkpointing-steps 2"
    assert train("--max-train-steps 6", steps, "--checkpoints-total-limit 9")[0] == 0
    resume = ("--checkpoints-total-limit 2 --resume-from-checkpoint", checkpoint_of(run, 2))
    assert train("--max-train-steps 5", steps, *resume)[0] == 0
    assert checkpoints(run) == [checkpoint_of(run, 4), checkpoint_of(run, 5)]
    assert len(list(run.glob("abandoned-*"))) == 2


def test_the_precision_may_change(train):
    assert train("--max-train-steps 2")[0] == 0
    for step, precision in ((4, "fp16"), (6, "bf16"), (8, "fp16")):
        more = f"--max-train-steps {step} --mixed-precision {precision}"
        assert train(more, RESUME)[0] == 0


def test_one_skipped_step_does_not_end_the_run(train, tmp_path, monkeypatch):
    losses = Trainer._losses
    with_nan = lambda self, *a: losses(self, *a) * (float("nan") if self.done == 3 else 1)
    monkeypatch.setattr(Trainer, "_losses", with_nan)
    assert train("--max-train-steps 6 --logging-steps 1")[0] == 0
    is_null = [line["loss"] is None for line in log_of(tmp_path / "run")]
    assert is_null == [False, False, False, True, False, False]
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_loss_scale_is_part_of_the_state(train, tmp_path):
    fp16, run = "--mixed-precision fp16", tmp_path / "run"
    assert train("--max-train-steps 2", fp16)[0] == 0
    path, state, header = read_checkpoint(checkpoint_of(run, 2))
    header["scaler"]["scale"] = 128.0
    write_checkpoint(path, state, header)
    assert train("--max-train-steps 4", fp16, RESUME)[0] == 0
    assert read_checkpoint(checkpoint_of(run, 4)).header["scaler"]["scale"] == 128.0


def test_a_run_without_a_checkpoint_starts_a_new_log(train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert train("--max-train-steps 3 --logging-steps 1", RESUME)[0] == 0
    assert [line["step"] for line in log_of(run)] == [1, 2, 3]


def test_changed_settings_are_reported(train):
    assert train("--max-train-steps 2")[0] == 0
    _, out, _ = train("--max-train-steps 4 --learning-rate 0.5", RESUME)
    assert "max_train_steps 2 -> 4" in out and "learning_rate 0.0001 -> 0.5" in out
    assert "seed" not in out


def test_errors_are_raised_before_the_first_step(train, tmp_path):
    images, run = np.zeros((4, 8, 8, 1), np.uint8), tmp_path / "run"
    np.savez(tmp_path / "more.npz", images=images, labels=np.arange(4))
    np.savez(tmp_path / "none.npz", images=images)
    for name, classes in (("more.npz", "4"), ("none.npz", "no labels")):
        message = f"validation: the network has 3 classes, the data {classes}"
        assert is_error(train("--validation-data-dir", tmp_path / name), message)
    (run / "model").mkdir(parents=True)
    (run / "model" / "notes.txt").write_text("")
    assert is_error(train("--max-train-steps 1"), "exists and is not a checkpoint")
    (tmp_path / "other" / "log.jsonl").mkdir(parents=True)
    result = train("--max-train-steps 1", out=tmp_path / "other")
    assert is_error(result, "log.jsonl is not a file; move it")


def test_a_schedule_shorter_than_the_sampling_of_grids(train, tmp_path):
    assert train("--max-train-steps 2 --ddpm-num-steps 20 --save-images-epochs 1")[0] == 0
    assert (tmp_path / "run" / "samples" / "00000002.png").exists()


def test_the_sigmoid_schedule_is_that_of_diffusers(train, tmp_path):
    from diffusers import DDPMScheduler

    options = "--max-train-steps 1 --ddpm-beta-schedule sigmoid --ddpm-num-steps 100"
    assert train(options)[0] == 0
    expected = DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=100).betas.numpy()
    beta = load_pretrained(tmp_path / "run" / "model").schedule.beta
    assert np.allclose(beta, expected, rtol=1e-5)
