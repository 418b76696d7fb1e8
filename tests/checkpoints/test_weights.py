"""The networks that ship."""

from pathlib import Path

import pytest
import torch

from ddpm_fast import Sampler, load_pretrained
from ddpm_fast.utils.numerics import relative_error

pytest.importorskip("safetensors")
DIRECTORIES = sorted(
    p.parent for p in (Path(__file__).parents[2] / "weights").glob("*/model_index.json")
)


def test_some_ship():
    assert [d.name for d in DIRECTORIES] == ["fashion-mnist-32"]


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda d: d.name)
@torch.no_grad()
def test_they_are_what_diffusers_reads(directory):
    diffusers = pytest.importorskip("diffusers")
    assert sum(f.stat().st_size for f in directory.rglob("*")) < 16e6
    ours, theirs = load_pretrained(directory), diffusers.DDPMPipeline.from_pretrained(directory)
    c, (h, w) = ours.unet.config.in_channels, ours.unet.config.size
    x, t, labels = torch.randn(3, c, h, w), torch.tensor([0, 400, 999]), torch.tensor([0, 5, 9])
    assert (
        relative_error(ours.unet(x, t, labels), theirs.unet(x, t, class_labels=labels).sample)
        < 1e-5
    )


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda d: d.name)
def test_they_denoise(directory):
    """Images drawn from them are smooth as clothes are and noise is not: neighbours resemble one another."""
    x = Sampler.from_pretrained(directory, "cpu").sample(
        16, solver="ddim", steps=20, output="float"
    )
    steps = (x[..., 1:] - x[..., :-1]).pow(2).mean() / x.var()
    assert steps < 0.6  # white noise: 2
    assert x.var() > 0.1
