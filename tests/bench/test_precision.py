"""bench.studies.precision: errors per precision, agreement with the calibration, resumption."""

import json
import sys

import pytest

pytest.importorskip("safetensors")


def test_a_short_run(monkeypatch, tmp_path, capsys):
    from bench.studies import precision
    from ddpm_fast import load_pretrained
    from ddpm_fast.engines.fused.calibration import load_calibration

    few = dict(images=2, steps=3)
    for name in ("STATES", "DDPM"):
        monkeypatch.setattr(precision, name, getattr(precision, name) | few)
    monkeypatch.setattr(precision, "BATCH", 2)
    out = tmp_path / "precision.json"
    arguments = [
        "precision",
        "--out",
        str(out),
        "--parts",
        "layers",
        "forward",
        "ddpm",
        "--rows",
        "fp32",
        "bf16",
        "fp8",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    precision.main()
    first = out.read_text()
    rows = json.loads(first)["rows"]
    fp32, bf16, fp8 = (rows[name] for name in ("fp32", "bf16", "fp8"))
    assert fp32["layers"]["largest"] == 0 and fp32["forward"]["error"] < 1e-4
    assert 1e-3 < bf16["layers"]["median"] < 4e-3 < 1e-2 < fp8["layers"]["median"] < 4e-2
    assert bf16["forward"]["by_step"][0] < fp8["forward"]["by_step"][0] < 0.02
    assert bf16["ddpm"]["mean"] > fp8["ddpm"]["mean"] > 20 and "mean" not in fp32["ddpm"]
    weights = precision.WEIGHTS
    calibrated = load_calibration(weights, load_pretrained(weights).unet).layers
    errors = {k: v for k, v in fp8["layers"]["errors"].items() if k in calibrated}
    # the calibration used other images and more steps
    assert len(errors) == 22
    assert all(0.7 < v / calibrated[k].error < 1.4 for k, v in errors.items())
    assert fp8["layers"]["errors"]["conv_out"] < 5e-3  # stays in bf16
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split(" | ")[0] for line in table] == [
        "| type",
        "| ---",
        "| fp32",
        "| bf16",
        "| fp8",
    ]
    precision.main()
    assert out.read_text() == first  # nothing is computed again
