"""The included networks in weights/."""

from pathlib import Path

import pytest
import torch

from ddpm_fast import Sampler, load_pretrained
from ddpm_fast.utils.numerics import relative_error

pytest.importorskip("safetensors")
DIRECTORIES = sorted(
    p.parent for p in (Path(__file__).parents[2] / "weights").glob("*/model_index.json")
)


def test_included_networks():
    assert [d.name for d in DIRECTORIES] == ["fashion-mnist-32"]


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda d: d.name)
@torch.no_grad()
def test_diffusers_computes_the_same_function(directory):
    diffusers = pytest.importorskip("diffusers")
    assert sum(f.stat().st_size for f in directory.rglob("*")) < 16e6
    unet = load_pretrained(directory).unet
    baseline = diffusers.DDPMPipeline.from_pretrained(directory).unet
    c, (h, w) = unet.config.in_channels, unet.config.size
    x, t, labels = torch.randn(3, c, h, w), torch.tensor([0, 400, 999]), torch.tensor([0, 5, 9])
    exact = baseline(x, t, class_labels=labels).sample
    assert relative_error(unet(x, t, labels), exact) < 1e-5


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda d: d.name)
def test_samples_are_smooth(directory):
    """Adjacent pixels are correlated, unlike those of noise."""
    x = Sampler.from_pretrained(directory, "cpu").sample(
        16, solver="ddim", steps=20, output="float"
    )
    steps = (x[..., 1:] - x[..., :-1]).pow(2).mean() / x.var()
    assert steps < 0.6  # white noise: 2
    assert x.var() > 0.1
