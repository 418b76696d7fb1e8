import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.clock import measure

ROOT = Path(__file__).parent.parent
NETWORK = ["self-check", "invariance", "launches", "network"]


def test_gpu_bench_runs_in_tiny(tmp_path):
    """The command that a GPU machine gets, so that it cannot be broken on the day one is there."""
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", tmp_path / "r.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["parts"]) == ["tests", "copy", "kernels", "forward", "training", "likelihood", "sampling", *NETWORK]
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    assert not any(row.get("failed") for row in rows)
    timed = {row["what"] for row in rows if row.get("ms", 0) > 0}
    assert {"copy", "noise", "q_sample", "ddpm_step", "reference forward", "noise_mse", "noise_mse gradient"} <= timed
    assert {"ddpm_step, history", "training", "likelihood", "eager sampling", "FusedUNet bf16"} <= timed
    assert {"conv3x3", "group_norm_silu", "folded_attention"} <= {row["what"] for row in result["parts"]["launches"]["rows"]}
    assert result["environment"]["torch"] == torch.__version__ and "--tiny" in result["command"]
    assert done.stdout.splitlines()[-1].startswith("-> ")


def test_gpu_bench_refuses_unknown_parts_and_goes_past_broken_ones(tmp_path, monkeypatch, capsys):
    from bench import gpu

    monkeypatch.setattr(gpu.Bench, "copy", lambda self: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--only", "copy", "forward", "--out", str(tmp_path / "r.json")])
    assert gpu.main() == 1
    parts = json.loads((tmp_path / "r.json").read_text())["parts"]
    assert parts["copy"]["rows"][0]["summary"] == "ZeroDivisionError: division by zero" and len(parts["forward"]["rows"]) == 4
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--tiny", "--only", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "unknown part nonsense" in done.stderr


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path):
    from bench import gpu

    monkeypatch.setattr(gpu, "ddpm_step", lambda x, *rest: x.mul_(1.001))
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--only", "kernels", "--out", str(tmp_path / "r.json")])
    assert gpu.main() == 1
    (row,) = json.loads((tmp_path / "r.json").read_text())["parts"]["kernels"]["rows"]
    assert "nothing timed" in row["summary"]


def test_measure():
    timing = measure(lambda: torch.ones(1000).sum(), torch.device("cpu"), seconds=0.01)
    assert timing.runs >= 5 and 0 < timing.median < 0.1


def test_training_engines_take_turns_and_agree(capsys, monkeypatch, tmp_path):
    """Tiny sizes: the figures mean nothing, the engines' losses agree or nothing is timed."""
    from bench import training

    arguments = ["--channels", "8,16", "--batch-size", "4", "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    training.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["engine"] for row in result["rows"]] == ["ddpm_fast", "plain PyTorch", "diffusers"]
    assert result["rows"][0]["ours_is_faster_by"] == 1 and "images/s" in capsys.readouterr().out
    monkeypatch.setattr(training.Engine, "_read", lambda self: json.dumps(dict(loss=float(len(self.name)), first=0.0)))
    with pytest.raises(RuntimeError, match="the engines disagree"):
        training.main()


@pytest.mark.kernel
def test_tuning_finds_the_faster_of_two_tiles(monkeypatch, tmp_path):
    """By a clock that counts rows instead of seconds, so that the smallest tile wins; what it writes, FusedUNet takes."""
    from bench import tune
    from bench.clock import Timing
    from ddpm_fast import UNet
    from ddpm_fast.fused_unet import FusedUNet

    def rows_of(call, *_, **__):
        call()
        return Timing(call.args[0].op.tiles.bm * 1e-6, 0.0, 1)

    monkeypatch.setattr(tune, "measure", rows_of)
    monkeypatch.setattr(tune, "candidates", lambda tiles: iter([dict(bm=256, warps=8), dict(bm=64), dict(bm=48)]))
    monkeypatch.setattr(sys, "argv", ["tune", "--tiny", "--dtype", "fp16", "--out", str(tmp_path / "tiles.json")])
    tune.main()
    best = json.loads((tmp_path / "tiles.json").read_text())
    assert best["first_conv sm90 float16 32->16 8x8"] == best["upsample_conv sm90 float16 32->32 4x4"] == dict(bm=64)
    assert not any(key.startswith("conv3x3") for key in best)  # they have 64 rows already in so small a network
    rows = json.loads((tmp_path / "tiles.measured.json").read_text())["rows"]
    assert {row.get("failed", "")[:12] for row in rows if row["changed"] == dict(bm=48)} != {""}  # no power of two: refused
    fused = FusedUNet(UNet(tune.TINY_UNET), 2, "fp16", tiles=best, check=False)
    tiles = {launch.op.name: launch.op.tiles for launch in fused.plan() if hasattr(launch.op, "tiles")}
    assert tiles["first_conv"].bm == tiles["upsample_conv"].bm == tiles["downsample_conv"].bm == tiles["pointwise"].bm == 64
