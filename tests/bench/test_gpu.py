"""bench.gpu, bench.studies.training and bench.tools.tune in tiny sizes on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import elementwise
from bench.gpu import __main__ as gpu
from bench.gpu import sampling
from bench.gpu.context import Bench
from bench.gpu.targets import compare_with_targets
from ddpm_fast.benchmark import Progress, Stage
from ddpm_fast.benchmark.timer import measure

CONFIGS = dict(celebahq256="celebahq256", sampling="cifar10")  # part -> network
ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_gpu_bench_runs_in_tiny(tmp_path):
    """The command of a GPU machine, in tiny sizes on the CPU."""
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", tmp_path / "r.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["parts"]) == list(gpu.PARTS)
    rows = {part: measured["rows"] for part, measured in result["parts"].items()}
    assert not any(row.get("failed") for part in rows.values() for row in part)
    timed = {
        row["what"]
        for part in rows.values()
        for row in part
        if row.get("ms", 0) > 0 or row.get("ms_per_step", 0) > 0
    }
    assert {
        "copy",
        "matmul",
        "noise",
        "q_sample",
        "ddpm_step",
        "ddpm_step, history",
        "noise_mse",
        "noise_mse gradient",
    } <= timed
    assert {"training", "likelihood", "FusedUNet bf16"} <= timed
    assert {"conv3x3", "group_norm_silu", "folded_attention"} <= {
        row["what"] for row in rows["launches"]
    }
    engines = {"ddpm_fast", "plain PyTorch", "diffusers"}
    for part in ("celebahq256", "sampling"):
        loops = [row for row in rows[part] if row["network"] == CONFIGS[part]]
        assert {row["engine"] for row in loops} == engines
        assert {row["what"] for row in loops} >= {"ddpm_fast fused bf16", "plain PyTorch bf16"}
        for row in loops:
            assert row["low"] <= row["ms_per_step"] <= row["high"] and row["forward_ms"] > 0
            rate = 1e3 * row["batch"] / row["ms_per_step"]
            assert row["image_steps_per_s"] == pytest.approx(rate) and row["error"] < 0.05
    shipped = [row for row in rows["sampling"] if row["network"] == "fashion-mnist-32"]
    assert {(row["engine"], row["dtype"]) for row in shipped} == {
        ("ddpm_fast", "fp32"),
        ("ddpm_fast", "bf16"),
    }
    reached = [target["reached"] for target in result["targets"]]
    assert reached[2:] == [None] * 5  # not measured
    assert result["environment"]["torch"] == torch.__version__ and "--tiny" in result["command"]
    assert (
        done.stdout.splitlines()[-1].startswith("-> ")
        and "bar 1.7, goal 2" in done.stdout.splitlines()[-2]
    )


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", *map(str, arguments)])
    return gpu.main()


def test_gpu_bench_refuses_unknown_parts_and_continues_after_failures(
    tmp_path, monkeypatch, capsys
):
    def broken(bench):
        yield dict(what="one")
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(gpu.PARTS, "ceilings", (broken, 10))
    assert call(monkeypatch, "--only", "ceilings", "likelihood", "--out", tmp_path / "r.json") == 1
    parts = json.loads((tmp_path / "r.json").read_text())["parts"]
    assert [row.get("summary") for row in parts["ceilings"]["rows"]] == [
        None,
        "ZeroDivisionError: division by zero",
    ]
    assert len(parts["likelihood"]["rows"]) == 2
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--only", "nonsense")
    assert "unknown part nonsense" in capsys.readouterr().err


def test_a_slow_part_is_stopped_and_keeps_its_rows(tmp_path, monkeypatch):
    def slow(bench):
        yield dict(what="quick")
        time.sleep(60)

    monkeypatch.setitem(gpu.PARTS, "ceilings", (slow, 0.02))  # ten times as much in tiny
    assert call(monkeypatch, "--only", "ceilings", "--out", tmp_path / "r.json") == 1
    part = json.loads((tmp_path / "r.json").read_text())["parts"]["ceilings"]
    assert part["seconds"] < 5 and [row["what"] for row in part["rows"]] == ["quick", "ceilings"]
    assert part["rows"][1]["summary"] == "out of time after 0.2 s"


def test_a_stopped_comparison_keeps_its_cases(monkeypatch):
    """Rows of complete cases are yielded before the exception that stops the part."""

    def stopped(*arguments, progress, **options):
        row = dict(engine=sampling.FUSED, name="ddpm_fast fused bf16", error=0.0, peak_bytes=1)
        row |= dict(forward=dict(ms=1.0), loop=dict(ms=2.0, low=1.5, high=3.0))
        case = dict(batch=4, dtype="bf16", steps=2, device="cpu", rows=[row])
        progress(Progress(Stage.CASE, "", dict(cases=[case])))
        raise gpu.OutOfTime

    monkeypatch.setattr(sampling, "compare", stopped)
    result = gpu.run(Bench(tiny=True), "celebahq256", sampling.celebahq256, 60)
    row, last = result["rows"]
    assert (row["engine"], row["ms_per_step"], row["image_steps_per_s"]) == ("ddpm_fast", 8, 500)
    assert last["failed"] and last["summary"] == "out of time after 60 s"


def test_a_wrong_engine_fails_its_comparison(monkeypatch):
    monkeypatch.setattr(sampling.Fused, "loop", lambda self, count, steps: torch.ones(1, 1, 1, 1))
    rows = list(sampling.celebahq256(Bench(tiny=True)))
    assert len(rows) == 1 and rows[0]["failed"]
    assert "its loop returned images of shape (1, 1, 1, 1)" in rows[0]["summary"]


def test_a_run_continues_part_by_part_in_one_file(tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    for names in (["likelihood"], ["ceilings"], ["likelihood"]):
        assert call(monkeypatch, "--only", *names, "--out", out) == 0
    result = json.loads(out.read_text())
    assert list(result["parts"]) == ["ceilings", "likelihood"] and len(result["targets"]) == 7
    out.write_text(json.dumps(result | dict(environment={"gpus": ["another"]})))
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--only", "ceilings", "--out", out)
    assert "another machine" in capsys.readouterr().err


def test_targets():
    def row(engine, dtype, batch, rate):
        return dict(
            engine=engine, dtype=dtype, batch=batch, network="cifar10", image_steps_per_s=rate
        )

    rows = [
        row("torch.compile", "bf16", 256, 20_000),
        row("ddpm_fast", "bf16", 256, 36_000),
        row("ddpm_fast", "fp8", 256, 56_000),
        row("ddpm_fast", "bf16", 1, 1_500),
        row("ddpm_fast", "fp8", 1024, 40_000),
    ]
    kernels = [
        dict(what="q_sample", dtype="float32", share_of_copy=0.8),
        dict(what="ddpm_step", dtype="float32", share_of_copy=0.8),
    ]
    compared = compare_with_targets(dict(sampling=dict(rows=rows), kernels=dict(rows=kernels)))
    assert [target["reached"] for target in compared] == [
        "goal",
        "neither",
        None,
        "neither",
        "neither",
        "goal",
        "bar",
    ]
    assert compared[-1]["value"] == 1.8 and compared[3]["value"] == pytest.approx(1e3 / 1500)


def test_budgets_are_within_eight_minutes():
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 8 * 60


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(elementwise, "ddpm_step", lambda x, *rest: x.mul_(1.001))
    assert call(monkeypatch, "--only", "kernels", "--out", tmp_path / "r.json") == 1
    (row,) = json.loads((tmp_path / "r.json").read_text())["parts"]["kernels"]["rows"]
    assert "nothing timed" in row["summary"]


def test_measure():
    timing = measure(lambda: torch.ones(1000).sum(), torch.device("cpu"), seconds=0.01)
    assert timing.runs >= 5 and 0 < timing.median < 0.1


@pytest.mark.full
def test_training_engines_are_timed_if_their_losses_agree(capsys, monkeypatch, tmp_path):
    from bench.studies import training

    arguments = [
        "--channels",
        "8,16",
        "--batch-size",
        "4",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "r.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    training.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["engine"] for row in result["rows"]] == ["ddpm_fast", "plain PyTorch", "diffusers"]
    assert result["rows"][0]["speedup"] == 1 and "images/s" in capsys.readouterr().out
    losses = iter([1.0, 1.0, 2.0])
    monkeypatch.setattr(
        training.JsonWorker,
        "receive",
        lambda self, timeout=None: dict(loss=next(losses), seconds=0.0),
    )
    with pytest.raises(RuntimeError, match="the losses of the engines on one input differ"):
        training.main()


@pytest.mark.kernel
@pytest.mark.full
def test_tuner_writes_the_fastest_tiles(monkeypatch, tmp_path):
    """The replaced timer returns the rows of a tile, so that the smallest tile is the fastest."""
    from bench.tools import tune
    from ddpm_fast import UNet
    from ddpm_fast.benchmark.timer import Timing
    from ddpm_fast.engines.fused.unet import FusedUNet

    def rows_of(call, *_, **__):
        call()
        return Timing(call.args[0].op.tiles.block_m * 1e-6, 0.0, 1)

    monkeypatch.setattr(tune, "measure", rows_of)
    monkeypatch.setattr(
        tune,
        "candidates",
        lambda tiles: iter([dict(block_m=256, warps=8), dict(block_m=64), dict(block_m=48)]),
    )
    monkeypatch.setattr(
        sys, "argv", ["tune", "--tiny", "--dtype", "fp16", "--out", str(tmp_path / "tiles.json")]
    )
    tune.main()
    best = json.loads((tmp_path / "tiles.json").read_text())
    assert best["conv_in sm90 float16 32->16 8x8"] == dict(block_m=64)
    # in so small a network the default of the others has 64 rows
    assert {key.split()[0] for key in best} == {"conv_in", "conv1x1"}
    rows = json.loads((tmp_path / "tiles.measured.json").read_text())["rows"]
    # 48 is not a power of two
    assert any("failed" in row for row in rows if row["changed"] == dict(block_m=48))
    fused = FusedUNet(UNet(tune.TINY_UNET), 2, "fp16", tiles=best, check=False)
    tiles = {
        launch.op.name: launch.op.tiles for launch in fused.plan() if hasattr(launch.op, "tiles")
    }
    assert (
        tiles["conv_in"].block_m
        == tiles["conv_upsample"].block_m
        == tiles["conv_downsample"].block_m
        == tiles["conv1x1"].block_m
        == 64
    )
