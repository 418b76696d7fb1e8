import errno
import json
import os
import shutil
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
from ddpm_fast.sampling.callbacks import progress_bar

pytest.importorskip("click")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")
cli = import_module("ddpm_fast.cli.main")
main = cli.main
parse_images = import_module("ddpm_fast.cli.common").parse_images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    options = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    options |= dict(attention=(False, True), norm_groups=4, num_classes=10)
    directory = tmp_path_factory.mktemp("weights") / "model"
    save_pretrained(directory, UNet(UNetConfig(**options)), NoiseSchedule.linear())
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
    arguments = ("--images", 5, "--steps", 3, "--out", tmp_path / "grid.png")
    code, out, err = run("sample", "--weights", weights, *arguments)
    assert code == 0 and "5 images of seed 0, 3 ddpm steps" in out and err == ""
    assert Image.open(tmp_path / "grid.png").size == (3 * 66 + 2, 2 * 66 + 2)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_sample_an_array_with_the_images_of_python(run, weights, tmp_path):
    line = f"--images 100-104 --seed {2**64 - 1} --solver ddim --eta 0.5 --steps 4 --label 3"
    line += f" --batch_size 2 --json --out {tmp_path / 'a.npz'}"
    code, out, _ = run("sample", "--weights", weights, *line.split())
    assert code == 0
    report = json.loads(out)
    assert (report["images"], report["steps"], report["solver"]) == (5, 4, "ddim")
    array = np.load(tmp_path / "a.npz")
    expected = Sampler.from_pretrained(weights).sample(
        range(100, 105), seed=2**64 - 1, solver="ddim", eta=0.5, steps=4, labels=3, batch_size=2
    )
    assert array["indices"].tolist() == list(range(100, 105))
    assert np.array_equal(array["images"], expected)


def test_sample_a_directory(run, weights, tmp_path):
    # with one batch size, images are bit-exact
    arguments = ("--images", "8-10", "--steps", 2, "--batch-size", 1, "--out", tmp_path / "many")
    assert run("sample", "--weights", weights, *arguments)[0] == 0
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert names == ["000008.png", "000009.png", "000010.png"]
    one = np.array(Image.open(tmp_path / "many" / "000009.png"))
    assert np.array_equal(one[..., None], Sampler.from_pretrained(weights).sample([9], steps=2)[0])


def test_sample_reports_the_engine_and_the_reason(run, weights, tmp_path):
    arguments = ("--weights", weights, "--images", 2, "--steps", 2, "--out", tmp_path / "a.npy")
    code, out, _ = run("sample", *arguments, "--engine", "reference", "--json")
    report = json.loads(out)
    assert code == 0 and report["engine"] == "reference" and not report["invariant"]
    assert report["reason"] == "as requested" and report["peak_memory_bytes"] > 10**7
    _, out, _ = run("sample", *arguments, "--engine", "reference")
    assert "engine reference (as requested), not batch-invariant, peak memory" in out
    code, _, err = run("sample", *arguments, "--engine", "fused")
    assert code == 2 and "levels of [8] channels; the kernels take multiples of 16" in err
    code, _, err = run("sample", *arguments, "--dtype", "fp8")
    assert code == 2 and "fp8 needs engine 'fused'" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("out", ["grid.png", "many.npz", "pictures"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_writes_finished_images(run, weights, tmp_path, monkeypatch, out, number):
    """A signal during the second batch of five."""
    steps, step = [], EagerEngine.step

    def counted(self, *arguments):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(EagerEngine, "step", counted)
    arguments = ("--images", 10, "--batch-size", 2, "--steps", 3, "--engine", "reference")
    code, text, err = run("sample", "--weights", weights, *arguments, "--out", tmp_path / out)
    assert code == 128 + number and err == "ddpm-fast: stopped after 2 of 10 images\n"
    assert text.startswith("2 images of seed 0") and len(steps) == 4
    if out == "many.npz":
        assert np.load(tmp_path / out)["indices"].tolist() == [0, 1]
    elif out == "pictures":
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["000000.png", "000001.png"]
    else:
        assert Image.open(tmp_path / out).size[0] > 0


def test_info(run, weights):
    code, out, _ = run("info", weights, "--json")
    report = json.loads(out)
    assert code == 0 and report["config"]["num_class_embeds"] == 10
    assert report["parameters"] > 1000 and report["flops"] > 1000
    code, out, _ = run("info", weights)
    assert code == 0 and "1 x 8 x 8, 10 classes" in out and f"{report['parameters']:,}" in out


def test_collect_env(run):
    code, out, _ = run("collect-env", "--json")
    assert code == 0 and json.loads(out)["torch"] == torch.__version__
    assert run("collect_env")[0] == 0


def test_help_lists_commands(run):
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
        (["sample", "--weights", "W", "--label", "10"], "expected 0 to 9"),
        (["sample", "--weights", "W", "--batch-size", "0"], "0 is not in the range"),
        (["sample", "--weights", "W", "--solver", "euler"], "'euler' is not one of"),
        (["sample", "--weights", "W", "--device", "toaster"], "--device is 'toaster'"),
        (["sample", "--weights", "W", "--device", "meta"], "--device is 'meta'"),
        (["sample", "--weights", "W", "--images", "9" * 20], "image indices from 0"),
        (["sample", "--weights", "W", "--images", "9" * 5000], "expected a count such as 64"),
        (["sample", "--weights", "W", "--steps", "9" * 5000], "at most the number of timesteps"),
        (["sample", "--weights", "W", "--steps", "2000"], "2000 steps"),
        (["sample", "--weights", "W", "--out", "-"], "--out: -: cannot write images to stdout"),
        (["sample", "--weights", "W", "--out", "/dev/full"], "--out: /dev/full is a device"),
        (["sample", "--weights", "W", "--out", "/dev/null"], "--out: /dev/null is a device"),
        (["sample", "--weights", "W", "--out", "a" * 250], "expected at most 220"),
        (
            ["sample", "--weights", "W", "--images", str(10**12), "--out", "x.npz"],
            "--out: 1000000000000 images take",
        ),
        (["sample", "--weights", "W", "--size", "9" * 5000 + "x8"], "expected HEIGHTxWIDTH"),
        (["sample", "--weights", "W", "--size", "999998x999998"], "give a smaller --size"),
        (["eval", "--weights", "W", "--data-dir", "x", "--images", "2"], "give --bits-per-dim"),
        (["plot", "reverse", "--weights", "W", "--images", "10000"], "at most 256 images"),
        (["sample", "--weights", "W", "--out", ""], "expected the name of a file"),
        (["sample", "--weights", "W", "--out", "x.npy/"], "expected the name of a file"),
        (["sample", "--weights", "W", "--size", "32"], "expected HEIGHTxWIDTH"),
        (["sample", "--weights", "W", "--size", "7x8"], "--size is 7x8; expected a height and"),
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


@pytest.mark.parametrize("out", ["no/x.png", "/dev/full", "/dev/null", "-", "a" * 250, "x.jpg"])
def test_refuses_the_output_before_loading_the_model(run, weights, monkeypatch, out):
    monkeypatch.setattr(
        "ddpm_fast.cli.actions.sample.load_pretrained", lambda *_: pytest.fail("loaded")
    )
    assert run("sample", "--weights", weights, "--out", out)[0] == 2


def test_refuses_the_size_before_building_the_engine(run, weights, monkeypatch):
    monkeypatch.setattr(
        "ddpm_fast.sampling.sampler.Sampler.from_checkpoint", lambda *_: pytest.fail("built")
    )
    code, _, err = run("sample", "--weights", weights, "--size", "33x33")
    assert code == 2 and "--size is 33x33; expected a height and a width divisible by 2" in err


def test_refuses_a_checkpoint_of_an_odd_size(run, weights, tmp_path):
    copy = tmp_path / "odd"
    shutil.copytree(weights, copy)
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(sample_size=31)))
    code, _, err = run("sample", "--weights", copy, "--out", tmp_path / "x.png")
    assert code == 2 and "sample_size of the checkpoint is 31x31" in err and "--size" in err


def test_suffix_in_capitals(run, weights, tmp_path):
    arguments = ("--weights", weights, "--images", 1, "--steps", 1, "--engine", "reference")
    assert run("sample", *arguments, "--out", tmp_path / "x.PNG")[0] == 0
    assert Image.open(tmp_path / "x.PNG").format == "PNG"


def test_images_of_another_run_are_reported(run, weights, tmp_path):
    many = tmp_path / "many"
    arguments = ("--weights", weights, "--steps", 1, "--engine", "reference", "--out", many)
    assert run("sample", *arguments, "--images", "0-3")[2] == ""
    assert run("sample", *arguments, "--images", "0-3", "--seed", 1)[2] == ""  # all are overwritten
    code, out, err = run("sample", *arguments, "--images", "2-6", "--json")
    assert code == 0 and json.loads(out)["other_images"] == 2
    message = "already has 2 images of other indices; they are not changed"
    assert err == f"ddpm-fast: {many} {message}\n"


@pytest.mark.parametrize("out", ["many", "a.npz"])
def test_a_full_disk_is_a_failed_run(run, weights, tmp_path, monkeypatch, out):
    written = []

    def full(path, content):
        if path.suffix == ".npz" or len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)

    monkeypatch.setattr("ddpm_fast.sampling.sinks.write_atomically", full)
    arguments = ("--weights", weights, "--images", 5, "--steps", 1, "--engine", "reference")
    code, _, err = run("sample", *arguments, "--out", tmp_path / out)
    name, count = ("000002.png", 2) if out == "many" else ("a.npz", 0)
    assert code == 1 and err.count("\n") == 1
    assert f"{name}: No space left on device; {count} of 5 images are in {tmp_path / out}" in err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2)])
def test_exit_codes_of_the_file_system(run, weights, monkeypatch, number, code):
    def fails(*_):
        raise OSError(number, os.strerror(number), "weights.bin")

    monkeypatch.setattr("ddpm_fast.cli.actions.sample.load_pretrained", fails)
    result, _, err = run("sample", "--weights", weights)
    assert result == code and err == f"ddpm-fast: error: weights.bin: {os.strerror(number)}\n"


def test_notes_on_half_precision_on_a_cpu(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    arguments = ("--weights", weights, "--images", 1, "--steps", 1, "--device", "cpu")
    arguments = (*arguments, "--out", tmp_path / "x.npy")
    out = run("sample", *arguments, "--dtype", "bf16")[1]
    assert "note: bf16 on a CPU is not batch-invariant; --dtype fp32 is" in out
    assert "note: this CPU has no bf16 units: bf16 is slower than fp32; use --dtype fp32" in out
    report = json.loads(run("sample", *arguments, "--dtype", "bf16", "--json")[1])
    assert len(report["notes"]) == 2
    assert "note:" not in run("sample", *arguments, "--engine", "reference")[1]


def test_progress(run, weights, tmp_path):
    arguments = ("--weights", weights, "--images", 1, "--steps", 1, "--engine", "reference")
    arguments = ("sample", *arguments, "--out", tmp_path / "x.npy")
    err = run(*arguments, "--progress")[2]
    assert all(word in err for word in ("loading", "preparing the engine", "drawing 1 images"))
    assert run(*arguments)[2] == run(*arguments, "--quiet")[2] == ""


def test_progress_of_other_commands(run, weights, tmp_path, monkeypatch):
    """The total of a bar is the number of image-steps."""
    totals = []

    def bar(progress, total):
        totals.append((progress, total))
        return progress_bar(False, total)

    for module in ("sampling.stream", "plotting.diffusion"):
        monkeypatch.setattr(f"ddpm_fast.{module}.progress_bar", bar)
    pytest.importorskip("matplotlib")
    common = ("--weights", weights, "--images", 2, "--steps", 3, "--out")
    assert run("plot", "reverse", *common, tmp_path / "a.png", "--progress")[0] == 0
    assert totals == [(True, 6)]
    wide = tmp_path / "wide"
    options = dict(sample_size=8, in_channels=1, out_channels=1, channels=(32,), layers=1)
    unet = UNet(UNetConfig(**options, attention=(False,), norm_groups=4))
    save_pretrained(wide, unet, NoiseSchedule.linear())
    totals.clear()
    common = ("--weights", wide, *common[2:])
    code, _, err = run("calibrate", *common, tmp_path / "c.json", "--progress")
    assert code == 0, err
    assert totals == [(True, 6), (True, 6)]


def test_another_size(run, weights, tmp_path):
    arguments = ("--images", 1, "--steps", 2, "--size", "8x12", "--out", tmp_path / "a.npy")
    assert run("sample", "--weights", weights, *arguments)[0] == 0
    assert np.load(tmp_path / "a.npy").shape == (1, 8, 12, 1)


def test_parse_images():
    assert (parse_images("64"), parse_images("100-199")) == (range(64), range(100, 200))


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "ddpm_fast"], ["ddpm-fast"]], ids=["module", "script"]
)
def test_installed_command(command, tmp_path):
    if command[0] == "ddpm-fast":
        command = [str(Path(sys.executable).with_name("ddpm-fast"))]
    command = [*command, "info", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"]], ids=" ".join)
def test_stdout_that_cannot_be_written_to(arguments):
    """One line and exit code 1 on a full disk; no line after a closed pipe (`| head`)."""
    command = [sys.executable, "-m", "ddpm_fast", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "ddpm-fast: error: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_before_sampling_is_one_line(run, weights, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_fast.cli.actions.sample.load_pretrained", interrupted)
    assert run("sample", "--weights", weights) == (130, "", "ddpm-fast: interrupted\n")
