"""ddpm-fast info --plan and --cache: what is printed is what the plan says."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ddpm_fast import UNet
from ddpm_fast.checkpoints.checkpoint import load_pretrained
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels._gemm import H100
from ddpm_fast.utils.cache import cached_files

pytest.importorskip("click")
pytest.importorskip("safetensors")
WEIGHTS = Path(__file__).parents[2] / "weights" / "fashion-mnist-32"


@pytest.fixture
def run(capsys):
    main = import_module("ddpm_fast.cli.main").main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_plan(run):
    code, out, _ = run("info", WEIGHTS, "--plan", "--batch-size", 16, "--json")
    report = json.loads(out)
    config = load_pretrained(WEIGHTS).unet.config
    with torch.device("meta"):
        unet = UNet(config)
    plan = FusedUNet(unet, 16, "bf16", "meta", target=H100).plan()
    assert code == 0 and [row["launch"] for row in report["plan"]] == [
        launch.name for launch in plan
    ]
    assert [(row["flops"], row["bytes"]) for row in report["plan"]] == [
        launch.cost() for launch in plan
    ]
    assert report["launches"] == len(plan) and report["arena_bytes"] == plan.arena.size
    assert abs(report["floor_ms"] - sum(row["floor_us"] for row in report["plan"]) / 1e3) < 1e-3
    assert report["predicted_ms"] > report["floor_ms"] and {
        row["bound"] for row in report["plan"]
    } <= {
        "launch",
        "memory",
        "arithmetic",
    }

    code, out, _ = run("info", WEIGHTS, "--plan", "--batch-size", 16)
    lines = out.splitlines()
    assert (
        code == 0 and len(lines) == len(plan) + 4 and lines[0].split()[:2] == ["launch", "kernel"]
    )
    assert (
        "not checked on this machine" in lines[-2]
        and "H100 SXM, batch 16, bf16: no faster than" in lines[-1]
    )
    joined = next(line for line in lines if line.startswith("up_blocks.2.resnets.0.norm1 "))
    assert "32x32x64+32" in joined and "32x32x96" in joined  # two maps read as one


def test_plan_of_another_gpu_type_and_size(run):
    code, out, _ = run(
        "info", WEIGHTS, "--plan", "--gpu", "a100", "--size", "64x32", "--batch-size", 4, "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["gpu"] == "A100 SXM 80 GB" and report["size"] == [64, 32]
    for arguments, message in (
        (("--gpu", "a100", "--dtype", "fp8"), "8.9 or newer"),
        (("--size", "30x32"), "divisible by 4"),
        (("--gpu", "tpu"), "h100"),
    ):
        code, _, err = run("info", WEIGHTS, "--plan", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1


def test_cache(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "cache"))
    assert run("info", "--cache")[1].endswith("cache: 0 files, 0.0 MiB\n")
    (tmp_path / "cache" / "checks").mkdir(parents=True)
    (tmp_path / "cache" / "checks" / "a.json").write_text("{}")
    code, out, _ = run("info", "--cache", "--json")
    assert code == 0 and json.loads(out)["files"] == ["checks/a.json"]
    assert (
        "1 files, 0.0 MiB, removed" in run("info", "--cache", "--clear")[1] and not cached_files()
    )
    for arguments, message in (
        (("--clear",), "--cache"),
        ((), "--cache"),
        ((WEIGHTS, "--gpu", "h100"), "--gpu goes with --plan"),
    ):
        code, _, err = run("info", *arguments)
        assert code == 2 and message in err
