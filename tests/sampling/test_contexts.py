"""Images do not depend on the caller's context: autocast, default dtype and device, pickling."""

import copy
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.sampling import fork

SCHEDULE = NoiseSchedule.linear(timesteps=50)
OPTIONS = dict(solver="ddim", steps=2, output="float")
ENGINES = ("reference", "cpu")


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype  # sampling restores it
        torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "autocast bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default bf16": lambda: default_dtype(torch.bfloat16),
    "default fp64": lambda: default_dtype(torch.float64),
    "device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
}


def unet():
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        layers=1,
        attention=(False, True),
        norm_groups=4,
        num_classes=3,
    )
    return UNet(config).eval()


class Custom(nn.Module):
    """A network with tensors of the default dtype in its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x) + torch.linspace(0, 1, 8)


def sampler_of(model, engine="auto"):
    return Sampler(model, SCHEDULE, (1, 8, 8), engine=engine)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_images_do_not_depend_on_the_context(engine, context):
    """Of a sampler that is constructed outside the context, and of one constructed inside."""
    if engine == "cpu":
        pytest.importorskip("llvmlite")
    model = unet()
    outside = sampler_of(model, engine)
    expected = outside.sample(3, **OPTIONS)
    with CONTEXTS[context]():
        inside = sampler_of(model, engine)
        results = [sampler.sample(3, **OPTIONS) for sampler in (outside, inside)]
        x_t, _ = inside.invert(expected, steps=2, labels=1)
    for result in results:
        assert torch.equal(result, expected) and result.dtype == torch.float32
    assert torch.equal(x_t, outside.invert(expected, steps=2, labels=1)[0])


@pytest.mark.parametrize("context", [c for c in CONTEXTS if "meta" not in c])
def test_images_of_another_module_do_not_depend_on_the_context(context):
    torch.manual_seed(0)
    sampler = sampler_of(Custom())
    expected = sampler.sample(3, **OPTIONS)
    with CONTEXTS[context]():
        assert torch.equal(sampler.sample(3, **OPTIONS), expected)


def test_the_callers_context_is_restored_between_batches():
    model, inside = unet(), []

    def callback(step, t, x):
        inside.append(torch.is_autocast_enabled("cpu"))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in sampler_of(model).stream(2, batch_size=1, callback=callback, **OPTIONS):
            inside.append(torch.is_autocast_enabled("cpu"))
    assert inside == [True] * 6


@pytest.mark.parametrize("engine", ENGINES)
def test_pickled_and_copied_samplers_draw_the_same_images(engine):
    if engine == "cpu":
        pytest.importorskip("llvmlite")
    sampler = sampler_of(unet(), engine)
    expected = sampler.sample(2, **OPTIONS)
    for other in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
        assert torch.equal(other.sample(2, **OPTIONS), expected)
        assert other.model is not sampler.model and repr(other) == repr(sampler)


def test_a_fork_after_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(fork, "_computed_in", os.getpid() + 1)  # as after a fork
    for call in (lambda: sampler_of(Custom()), lambda: fork.check()):
        with pytest.raises(RuntimeError, match=r"forked from process .*'spawn'"):
            call()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # no thread pool: a fork is safe
    assert sampler_of(Custom()).sample(1, steps=1).shape == (1, 8, 8, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is unavailable")
def test_a_forked_child_raises_instead_of_waiting():
    code = (
        "import os, torch\n"
        "from ddpm_fast import NoiseSchedule, Sampler\n"
        "torch.set_num_threads(2)\n"
        "sampler = Sampler(lambda x, t: x * 0.5, NoiseSchedule.linear(timesteps=9), (1, 8, 8))\n"
        "sampler.sample(1, steps=1)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        sampler.sample(1, steps=1)\n"
        "    except RuntimeError as error:\n"
        "        os._exit(0 if 'spawn' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "sampler.sample(1, steps=1)\n"  # the parent still works
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
