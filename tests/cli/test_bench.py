"""ddpm-fast bench: what is logged while it runs, and what is missing."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast import NoiseSchedule, UNet, UNetConfig, save_pretrained

pytest.importorskip("click")
pytest.importorskip("safetensors")
main = import_module("ddpm_fast.cli.main").main
ACTIONS = "ddpm_fast.cli.actions.bench"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    options = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    unet = UNet(UNetConfig(**options, attention=(False, True), norm_groups=4))
    save_pretrained(tmp_path / "model", unet, NoiseSchedule.linear(timesteps=20))
    return tmp_path / "model"


class Comparison:
    """Comparison in which two baselines cannot be started."""

    def __init__(self, setting, engines, batch, effort, log):
        self.processes = [SimpleNamespace(name=engine) for engine in engines]
        self.left_out = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, engine, batch):
        reasons = {
            "ONNX Runtime": "cannot be exported to: No module named 'onnxscript'",
            "diffusers": "has one layers_per_block for all levels",
        }
        if engine in reasons:
            self.left_out[engine] = reasons[engine]
        else:
            self.processes.append(SimpleNamespace(name=engine))

    def case(self, batch, steps):
        return dict(batch=batch, rows=[dict(warm_first_image_s=1.0)], left_out=self.left_out)


def test_progress_and_the_hint_at_missing_baselines(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"{ACTIONS}.comparison", Comparison)
    monkeypatch.setattr(f"{ACTIONS}.results.table_of", lambda case, network: "TABLE")
    monkeypatch.setattr(f"{ACTIONS}.ceilings", lambda *_: {})
    monkeypatch.setattr(f"{ACTIONS}.kernel_times", lambda *_: [])
    monkeypatch.setattr(f"{ACTIONS}.draw", lambda *_: None)
    line = f"bench latency --weights {weights} --device cpu --out {tmp_path / 'a.json'}"
    names = ["plain PyTorch,diffusers,ONNX Runtime"]
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "--seconds", "3", "--baselines", *names])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and "TABLE" in out
    assert "first image: from the start of a process, with empty caches, then with filled" in out
    assert err.splitlines() == [
        "fp32: starting ddpm_fast",
        "fp32: starting plain PyTorch",
        "fp32: starting diffusers",
        "fp32: starting ONNX Runtime",
        "batch 1: ddpm_fast, plain PyTorch in turns, 3 s or more",
        "not installed: ONNX Runtime; pip install 'ddpm-fast[baselines]'",
        "measuring the roofline and every kernel",
    ]
