import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.forward_process import merged_noise, q_chain, q_jump, q_posterior, q_step

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(timesteps=400),
    "zero terminal snr": NoiseSchedule.linear().zero_terminal_snr(),
    "short": NoiseSchedule.linear(0.1, 0.3, 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_chain_arrives_where_the_jump_does_with_the_noises_merged(name):
    schedule = SCHEDULES[name]
    torch.manual_seed(0)
    x_0, eps = (
        torch.randn(7, dtype=torch.float64),
        torch.randn(len(schedule), 7, dtype=torch.float64),
    )
    chain, merged = q_chain(schedule, x_0, eps), merged_noise(schedule, eps)
    for t in range(len(schedule)):
        torch.testing.assert_close(
            chain[t], q_jump(schedule, x_0, t, merged[t]), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_chain_and_the_jump_have_one_distribution(name):
    """Mean and variance of the chain, computed step by step, are those of the closed form."""
    schedule = SCHEDULES[name]
    mean, variance = 1.0, 0.0
    for t in range(len(schedule)):
        mean, variance = (
            np.sqrt(1 - schedule.beta[t]) * mean,
            (1 - schedule.beta[t]) * variance + schedule.beta[t],
        )
        assert mean == pytest.approx(np.sqrt(schedule.alpha_bar[t]), rel=1e-11, abs=1e-15)
        assert variance == pytest.approx(schedule.noise_var[t], rel=1e-11)


def test_sampled_chains_are_distributed_as_sampled_jumps():
    scipy = pytest.importorskip("scipy.stats")
    schedule = NoiseSchedule.linear(timesteps=100)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.full((20_000,), 0.7, dtype=torch.float64)
    xs = q_chain(schedule, x_0, torch.randn(100, 20_000, generator=generator, dtype=torch.float64))
    for t in (0, 20, 99):
        jumped = q_jump(
            schedule, x_0, t, torch.randn(20_000, generator=generator, dtype=torch.float64)
        )
        assert scipy.ks_2samp(xs[t].numpy(), jumped.numpy()).pvalue > 1e-3
        exact = scipy.norm(0.7 * schedule.alpha_bar[t] ** 0.5, schedule.noise_var[t] ** 0.5)
        assert scipy.kstest(xs[t].numpy(), exact.cdf).pvalue > 1e-3


def test_merged_noise_is_standard_normal():
    schedule = NoiseSchedule.linear()
    generator = torch.Generator().manual_seed(1)
    merged = merged_noise(
        schedule, torch.randn(1000, 20_000, generator=generator, dtype=torch.float64)
    )
    for t in (0, 10, 500, 999):  # the standard error of a mean is 0.007, of a variance 0.01
        assert abs(float(merged[t].mean())) < 0.03 and abs(float(merged[t].var()) - 1) < 0.04


def test_the_exploding_chain_explodes_and_the_other_does_not():
    schedule = NoiseSchedule.linear()
    generator = torch.Generator().manual_seed(2)
    x_0 = torch.randn(20_000, generator=generator, dtype=torch.float64)
    eps = torch.randn(1000, 20_000, generator=generator, dtype=torch.float64)
    preserved, exploded = (
        float(q_chain(schedule, x_0, eps, exploding)[-1].var()) for exploding in (False, True)
    )
    assert preserved == pytest.approx(1, rel=0.05)
    assert exploded == pytest.approx(1 + schedule.beta.sum(), rel=0.05)  # 11.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name):
    """Prior q(x_{t-1} | x_0) times likelihood q(x_t | x_{t-1}), by completing the square."""
    schedule = SCHEDULES[name]
    x_0, x_t = (
        torch.tensor([0.3, -0.9], dtype=torch.float64),
        torch.tensor([-1.1, 0.2], dtype=torch.float64),
    )
    for t in range(1, len(schedule)):
        alpha, beta = 1 - schedule.beta[t], schedule.beta[t]
        prior_mean, prior_var = np.sqrt(schedule.alpha_bar[t - 1]) * x_0, schedule.noise_var[t - 1]
        precision = 1 / prior_var + alpha / beta
        want = (prior_mean / prior_var + np.sqrt(alpha) * x_t / beta) / precision
        mean, variance = q_posterior(schedule, x_0, x_t, t)
        torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-12)
        assert variance == pytest.approx(1 / precision, rel=1e-9)
    mean, variance = q_posterior(schedule, x_0, x_t, 0)
    assert variance == 0 and torch.equal(mean, x_0)


def test_posterior_by_numerical_integration():
    """Prior times likelihood on a grid."""
    schedule, t, x_0, x_t = NoiseSchedule.linear(), 300, 0.4, -0.3
    grid = np.linspace(-6, 6, 200_001)
    log = -((grid - np.sqrt(schedule.alpha_bar[t - 1]) * x_0) ** 2) / (
        2 * schedule.noise_var[t - 1]
    )
    log -= (x_t - np.sqrt(1 - schedule.beta[t]) * grid) ** 2 / (2 * schedule.beta[t])
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean, variance = q_posterior(
        schedule, torch.tensor(x_0).double(), torch.tensor(x_t).double(), t
    )
    assert float(mean) == pytest.approx((weight * grid).sum(), abs=1e-7)
    assert variance == pytest.approx((weight * (grid - (weight * grid).sum()) ** 2).sum(), rel=1e-6)


def test_refuses_more_noise_than_steps():
    with pytest.raises(ValueError, match="noise for 6 steps; expected 1 to 5"):
        q_chain(SCHEDULES["short"], torch.zeros(3), torch.zeros(6, 3))
    assert torch.equal(
        q_step(SCHEDULES["short"], torch.ones(1), 0, torch.zeros(1)), torch.full((1,), 0.9**0.5)
    )
