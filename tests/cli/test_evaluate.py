"""ddpm-fast eval: few images, ratios, progress."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, bits_per_dimension, save_pretrained
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.evaluation.metrics import ClassScores

pytest.importorskip("click")
pytest.importorskip("safetensors")
main = import_module("ddpm_fast.cli.main").main
actions = import_module("ddpm_fast.cli.actions.evaluate")
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    options = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    unet = UNet(UNetConfig(**options, attention=(False, True), norm_groups=4))
    save_pretrained(home / "model", unet, NoiseSchedule.linear(timesteps=20))
    np.savez(home / "data.npz", images=IMAGES)
    return home


@pytest.mark.parametrize("count", [1, 2])
def test_bits_per_dimension_of_few_images(home, capsys, count):
    """The minimum of four images is for KID only."""
    line = f"eval --weights {home / 'model'} --data-dir {home / 'data.npz'} --bits-per-dim"
    arguments = [*line.split(), "--images", str(count)]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    sampler = Sampler.from_pretrained(home / "model", "cpu")
    expected = bits_per_dimension(sampler, ImageData(IMAGES[:count])).mean
    assert end.value.code == 0 and report["images"] == count
    assert report["bits_per_dim"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(SystemExit):
        main(arguments)
    out = capsys.readouterr().out
    assert "nan" not in out and ("+-" in out) == (count > 1)


def test_a_class_without_real_images_has_no_ratio():
    drawn, real = ClassScores([0.5, 0.5, 0.0], 0.0, 0.5), ClassScores([0.25, 0.0, 0.75], 0.0, 0.0)
    lines = actions._class_lines(drawn, real)
    assert not any("nan" in line or "inf" in line for line in lines)
    ratios = {line[:28].strip(): line.split()[-1] for line in lines[1:]}
    assert ratios["share of class 0"] == "2.000"
    assert ratios["share of class 2"] == "0.000"
    for name in ("share of class 1", "accuracy", "confidence above 0.8"):
        assert ratios[name] == "-"
