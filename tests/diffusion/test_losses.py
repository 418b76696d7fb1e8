import math

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, training_loss
from ddpm_fast.diffusion.losses import Objective, min_snr_weights
from ddpm_fast.diffusion.prediction import conversion, convert
from ddpm_fast.diffusion.presets import PRESETS
from ddpm_fast.diffusion.vlb import Bound, discretised_gaussian_log_likelihood, gaussian_kl
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.q_sample import q_sample
from ddpm_fast.training.timestep_sampler import HISTORY, LossAware

LINEAR = NoiseSchedule.linear()
MEAN, STD = 0.3, 0.25


def test_kl_is_torchs():
    torch.manual_seed(0)
    mean_1, log_var_1, mean_2, log_var_2 = torch.randn(4, 100, dtype=torch.float64)
    p, q = (
        torch.distributions.Normal(m, (v / 2).exp())
        for m, v in ((mean_1, log_var_1), (mean_2, log_var_2))
    )
    want = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(
        gaussian_kl(mean_1, log_var_1, mean_2, log_var_2), want, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("sigma", [1e-3, 0.0074, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.0, 0.123, 0.99])
@pytest.mark.parametrize("erf", [True, False])
def test_the_decoder_is_a_distribution_over_256_levels(mean, sigma, erf):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_sigma = torch.full_like(levels, math.log(sigma))
    total = (
        discretised_gaussian_log_likelihood(levels, torch.full_like(levels, mean), log_sigma, erf)
        .exp()
        .sum()
    )
    assert float(total) == pytest.approx(1, abs=1e-9)


def test_the_decoder_is_exact_far_out():
    """Against 60 digits, for levels up to fifty deviations away."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    x_0, sigma = 57 / 127.5 - 1, 0.01
    for mean in (x_0, x_0 + 0.003, x_0 - 0.1, x_0 + 0.5, x_0 - 0.5):
        lower, upper = ((x_0 - mean + side / 255) / sigma for side in (-1, 1))
        side = -1 if lower > 0 else 1
        want = mpmath.log(abs(mpmath.ncdf(side * upper) - mpmath.ncdf(side * lower)))
        got = discretised_gaussian_log_likelihood(
            *(torch.tensor(v, dtype=torch.float64) for v in (x_0, mean, math.log(sigma)))
        )
        assert float(got) == pytest.approx(float(want), rel=1e-9)


def test_tanh_is_openais_approximation():
    """Close to the exact value near the mean, and 1e-12 far away."""
    x_0, log_sigma = (
        torch.zeros(2, dtype=torch.float64),
        torch.full((2,), math.log(0.01), dtype=torch.float64),
    )
    mean = torch.tensor([0.004, 0.9], dtype=torch.float64)
    exact, tanh = (
        discretised_gaussian_log_likelihood(x_0, mean, log_sigma, erf) for erf in (True, False)
    )
    assert abs(float(exact[0] - tanh[0])) < 1e-3 and exact[0] != tanh[0]
    assert float(tanh[1]) == pytest.approx(math.log(1e-12)) and float(exact[1]) < -3900


# ---- the bound on Gaussian data, in closed form


def denoiser(schedule, x_t, t, prediction="eps"):
    """The exact denoiser of N(MEAN, STD^2), x_t fp64 [B, 1, H, W]."""
    a, n = (
        torch.from_numpy(np.sqrt(v))[t][:, None, None, None]
        for v in (schedule.alpha_bar, schedule.noise_var)
    )
    eps = n * (x_t - a * MEAN) / (a * a * STD**2 + n * n)
    of_x, of_out = conversion("eps", prediction, a, n)
    return of_x * x_t + of_out * eps


def decoder_variance(schedule, variance, preset):
    small = schedule.posterior_var[1]
    return schedule.beta[0] if variance == "fixed_large" and preset == "exact" else small


def closed_form(schedule, variance, preset):
    """E[L_{t-1}] for every t >= 1 in bits, and E[L_0] of the continuous Gaussian."""
    small = schedule.posterior_var[1:]
    var = small if variance == "fixed_small" else schedule.beta[1:]
    # variance of x_0 given x_t
    left = STD**2 * schedule.noise_var / (schedule.alpha_bar * STD**2 + schedule.noise_var)
    kl = 0.5 * (
        small / var
        - 1
        - np.log(small / var)
        + schedule.posterior_mean_x_0[1:] ** 2 * left[1:] / var
    )
    first = decoder_variance(schedule, variance, preset)
    l_0 = 0.5 * (np.log(2 * np.pi * first) + left[0] / first)
    a, n = schedule.alpha_bar[-1], schedule.noise_var[-1]
    prior = 0.5 * (n + a * (STD**2 + MEAN**2) - 1 - np.log(n))
    return kl / np.log(2), l_0 / np.log(2), prior / np.log(2)


@pytest.mark.parametrize(
    ("variance", "preset", "gap"),
    [
        ("fixed_small", "exact", 0.7982),
        ("fixed_large", "exact", 0.0075),
        ("fixed_large", "openai", 0.1707),
    ],
)
def test_the_bound_lies_above_the_likelihood_by_this(variance, preset, gap, figure):
    """For N(0.3, 0.25^2) and the exact denoiser: the cost of a fixed variance."""
    kl, l_0, prior = closed_form(LINEAR, variance, preset)
    entropy = 0.5 * np.log2(2 * np.pi * np.e * STD**2)
    difference = kl.sum() + l_0 + prior - entropy
    figure(
        f"bound above likelihood, N(0.3, 0.25^2), {variance}, preset {preset}: bits",
        f"{difference:.4f}",
    )
    assert difference == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize(
    ("variance", "preset"),
    [("fixed_small", "exact"), ("fixed_large", "exact"), ("fixed_large", "openai")],
)
def test_terms_on_gaussian_data_are_the_closed_form(variance, preset, prediction):
    """Monte Carlo over 4,000 pixels per timestep: z-scores of 999 terms and of their sum."""
    schedule = LINEAR
    bound = Bound(schedule, prediction, variance, clip=None, preset=PRESETS[preset])
    kl, _, prior = closed_form(schedule, variance, preset)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1000)
    x_0 = MEAN + STD * torch.randn(1000, 1, 80, 50, generator=generator, dtype=torch.float64)
    eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    a, n = (
        torch.from_numpy(np.sqrt(v))[:, None, None, None]
        for v in (schedule.alpha_bar, schedule.noise_var)
    )
    x_t = a * x_0 + n * eps
    got = bound.terms(denoiser(schedule, x_t, t, prediction), x_0, x_t, t).numpy()
    # a KL is a constant plus a squared Gaussian; the mean of 4000 squares has a relative standard
    # error of sqrt(2 / 4000)
    small = schedule.posterior_var[1:]
    var = small if variance == "fixed_small" else schedule.beta[1:]
    random = kl - 0.5 * (small / var - 1 - np.log(small / var)) / np.log(2)
    error = random * np.sqrt(2 / 4000)
    z = (got[1:] - kl) / error
    assert np.abs(z).max() < 5 and abs(z.mean()) < 4 / np.sqrt(999)
    assert got[1:].sum() == pytest.approx(kl.sum(), abs=5 * np.sqrt((error**2).sum()))
    assert float(bound.prior(x_0).mean()) == pytest.approx(prior, rel=0.05)


@pytest.mark.parametrize(
    ("variance", "preset"), [("fixed_small", "exact"), ("fixed_large", "exact")]
)
def test_l_0_on_gaussian_data_is_the_integral(variance, preset):
    """E[L_0] with 256 levels, by integration over x_0 and over the error of the denoiser."""
    stats = pytest.importorskip("scipy.stats")
    bound = Bound(LINEAR, "eps", variance, clip=None, preset=PRESETS[preset])
    sigma = np.sqrt(decoder_variance(LINEAR, variance, preset))
    a, n = np.sqrt(LINEAR.alpha_bar[0]), np.sqrt(LINEAR.noise_var[0])
    shrink = a * STD**2 / (a * a * STD**2 + n * n)
    x, e = np.linspace(-6, 6, 1201), np.linspace(-6, 6, 401)
    x_0 = MEAN + STD * x[:, None]
    mean = MEAN + shrink * (a * x_0 + n * e - a * MEAN)
    upper, lower = ((x_0 - mean + side / 255) / sigma for side in (1, -1))
    upper, lower = np.where(x_0 > 0.999, np.inf, upper), np.where(x_0 < -0.999, -np.inf, lower)
    value = -np.log2(
        np.where(
            lower > 0,
            stats.norm.sf(lower) - stats.norm.sf(upper),
            stats.norm.cdf(upper) - stats.norm.cdf(lower),
        )
    )
    weight = stats.norm.pdf(x)[:, None] * stats.norm.pdf(e)
    want = (value * weight).sum() / weight.sum()
    generator = torch.Generator().manual_seed(0)
    images = MEAN + STD * torch.randn(100, 1, 100, 100, generator=generator, dtype=torch.float64)
    eps = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    x_t, t = a * images + n * eps, torch.zeros(100, dtype=torch.int64)
    got = bound.terms(denoiser(LINEAR, x_t, t), images, x_t, t)
    assert float(got.mean()) == pytest.approx(want, abs=4 * float(got.std()) / 10)


def test_learned_range_reaches_both_fixed_variances():
    torch.manual_seed(0)
    x_0, x_t, out = torch.rand(3, 3, 2, 4, 4, dtype=torch.float64) * 2 - 1
    t = torch.tensor([1, 400, 999])
    learned = Bound(LINEAR, variance="learned_range")
    for v, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        got = learned.terms(torch.cat([out, torch.full_like(out, v)], dim=1), x_0, x_t, t)
        torch.testing.assert_close(
            got, Bound(LINEAR, variance=variance).terms(out, x_0, x_t, t), rtol=1e-10, atol=1e-12
        )
    said = torch.from_numpy(np.log(LINEAR.beta))[t][:, None, None, None].expand_as(out)
    got = Bound(LINEAR, variance="learned").terms(torch.cat([out, said], dim=1), x_0, x_t, t)
    torch.testing.assert_close(got, Bound(LINEAR).terms(out, x_0, x_t, t), rtol=1e-10, atol=1e-12)


# ---- losses


def training_case(prediction, channels=2):
    torch.manual_seed(0)
    x_0 = torch.rand(6, channels, 4, 4) * 2 - 1
    t = torch.tensor([0, 1, 10, 300, 700, 999])
    seed, image, row = torch.full((6,), 5), torch.arange(6), torch.arange(6) * 3
    x_t = q_sample(x_0, LINEAR.q_sample_table(), t, row, seed, image)
    eps = N.noise_reference(seed, image, row, N.Q_SAMPLE, tuple(x_0.shape[1:]))
    truth = {
        "eps": eps,
        "x_0": x_0,
        "v": convert(eps, x_t.double(), t, LINEAR, "eps", "v").float(),
    }[prediction]
    return x_0, x_t, t, row, seed, image, truth


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_simple_loss_of_the_truth_is_zero_and_of_an_error_its_square(prediction):
    x_0, x_t, t, row, seed, image, truth = training_case(prediction)
    losses = Objective(LINEAR, prediction).losses
    assert float(losses(truth, x_0, x_t, t, row, seed, image).max()) < 1e-9
    torch.testing.assert_close(
        losses(truth + 0.5, x_0, x_t, t, row, seed, image),
        torch.full((6,), 0.25),
        rtol=1e-4,
        atol=1e-4,
    )


def test_simple_loss_is_that_of_algorithm_1():
    """The fused loss against `training_loss` in fp64, at the same t and noise."""
    x_0, x_t, t, row, seed, image, eps = training_case("eps")
    out = []

    def model(x, t):
        out.append(torch.sin(x + t.view(-1, 1, 1, 1)))
        return out[-1]

    exact = training_loss(model, LINEAR, x_0.double(), t, eps.double())
    got = Objective(LINEAR).losses(out[0].float(), x_0, x_t, t, row, seed, image).mean()
    assert float(got) == pytest.approx(float(exact), rel=1e-6)


def test_algorithm_1_draws_t_and_noise():
    torch.manual_seed(0)
    seen = []
    loss = training_loss(lambda x, t: seen.append(t) or 0 * x, LINEAR, torch.zeros(500, 1, 4, 4))
    assert float(loss) == pytest.approx(1, abs=0.1)  # the variance of eps
    assert 0 <= seen[0].min() < 20 and 980 < seen[0].max() < 1000


def test_min_snr_weighs_the_same_error_of_x_0_alike_whatever_is_predicted():
    """An error of x_0, expressed as eps, x_0 or v, has the loss min(SNR, 5) times its square.

    Hang et al. 2023, eq. 8.
    """
    x_0, x_t, t, row, seed, image, _ = training_case("x_0")
    wrong = x_0 + 0.1
    want = torch.from_numpy(np.minimum(LINEAR.snr, 5))[t] * 0.01
    for prediction in ("eps", "x_0", "v"):
        out = convert(wrong.double(), x_t.double(), t, LINEAR, "x_0", prediction)
        got = Objective(LINEAR, prediction, "min_snr").losses(
            out.float(), x_0, x_t, t, row, seed, image
        )
        # eps at t = 0 has a rounding error of 1e-7 times 100 x_0
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-6)
    assert min_snr_weights(LINEAR.zero_terminal_snr(), "v", 5.0)[-1] == 0


def test_hybrid_teaches_the_variance_alone():
    """The mean has the gradient of the simple loss, the variance that of the bound.

    Nichol & Dhariwal 2021, section 3.1.
    """
    x_0, x_t, t, row, seed, image, _ = training_case("eps")
    out = torch.randn(6, 4, 4, 4).mul_(0.3).requires_grad_()
    rest = x_0, x_t, t, row, seed, image
    (hybrid,) = torch.autograd.grad(Objective(LINEAR, loss="hybrid").losses(out, *rest).sum(), out)
    (simple,) = torch.autograd.grad(Objective(LINEAR).losses(out[:, :2], *rest).sum(), out)
    (vlb,) = torch.autograd.grad(Objective(LINEAR, loss="vlb").losses(out, *rest).sum(), out)
    assert torch.equal(hybrid[:, :2], simple[:, :2]) and not simple[:, 2:].any()
    torch.testing.assert_close(hybrid[:, 2:], vlb[:, 2:] / 1000, rtol=1e-5, atol=1e-9)
    assert (
        hybrid.isfinite().all()
        and vlb.isfinite().all()
        and vlb[:, :2].abs().amin((1, 2, 3)).min() >= 0
    )


def test_vlb_gradient_by_differences():
    """In fp64, at t = 0 (the decoder) and later timesteps."""
    x_0, x_t, t, *_ = training_case("eps")
    x_0, x_t = (x_0 * 127.5).round().double() / 127.5, x_t.double()
    bound = Bound(LINEAR, variance="learned_range", clip=None)
    out = (torch.randn(6, 4, 4, 4, dtype=torch.float64) * 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: bound.terms(o, x_0, x_t, t), (out,), rtol=1e-4)


def test_vlb_losses_add_up_to_the_bound():
    """Their mean over all t is the bound without its prior."""
    chain = NoiseSchedule.linear(0.01, 0.3, 8)
    x_0 = torch.rand(1, 1, 4, 4).expand(8, -1, -1, -1)
    t, seed, image = (
        torch.arange(8),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int64),
    )
    x_t = q_sample(x_0, chain.q_sample_table(), t, t, seed, image)
    out = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    got = Objective(chain, loss="vlb").losses(out, x_0, x_t, t, t, seed, image).mean()
    want = Bound(chain, variance="learned_range", clip=None).terms(out, x_0, x_t, t).sum()
    assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match="loss 'l1'; expected one of simple"):
        Objective(LINEAR, loss="l1")
    with pytest.raises(ValueError, match="snr_gamma = 0"):
        Objective(LINEAR, loss="min_snr", snr_gamma=0)
    x_0, x_t, *rest, truth = training_case("eps")
    with pytest.raises(ValueError, match="has 2 channels; expected 4 for the loss hybrid"):
        Objective(LINEAR, loss="hybrid").losses(truth, x_0, x_t, *rest)
    with pytest.raises(ValueError, match="variance 'huge'"):
        Bound(LINEAR, variance="huge")
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        Bound(LINEAR.zero_terminal_snr())


# ---- sampling of timesteps


def filled(losses):
    sampler = LossAware(len(losses))
    t = torch.arange(len(losses))
    for _ in range(HISTORY):
        sampler.update(t, torch.as_tensor(losses, dtype=torch.float32))
    return sampler


def test_loss_aware_draws_uniformly_until_every_timestep_has_ten_losses():
    sampler = LossAware(4)
    for i in range(HISTORY * 4 - 1):
        sampler.update(torch.tensor([i % 4]), torch.tensor([float(i % 4)]))
        assert torch.equal(sampler.shares(), torch.full((4,), 2**28))
    sampler.update(torch.tensor([3]), torch.tensor([3.0]))
    shares = sampler.shares().double() / 2**30
    want = 0.999 * torch.tensor([0.0, 1, 2, 3]) / 6 + 0.001 / 4
    torch.testing.assert_close(shares.float(), want, rtol=1e-5, atol=1e-6)


def test_loss_aware_draws_in_proportion_and_weighs_back():
    losses = torch.tensor([0.5, 0.1, 0.1, 2.0, 0.3])
    sampler = filled(losses)
    word = torch.arange(200_000) * (2**32 // 200_000)
    t, weight = sampler.draw(word)
    share = t.bincount(minlength=5).double() / len(t)
    torch.testing.assert_close(
        share, 0.999 * losses.double() / losses.double().sum() + 0.0002, rtol=0, atol=1e-4
    )
    weighted = float((weight * losses[t]).mean())
    assert weighted == pytest.approx(float(losses.mean()), rel=1e-3)  # as for uniform t
    assert t[0] == 0 and sampler.draw(torch.tensor([2**32 - 1]))[0] == 4


def test_loss_aware_stores_the_last_ten_losses_for_any_batch_size():
    """Single updates and one batched update with repeated timesteps give the same history."""
    generator = torch.Generator().manual_seed(0)
    t, losses = torch.randint(0, 3, (64,), generator=generator), torch.rand(64, generator=generator)
    losses[5] = float("nan")
    whole, single = LossAware(3), LossAware(3)
    whole.update(t, losses)
    for one in range(64):
        single.update(t[one : one + 1], losses[one : one + 1])
    assert torch.equal(whole.squares, single.squares) and torch.equal(whole.count, single.count)
    last = [
        losses[(t == i) & losses.isfinite()][-HISTORY:].double().square().sort().values
        for i in range(3)
    ]
    torch.testing.assert_close(whole.squares.sort(1).values, torch.stack(last))
