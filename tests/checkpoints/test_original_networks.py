"""Converted networks compared with the original code, at full size and with random weights.

$DDPM_FAST_ORIGINALS names a folder with checkouts of openai/improved-diffusion,
openai/guided-diffusion, pesser/pytorch_diffusion and NVlabs/edm, under the repositories' names.
The largest network has 553 M parameters: 12 GB of memory.
"""

import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.checkpoints.convert import convert_checkpoint
from ddpm_fast.checkpoints.openai_flags import parse_flags
from ddpm_fast.checkpoints.published import PUBLISHED
from ddpm_fast.utils.numerics import relative_error

ORIGINALS = os.environ.get("DDPM_FAST_ORIGINALS")
pytestmark = pytest.mark.acceptance
T = torch.tensor([3, 700])


@pytest.fixture(autouse=True)
def originals(monkeypatch):
    if ORIGINALS is None:
        pytest.fail("DDPM_FAST_ORIGINALS is not set; give the folder with the original checkouts")
    for name in ("improved-diffusion", "guided-diffusion", "pytorch_diffusion", "edm"):
        monkeypatch.syspath_prepend(Path(ORIGINALS, name))


@torch.no_grad()
def randomize(model):
    """Random weights of the usual size; the original code begins with zeros in many layers."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
        p.copy_(torch.randn(p.shape, generator=generator) * scale)
        if p.ndim == 1:
            p += 0.5
    return model.eval().requires_grad_(False)


def image(side):
    return torch.randn(len(T), 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(tmp_path, model, original, side, t, y=None, **arguments):
    """Relative error in fp32 of the converted network."""
    x = image(side)
    expected = original(x)
    path = tmp_path / "ema_0.9999_1.pt"
    torch.save(model.state_dict(), path)
    conversion = convert_checkpoint(path, trust=True, **arguments)
    path.unlink()  # up to 2.2 GB
    error = relative_error(conversion.unet(x, t, y), expected)
    parameters = sum(p.numel() for p in conversion.unet.parameters())
    print(f"\n{arguments}: {parameters:,} parameters, relative error {error:.2e}")
    assert error < 1e-5
    return conversion


@pytest.mark.parametrize(("name", "side"), [("ho-cifar10", 32), ("ho-lsun-bedroom", 64)])
def test_ho(tmp_path, name, side):
    config = dict(resolution=32, ch_mult=(1, 2, 2, 2), dropout=0.1)
    if name != "ho-cifar10":
        config = dict(resolution=256, ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config |= dict(in_channels=3, out_ch=3, ch=128, num_res_blocks=2, attn_resolutions=(16,))
    model = randomize(import_module("pytorch_diffusion.model").Model(**config))
    model.resolution = side  # attention stays where it is; forward only compares the size
    check(tmp_path, model, lambda x: model(x, T), side, T, published=name)


OPENAI = {
    "iddpm-cifar10": 32,
    "iddpm-imagenet64": 32,
    "iddpm-imagenet64-cond": 16,
    "iddpm-lsun-bedroom": 64,
    "adm-imagenet64": 32,
    "adm-imagenet128": 32,
    "adm-imagenet256-uncond": 32,
    "adm-imagenet512": 64,
}


@pytest.mark.parametrize("name", OPENAI)
def test_openai(tmp_path, name):
    published = PUBLISHED[name]
    package = published.codebase.replace("-", "_")
    flags = parse_flags(published.settings, published.codebase).values
    script_util = import_module(f"{package}.script_util")
    accepted = script_util.create_model.__code__.co_varnames
    arguments = {k: v for k, v in flags.items() if k in accepted}
    arguments |= dict(use_checkpoint=False)
    if "use_fp16" in accepted:
        arguments |= dict(use_fp16=False)  # the weights are stored in fp32
    model = randomize(script_util.create_model(**arguments))
    y = torch.tensor([0, 999]) if flags["class_cond"] else None
    steps = flags["diffusion_steps"]
    t = T.float() * (1000.0 / steps) if flags["rescale_timesteps"] else T
    kwargs = {} if y is None else dict(y=y)
    conversion = check(
        tmp_path, model, lambda x: model(x, t, **kwargs), OPENAI[name], T, y, published=name
    )
    diffusion = import_module(f"{package}.gaussian_diffusion")
    betas = diffusion.get_named_beta_schedule(flags["noise_schedule"], steps)
    assert np.allclose(conversion.checkpoint.schedule.beta, betas, rtol=1e-9)


@pytest.mark.parametrize("t", [-0.7, 437.0])
def test_edm(tmp_path, t):
    network = import_module("training.networks").DhariwalUNet(
        64, 3, 3, label_dim=1000, augment_dim=9, attn_resolutions=[32, 16, 8]
    )
    model, y, t = randomize(network), torch.tensor([0, 999]), torch.full((2,), t)
    one_hot = torch.nn.functional.one_hot(y, 1000).float()
    check(
        tmp_path, model, lambda x: model(x, t, one_hot), 32, t, y,
        codebase="edm", dropout=0.1, network_only=True,
    )  # fmt: skip
