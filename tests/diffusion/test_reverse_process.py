"""Algorithm 2 against closed forms, and `Sampler` against Algorithm 2 in fp64."""

import copy
from functools import cache

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, Trajectory, UNet, UNetConfig, p_sample_loop
from ddpm_fast.diffusion.reverse_process import p_mean, sampler_noise
from ddpm_fast.utils.numerics import relative_error

LINEAR = NoiseSchedule.linear()
MEAN, STD = 0.3, 0.25  # of Gaussian data
SHAPE = (1, 8, 8)


def gaussian_denoiser(x_t, t):
    """The exact eps of data ~ N(MEAN, STD^2)."""
    bar, noise = LINEAR.alpha_bar[t[0]], LINEAR.noise_var[t[0]]
    return np.sqrt(noise) * (x_t - np.sqrt(bar) * MEAN) / (bar * STD**2 + noise)


@pytest.mark.parametrize(
    ("variance", "ratio"), [("fixed_small", 0.985), ("fixed_large", 1.004)], ids=str
)
def test_gaussian_chain_has_the_exact_mean_and_variance(variance, ratio):
    """The chain is affine in x_T and every z, so unit impulses determine its distribution."""
    steps = len(LINEAR)
    impulses = torch.eye(steps + 1, dtype=torch.float64)  # x_T, z of steps 0 ... T-2, and none
    column = lambda i: impulses[:, i].view(-1, 1, 1, 1)
    impulses[-1, -1] = 0
    x_0 = p_sample_loop(
        gaussian_denoiser, LINEAR, column(0), lambda i: column(i + 1), variance
    ).flatten()
    mean, var = 0.0, 1.0
    sigma_2 = LINEAR.beta if variance == "fixed_large" else LINEAR.posterior_var
    for t in reversed(range(steps)):  # mu(x) = slope x + offset; no noise at the last step
        spread = LINEAR.alpha_bar[t] * STD**2 + LINEAR.noise_var[t]
        slope = (1 - LINEAR.beta[t] / spread) / np.sqrt(LINEAR.alpha[t])
        offset = LINEAR.beta[t] / spread * np.sqrt(LINEAR.alpha_bar[t] / LINEAR.alpha[t]) * MEAN
        mean, var = slope * mean + offset, slope**2 * var + (sigma_2[t] if t > 0 else 0)
    assert float(x_0[-1]) == pytest.approx(mean, rel=1e-10)
    assert float((x_0[:-1] - x_0[-1]).square().sum()) == pytest.approx(var, rel=1e-10)
    assert mean == pytest.approx(MEAN, abs=1e-3)
    assert np.sqrt(var) / STD == pytest.approx(ratio, abs=1e-3)


def test_the_mean_of_eq_11_is_that_of_eq_7():
    torch.manual_seed(0)
    x_t, eps = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    for t in (0, 1, 500, 999):
        unclipped, posterior = (p_mean(LINEAR, x_t, t, eps, clip) for clip in (None, float("inf")))
        torch.testing.assert_close(unclipped, posterior, rtol=1e-10, atol=1e-12)


def test_every_step_is_reported_and_the_last_adds_no_noise():
    schedule, trajectory, requested = NoiseSchedule.linear(timesteps=5), Trajectory(), []

    def noise(i):
        requested.append(i)
        return torch.ones(2, *SHAPE)

    x_T = torch.randn(2, *SHAPE)
    x_0 = p_sample_loop(lambda x, t: x, schedule, x_T, noise, callback=trajectory)
    assert requested == [0, 1, 2, 3] and trajectory.t == [4, 3, 2, 1, 0]
    assert torch.equal(trajectory.x[-1], x_0)
    zs = [torch.ones(2, *SHAPE)] * 4
    assert torch.equal(p_sample_loop(lambda x, t: x, schedule, x_T, zs.__getitem__), x_0)


def test_noise_is_standard_normal_by_default():
    schedule, x_T = NoiseSchedule.linear(0.1, 0.3, 2), torch.zeros(1000, *SHAPE)
    x_1 = []
    torch.manual_seed(0)
    record = lambda i, t, x: x_1.append(x) if t == 1 else None
    p_sample_loop(lambda x, t: 0 * x, schedule, x_T, callback=record)
    assert float(x_1[0].std()) == pytest.approx(0.3**0.5, rel=0.01)


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="variance 'learned'; expected one of fixed_large"):
        p_sample_loop(gaussian_denoiser, LINEAR, torch.zeros(1, *SHAPE), variance="learned")


# ---- Sampler


def tiny_unet():
    torch.manual_seed(0)
    levels = dict(channels=(8, 16), layers=1, attention=(False, True), norm_groups=4)
    unet = UNet(UNetConfig(sample_size=8, in_channels=1, out_channels=1, **levels)).eval()
    for p in unet.parameters():  # so that norms and biases matter
        p.data += 0.1 * torch.randn_like(p)
    return unet


@cache
def algorithm_2(timesteps, variance, clip):
    """Images 3 and 4 of seed 9 in fp64."""
    x_T, noise = sampler_noise(9, [3, 4], SHAPE)
    model, schedule = copy.deepcopy(tiny_unet()).double(), NoiseSchedule.linear(timesteps=timesteps)
    return p_sample_loop(model, schedule, x_T.double(), noise, variance, clip)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("timesteps", "variance", "clip"),
    [(1000, "fixed_large", 1.0), (100, "fixed_small", 1.0), (100, "fixed_large", None)],
    ids=str,
)
def test_sampler_is_algorithm_2(timesteps, variance, clip, engine, figure):
    if engine == "cpu":
        pytest.importorskip("llvmlite")
    schedule = NoiseSchedule.linear(timesteps=timesteps)
    sampler = Sampler(tiny_unet(), schedule, SHAPE, variance=variance, clip=clip, engine=engine)
    x_0 = sampler.sample([3, 4], seed=9, output="float")
    error = relative_error(x_0, algorithm_2(timesteps, variance, clip))
    figure(f"Sampler, {engine}, T = {timesteps}: relative error to Algorithm 2", f"{error:.1e}")
    assert error < 1e-5
