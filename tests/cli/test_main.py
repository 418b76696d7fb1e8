import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, save_pretrained
from ddpm_fast.engines.eager import EagerEngine

pytest.importorskip("click")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")
cli = import_module("ddpm_fast.cli.main")
main = cli.main
parse_images = import_module("ddpm_fast.cli.common").parse_images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    options = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        layers=1,
        attention=(False, True),
    )
    directory = tmp_path_factory.mktemp("weights") / "model"
    unet = UNet(UNetConfig(**options, norm_groups=4, num_classes=10))
    save_pretrained(directory, unet, NoiseSchedule.linear())
    return directory


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_sample_a_grid(run, weights, tmp_path):
    code, out, err = run(
        "sample", "--weights", weights, "--images", 5, "--steps", 3, "--out", tmp_path / "grid.png"
    )
    assert code == 0 and "5 images of seed 0, 3 ddpm steps" in out and err == ""
    assert Image.open(tmp_path / "grid.png").size == (3 * 66 + 2, 2 * 66 + 2)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_sample_an_array_is_what_python_draws(run, weights, tmp_path):
    arguments = (
        "--images",
        "100-104",
        "--seed",
        2**64 - 1,
        "--solver",
        "ddim",
        "--eta",
        0.5,
        "--steps",
        4,
        "--label",
        3,
    )
    code, out, _ = run(
        "sample",
        "--weights",
        weights,
        *arguments,
        "--batch_size",
        2,
        "--json",
        "--out",
        tmp_path / "a.npz",
    )
    assert code == 0
    report = json.loads(out)
    assert (report["images"], report["steps"], report["solver"]) == (5, 4, "ddim")
    array = np.load(tmp_path / "a.npz")
    want = Sampler.from_pretrained(weights).sample(
        range(100, 105), seed=2**64 - 1, solver="ddim", eta=0.5, steps=4, labels=3, batch_size=2
    )
    assert array["indices"].tolist() == list(range(100, 105))
    assert np.array_equal(array["images"], want)


def test_sample_a_directory(run, weights, tmp_path):
    arguments = (
        "--images",
        "8-10",
        "--steps",
        2,
        "--batch-size",
        1,
    )  # of one batch size: equal to the bit
    code, _, _ = run("sample", "--weights", weights, *arguments, "--out", tmp_path / "many")
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [
        "000008.png",
        "000009.png",
        "000010.png",
    ]
    one = np.array(Image.open(tmp_path / "many" / "000009.png"))
    assert np.array_equal(one[..., None], Sampler.from_pretrained(weights).sample([9], steps=2)[0])


def test_sample_says_which_engine_and_why(run, weights, tmp_path):
    arguments = ("--weights", weights, "--images", 2, "--steps", 2, "--out", tmp_path / "a.npy")
    code, out, _ = run("sample", *arguments, "--engine", "reference", "--json")
    report = json.loads(out)
    assert code == 0 and (report["engine"], report["reason"], report["invariant"]) == (
        "reference",
        "as requested",
        False,
    )
    assert report["peak_memory_bytes"] > 10**7
    _, out, _ = run("sample", *arguments, "--engine", "reference")
    assert "engine reference (as requested), not batch-invariant, peak memory" in out
    code, _, err = run("sample", *arguments, "--engine", "fused")
    assert code == 2 and "levels of [8] channels; the kernels take multiples of 16" in err
    code, _, err = run("sample", *arguments, "--dtype", "fp8")
    assert code == 2 and "fp8 needs engine 'fused'" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("out", ["grid.png", "many.npz", "pictures"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_what_is_finished(run, weights, tmp_path, monkeypatch, out, number):
    """Told to stop in the second batch of five."""
    steps, step = [], EagerEngine.step

    def counted(self, *arguments):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(EagerEngine, "step", counted)
    arguments = ("--images", 10, "--batch-size", 2, "--steps", 3, "--engine", "reference")
    code, said, err = run("sample", "--weights", weights, *arguments, "--out", tmp_path / out)
    assert (
        code == 128 + number
        and err == "ddpm-fast: stopped after 2 of 10 images\n"
        and said.startswith("2 images of seed 0")
    )
    assert len(steps) == 4
    if out == "many.npz":
        assert np.load(tmp_path / out)["indices"].tolist() == [0, 1]
    elif out == "pictures":
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["000000.png", "000001.png"]
    else:
        assert Image.open(tmp_path / out).size[0] > 0


def test_info(run, weights):
    code, out, _ = run("info", weights, "--json")
    report = json.loads(out)
    assert (
        code == 0
        and report["parameters"] > 1000
        and report["flops"] > 1000
        and report["config"]["num_class_embeds"] == 10
    )
    code, out, _ = run("info", weights)
    assert code == 0 and "1 x 8 x 8, 10 classes" in out and f"{report['parameters']:,}" in out


def test_collect_env(run):
    code, out, _ = run("collect-env", "--json")
    assert code == 0 and json.loads(out)["torch"] == torch.__version__
    assert run("collect_env")[0] == 0


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in ("sample", "info", "collect-env"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "Missing option '--weights'"),
        (["sample", "--weights", "nowhere"], "nowhere is not a directory"),
        (["sample", "--weights", "W", "--out", "missing/x.png"], "does not exist; create it first"),
        (["sample", "--weights", "W", "--out", "x.jpg"], "unknown kind of file"),
        (["sample", "--weights", "W", "--images", "many"], "expected a count such as 64"),
        (["sample", "--weights", "W", "--images", "9-3"], "no image selected"),
        (["sample", "--weights", "W", "--images", "0"], "no image selected"),
        (["sample", "--weights", "W", "--seed", "-1"], "seed = -1; expected 0 to 2^64 - 1"),
        (["sample", "--weights", "W", "--steps", "0"], "0 steps"),
        (["sample", "--weights", "W", "--label", "10"], "expected 0..9"),
        (["sample", "--weights", "W", "--batch-size", "0"], "batch_size = 0"),
        (["sample", "--weights", "W", "--solver", "euler"], "'euler' is not one of"),
        (["sample", "--weights", "W", "--device", "toaster"], "--device toaster"),
        (["sample", "--weights", "W", "--device", "meta"], "--device meta"),
        (["sample", "--weights", "W", "--images", "9" * 20], "image indices from 0"),
        (["sample", "--weights", "W", "--out", ""], "expected the name of a file"),
        (["sample", "--weights", "W", "--out", "x.npy/"], "expected the name of a file"),
        (["sample", "--weights", "W", "--size", "32"], "expected HEIGHTxWIDTH"),
        (["sample", "--weights", "W", "--size", "7x8"], "divisible by 2"),
        (["sample", "--weights", "W", "--shiny"], "No such option"),
        (["info", "nowhere"], "nowhere is not a directory"),
        (["dance"], "No such command"),
    ],
    ids=lambda v: " ".join(v[2:]) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    run, weights, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(weights if a == "W" else a for a in arguments))
    assert code == 2 and out == ""
    assert message in err and err.startswith("ddpm-fast: error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_refuses_the_output_before_sampling(run, weights, tmp_path, monkeypatch):
    def sampled(*_, **__):
        raise AssertionError("sampling began")

    monkeypatch.setattr("ddpm_fast.sampling.sampler.Sampler.begin", sampled)
    assert run("sample", "--weights", weights, "--out", tmp_path / "no" / "x.png")[0] == 2


def test_another_size(run, weights, tmp_path):
    assert (
        run(
            "sample",
            "--weights",
            weights,
            "--images",
            1,
            "--steps",
            2,
            "--size",
            "8x12",
            "--out",
            tmp_path / "a.npy",
        )[0]
        == 0
    )
    assert np.load(tmp_path / "a.npy").shape == (1, 8, 12, 1)


def test_parse_images():
    assert (parse_images("64"), parse_images("100-199")) == (range(64), range(100, 200))


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "ddpm_fast"], ["ddpm-fast"]], ids=["module", "script"]
)
def test_installed_command(command, tmp_path):
    if command[0] == "ddpm-fast":
        command = [str(Path(sys.executable).with_name("ddpm-fast"))]
    done = subprocess.run(
        [*command, "info", "nowhere"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
