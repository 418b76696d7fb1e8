"""Benchmark suites, bench.run_all and bench.report: values, accuracy checks, committed results."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import run_all
from bench.report import figures, fits, predictions
from bench.report.committed import NETWORKS, commit, cpus
from bench.workloads import ROOT, TINY_UNET
from ddpm_fast import NoiseSchedule, UNet, save_pretrained
from ddpm_fast.benchmark.runner import Effort


def pytest_benchmark(*arguments, path=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    if path is not None:
        env["PYTHONPATH"] = f"{path}:{env.get('PYTHONPATH', '')}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tiny",
        "--benchmark-max-time=0.001",
        "--benchmark-min-rounds=1",
        *arguments,
    ]
    return subprocess.run(
        [str(a) for a in command], cwd=ROOT, capture_output=True, text=True, env=env
    )


@pytest.mark.full
def test_every_suite_runs(tmp_path):
    files = ["bench/bench_kernels.py", "bench/bench_unet.py"]
    which = "(test_elementwise and 2048x and channels_last) or test_network or test_forward"
    done = pytest_benchmark(*files, "-k", which, f"--benchmark-json={tmp_path / 'r.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    info = {b["name"]: b["extra_info"] for b in benchmarks}
    q_sample = next(v for k, v in info.items() if "q_sample-kernel-fp32" in k)
    assert q_sample["error"] <= 1e-6 and q_sample["gb_per_s"] > 0 and q_sample["share_of_copy"] > 0
    forward = [v for k, v in info.items() if k.startswith("test_forward")]
    assert forward and all(v["error"] < 1e-5 and v["images_per_s"] > 0 for v in forward)
    assert any(k.startswith("test_network") for k in info)
    assert "run on a GPU" in done.stdout  # the reason of skipped tests


@pytest.mark.full
def test_a_planted_wrong_kernel_is_not_timed(tmp_path):
    (tmp_path / "planted.py").write_text(
        "import bench.elementwise as e\n"
        "right = e.q_sample\n"
        "e.q_sample = lambda *a: right(*a) * 1.00001\n"
    )
    arguments = (
        "bench/bench_kernels.py",
        "-p",
        "planted",
        "-k",
        "q_sample-kernel-fp32-channels_last-2048x",
        "-rs",
    )
    done = pytest_benchmark(*arguments, f"--benchmark-json={tmp_path / 'r.json'}", path=tmp_path)
    assert (
        done.returncode == 1
        and "kernels differ from their references by 1.0e-05: nothing timed" in done.stdout
    )
    text = (tmp_path / "r.json").read_text() if (tmp_path / "r.json").exists() else ""
    assert not text or not json.loads(text)["benchmarks"]


@pytest.mark.full
def test_run_all_writes_a_result_and_a_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def tiny(name, folder):
        torch.manual_seed(0)
        save_pretrained(folder / name, UNet(TINY_UNET), NoiseSchedule.linear())
        return folder / name

    monkeypatch.setattr(run_all, "weights_of", tiny)
    arguments = [
        "--networks",
        "cifar10",
        "--batches",
        "1",
        "2",
        "--baselines",
        "ddpm_fast",
        "plain PyTorch",
        "--out",
        tmp_path,
    ]
    monkeypatch.setattr(sys, "argv", ["run_all", *map(str, arguments)])
    monkeypatch.setattr(
        run_all,
        "Effort",
        lambda seconds, warm_start_limit: Effort(0, 0.002, 0, 2, warm_start_limit),
    )
    run_all.main()
    result = json.loads((tmp_path / "cifar10.json").read_text())
    assert [case["batch"] for case in result["cases"]] == [1, 2]
    assert (tmp_path / "cifar10.png").stat().st_size > 10_000
    assert "plain PyTorch fp32" in capsys.readouterr().out


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("machine", cpus(*NETWORKS), ids=lambda machine: machine.folder.name)
def test_ddpm_fast_is_fastest_in_every_committed_row(machine, name):
    for case in machine.read(name)["cases"]:
        assert len(case["rows"]) >= 6, case["left_out"]
        for row in case["rows"][1:]:
            for what in ("forward", "loop"):
                assert row[what]["speedup"] > 1, (name, case["batch"], row["engine"], what)
                assert row["error"] < 1e-5


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("batch", {0: 3.0, 1: 0.5}),
        ("size", {2: 0.25}),
        ("size", {0: 1.0, 4: 0.1}),
        ("channels", {0: 1.0, 1: 2.0, 2: 0.5}),
    ],
)
def test_fits_recover_the_factors(name, factors):
    rows = [dict(x=n, ms=sum(f * n**p for p, f in factors.items())) for n in (1, 2, 4, 8, 16, 32)]
    fit = fits.Fit.of(name, rows)
    fitted = dict(zip(fit.powers, fit.factors, strict=True))
    assert all(
        fitted.get(p, 0) == pytest.approx(factors.get(p, 0), abs=1e-9) for p in fits.POWERS[name]
    )
    assert fit.max_error < 1e-9 and fit(3) == pytest.approx(
        sum(f * 3**p for p, f in factors.items())
    )


def test_predictions_are_consistent():
    """Time per image falls with the batch; a step is a forward pass and 20 bytes per element."""
    for dtype in ("bf16", "fp8"):
        series = predictions.series(dtype)
        per_image = [r["ms"] / r["x"] for r in series["batch"]]
        assert per_image == sorted(per_image, reverse=True) and per_image[-2] < 1.02 * per_image[-1]
        p = predictions.predict("cifar10", 256, dtype)
        assert series["batch"][8]["ms"] == p.step == pytest.approx(sum(p.parts.values()))
        update = 256 * 3 * 32 * 32 * 20 / predictions.H100.copy + 2 * predictions.roofline.GAP
        assert p.step == pytest.approx(p.forward + 1e3 * update)
        assert all(fits.Fit.of(k, rows).max_error < 0.2 for k, rows in series.items())


@pytest.mark.full
def test_figures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures.draw(tmp_path)
    names = ("scaling-cpu", "scaling-h100", "roofline-h100", "bench-cpu-amd-zen4-cifar10")
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in names)


def test_results_are_committed_per_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.committed.RESULTS", tmp_path / "committed")
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(ValueError, match="has no results; run `make bench` first"):
        commit(new, "cpu-new")
    for name in ("cifar10", "fashion-mnist-32", "precision"):
        (new / f"{name}.json").write_text(json.dumps(dict(environment=dict(cpu="New"), cases=[])))
    with pytest.raises(ValueError, match="expected the name of a CPU"):
        commit(new, "results")
    written = {
        path.relative_to(tmp_path / "committed").as_posix() for path in commit(new, "cpu-new")
    }
    assert written == {
        "cpu-new/cifar10.json",
        "cpu-new/fashion-mnist-32.json",
        "accuracy/precision.json",
    }
    assert [machine.title for machine in cpus(*NETWORKS)] == ["new"]
    (new / "cifar10.json").write_text(json.dumps(dict(environment=dict(cpu="Another"))))
    with pytest.raises(ValueError, match="is of Another; expected New"):
        commit(new, "cpu-new")
