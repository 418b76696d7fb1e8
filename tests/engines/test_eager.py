"""Eager engine: the comparison of torch.compile with the network."""

import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.engines.eager import batch_variation


def network(variation):
    """A network whose results differ by `variation` in batches of 16 and more."""

    def model(x_t, t):
        return x_t * (1 + variation * (len(x_t) >= 16))

    return model


def sampler_of(monkeypatch, off, variation):
    """A sampler whose compiled network has a relative error of `off` in small batches."""
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: lambda x, t: x * (1 + off))
    return Sampler(network(variation), NoiseSchedule.linear(), (1, 8, 8), engine="compile")


@pytest.mark.parametrize("count", [1, 3, 16, 20])
def test_batch_variation(count):
    x, t = torch.randn(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64)
    assert batch_variation(network(3e-5), x, t) == pytest.approx(3e-5, rel=0.1)
    assert batch_variation(network(0.0), x, t) == 0


@pytest.mark.parametrize("count", [1, 16])
def test_rounding_within_the_batch_variation_is_accepted(monkeypatch, count):
    """In batches of 16 the network has an error of 1.5e-5 and the compiled one has none."""
    off = 0.0 if count == 16 else 2.5e-5
    sampler_of(monkeypatch, off, 1.5e-5).sample(count, steps=1)


@pytest.mark.parametrize(("off", "variation"), [(1.5e-5, 0.0), (4e-5, 1.5e-5), (float("nan"), 1.0)])
def test_larger_errors_raise(monkeypatch, off, variation):
    with pytest.raises(RuntimeError, match=r"relative error of torch\.compile is"):
        sampler_of(monkeypatch, off, variation).sample(2, steps=1)
