"""ddpm-fast info --plan and --cache."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
    rows = report["plan"]
    assert code == 0 and [row["launch"] for row in rows] == [launch.name for launch in plan]
    assert [(row["flops"], row["bytes"]) for row in rows] == [launch.cost() for launch in plan]
    assert report["launches"] == len(plan) and report["arena_bytes"] == plan.arena.size
    assert abs(report["floor_ms"] - sum(row["floor_us"] for row in rows) / 1e3) < 1e-3
    assert report["predicted_ms"] > report["floor_ms"]
    assert {row["bound"] for row in rows} <= {"launch", "memory", "arithmetic"}

    code, out, _ = run("info", WEIGHTS, "--plan", "--batch-size", 16)
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[:2] == ["launch", "input"]
    table = lines[1 : lines.index("")]
    headings = [line for line in table if len(line.split()) == 1]
    assert len(table) - len(headings) == len(plan) and "down_blocks.0" in headings
    assert "not checked on this machine" in out
    assert "H100 SXM, batch 16, bf16: lower bound" in out
    block = lines.index("up_blocks.2")
    skip = next(line for line in lines[block:] if line.startswith("  resnets.0.norm1 "))
    assert "32x32x64+32" in skip and "32x32x96" in skip  # with a skip connection


@pytest.mark.parametrize(
    "options", [(), ("--dtype", "fp8"), ("--gpu", "b200", "--size", "256x256")]
)
def test_plan_fits_120_columns(run, options):
    code, out, _ = run("info", WEIGHTS, "--plan", *options)
    assert code == 0 and max(map(len, out.splitlines())) <= 120


def test_flops_of_the_plan_and_of_pytorch(run):
    """The plan saves 5/9 of the upsampling convolutions and the time embedding."""
    unet, zero = load_pretrained(WEIGHTS).unet.eval(), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(torch.zeros(1, 1, 32, 32), zero, zero)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    upsampling = sum(n for name, n in flops.items() if name.endswith("upsamplers.0.conv"))
    time = sum(n for name, n in flops.items() if "time_emb" in name and ".linear" not in name)
    report = json.loads(run("info", WEIGHTS, "--plan", "--json")[1])
    defined = json.loads(run("info", WEIGHTS, "--json")[1])["flops"]
    planned = sum(row["flops"] for row in report["plan"]) / report["batch_size"]
    assert planned == defined - upsampling * 5 // 9 - time
    out = run("info", WEIGHTS)[1] + run("info", WEIGHTS, "--plan")[1]
    assert f"{defined / 1e9:.3f} GFLOP per image per step, as PyTorch computes" in out
    assert f"{planned / 1e9:.3f} GFLOP per image per step, " in out
    assert f"{defined / 1e9:.3f} GFLOP in PyTorch" in out


def test_plan_of_another_gpu_type_and_size(run):
    options = "--plan --gpu a100 --size 64x32 --batch-size 4 --json"
    code, out, _ = run("info", WEIGHTS, *options.split())
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
    assert run("info", "--cache")[1].endswith("cache: 0 files, 0 KiB\n")
    (tmp_path / "cache" / "checks").mkdir(parents=True)
    (tmp_path / "cache" / "checks" / "a.json").write_text("{}" * 1024)
    code, out, _ = run("info", "--cache", "--json")
    assert code == 0 and json.loads(out)["files"] == ["checks/a.json"]
    assert "1 file, 2.0 KiB, removed" in run("info", "--cache", "--clear")[1] and not cached_files()
    for arguments, message in (
        (("--clear",), "--cache"),
        ((), "--cache"),
        ((WEIGHTS, "--gpu", "h100"), "--gpu requires --plan"),
    ):
        code, _, err = run("info", *arguments)
        assert code == 2 and message in err
