"""ddpm-fast bench: messages while it runs, and the hint for baselines that are not installed."""

import json
from importlib import import_module

import pytest

pytest.importorskip("click")
from ddpm_fast.benchmark.runner import Progress, Stage
from ddpm_fast.benchmark.workload import Cause

main = import_module("ddpm_fast.cli.main").main
ACTION = "ddpm_fast.cli.actions.bench"


def fake_compare(weights, batches, dtypes, engines, effort, *, progress, **options):
    """Reports progress as `compare` does, with two baselines that cannot be started."""
    result = dict(cases=[], ceilings=[], kernels=[], network=dict(name="model"))
    causes = {"ONNX Runtime": Cause.NOT_INSTALLED, "diffusers": Cause.UNSUPPORTED}
    for engine in engines:
        progress(Progress(Stage.STARTING, f"fp32: starting {engine}", result, engine))
        if engine in causes:
            progress(Progress(Stage.LEFT_OUT, "left out", result, engine, causes[engine]))
    progress(Progress(Stage.TIMING, f"batch {batches[0]}, {effort.seconds:g} s", result))
    result["cases"].append(dict(batch=batches[0]))
    progress(Progress(Stage.CASE, "TABLE", result))
    progress(Progress(Stage.ROOFLINE, "measuring the roofline", result))
    return result


def test_progress_and_the_hint_for_missing_baselines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"{ACTION}.compare", fake_compare)
    monkeypatch.setattr(f"{ACTION}.draw", lambda *_: None)
    out_file = tmp_path / "a.json"
    line = f"bench latency --weights model --device cpu --out {out_file} --seconds 3 --baselines"
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "plain PyTorch,diffusers,ONNX Runtime"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and out.startswith("TABLE\n\n-> ")
    assert json.loads(out_file.read_text())["cases"] == [dict(batch=1)]
    assert err.splitlines() == [
        "fp32: starting ddpm_fast",
        "fp32: starting plain PyTorch",
        "fp32: starting diffusers",
        "fp32: starting ONNX Runtime",
        "batch 1, 3 s",
        "measuring the roofline",
        "not installed: ONNX Runtime; pip install 'ddpm-fast[baselines]'",
    ]
