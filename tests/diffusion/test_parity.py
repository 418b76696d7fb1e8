"""Solvers against diffusers and the papers in fp64, and their orders of convergence."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.studies import parity, parity_loops
from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.diffusion.presets import PRESETS
from ddpm_fast.diffusion.solvers import ddim_inversion_table, ddim_table, dpm_solver_table
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels.ddpm_step import ddpm_step_reference, x_0_reference

diffusers = pytest.importorskip("diffusers")


def test_every_solver_prediction_and_variance_is_the_papers_and_diffusers(figure):
    """Twenty steps in fp32. The preset diffusers reproduces the errors of its fp32 tables."""
    rows = [*parity.rows(), *parity.inversion_rows()]
    assert len(rows) == (8 + 6 + 4) * 3 + 2
    for r in rows:
        name = f"{r['solver']}, {r['variance'] or r['eta']}, clip {r['clip']}, {r['prediction']}"
        assert r["ddpm_fast"] < 1e-6, name
        if r["difference"] is not None:
            assert r["difference"] < 5e-5 and r["diffusers"] < 5e-5, name
        if r["preset"] is not None:
            assert r["preset"] < 2e-6, name
    figure(
        "56 loops of 20 steps against the papers in fp64: largest error of ddpm_fast",
        f"{max(r['ddpm_fast'] for r in rows):.1e}",
    )
    figure("largest error of diffusers", f"{max(r['diffusers'] or 0 for r in rows):.1e}")
    figure(
        "ddpm_fast with the preset diffusers against diffusers",
        f"{max(r['preset'] or 0 for r in rows):.1e}",
    )


@pytest.mark.parametrize(
    ("solver", "expected", "tolerance"), [("ddim", 1, 0.1), ("dpm++2m", 2, 0.15)]
)
def test_converges_to_the_probability_flow_at_its_order(solver, expected, tolerance, figure):
    slope, errors = parity.order(solver)
    figure(
        f"order of {solver}, N = 20 ... 320; errors {errors[0]:.1e} ... {errors[-1]:.1e}",
        f"{slope:.3f}",
    )
    assert slope == pytest.approx(expected, abs=tolerance)
    assert (np.diff(errors) < 0).all()


# ---- published loops of diffusers (tests/schedulers of its repository)


def sample_deter():
    count = 4 * 3 * 8 * 8
    return (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def noise_deter():
    count = 4 * 3 * 8 * 8
    return (torch.arange(count).flip(-1).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def model(x, t):
    return x * t / (t + 1)


def loop(table, x, z=lambda: 0.0):
    """Runs a table in fp32. `z` draws the noise of the steps that have some, in order."""
    coef, old = torch.from_numpy(table.coef).float(), torch.zeros_like(x)
    for i, t in enumerate(table.t):
        row, out = torch.full((len(x),), i), model(x, int(t))
        noise = torch.as_tensor(z() if table.coef[i, 7] else 0.0)
        x, old = (
            ddpm_step_reference(x, out, noise, coef, row, old=old),
            x_0_reference(x, out, coef, row),
        )
    return float(x.abs().sum()), float(x.abs().mean())


def with_noise(t):
    """Result of `scheduler.add_noise` for the two deterministic tensors."""
    bar = NoiseSchedule.linear().alpha_bar[t]
    return np.sqrt(bar) * sample_deter() + np.sqrt(1 - bar) * noise_deter()


def table_of(solver, t, prediction="eps", schedule=None, **more):
    schedule = schedule or NoiseSchedule.linear()
    return PRESETS["diffusers"].table(
        schedule, solver, np.asarray(t), prediction, "fixed_small", 1.0, **more
    )


@pytest.mark.parametrize(
    ("prediction", "start", "total", "mean"),
    [("eps", None, 258.9606, 0.3372), ("v", None, 202.0296, 0.2631), ("eps", 1, 387.9466, 0.5051)],
    ids=["no_noise", "v_prediction", "with_noise"],
)
def test_published_ddpm_loops(prediction, start, total, mean):
    generator = torch.Generator().manual_seed(0)
    z = lambda: torch.randn(4, 3, 8, 8, generator=generator)
    t = choose_timesteps(1000, None) if start is None else [1, 0]  # the last two of the thousand
    x = sample_deter() if start is None else with_noise(1).float()
    got = loop(table_of("ddpm", t, prediction), x, z)
    assert got[0] == pytest.approx(total, abs=1e-2) and got[1] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("prediction", "beta_start", "start", "total", "mean"),
    [
        ("eps", 1e-4, None, 172.0067, 0.223967),
        ("v", 1e-4, None, 52.5302, 0.0684),
        ("eps", 0.01, None, 149.8295, 0.1951),
        ("eps", 1e-4, 8, 354.5418, 0.4616),
    ],
    ids=["no_noise", "v_prediction", "set_alpha_to_one", "with_noise"],
)
def test_published_ddim_loops(prediction, beta_start, start, total, mean):
    t = PRESETS["diffusers"].timesteps(1000, "ddim", 10)
    assert t.tolist() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    t, x = (t, sample_deter()) if start is None else (t[start:], with_noise(t[start]).float())
    got = loop(table_of("ddim", t, prediction, NoiseSchedule.linear(beta_start)), x)
    assert got[0] == pytest.approx(total, abs=1e-2) and got[1] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("prediction", "start", "total", "mean"),
    [("eps", None, None, 0.3301), ("v", None, None, 0.2251), ("eps", 5, 318.4111, 0.4146)],
    ids=["no_noise", "v_prediction", "with_noise"],
)
def test_published_dpm_solver_loops(prediction, start, total, mean):
    """As configured there: no clipping, and the last step leads to timestep 0 (sigma_min)."""
    t = PRESETS["diffusers"].timesteps(1000, "dpm++2m", 10)
    assert t[0] == 999 and t[-1] == 100
    x = sample_deter() if start is None else with_noise(t[start]).float()
    t = np.append(t if start is None else t[start:], 0)
    got = loop(dpm_solver_table(NoiseSchedule.linear(), t, prediction, clip=None, end="t=0"), x)
    assert got[1] == pytest.approx(mean, abs=1e-3)
    if total is not None:
        assert got[0] == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize(
    ("prediction", "beta_start", "total", "mean"),
    [
        ("eps", 1e-4, 671.6816, 0.8746),
        ("v", 1e-4, 1394.2185, 1.8154),
        ("eps", 0.01, 539.9622, 0.7031),
    ],
    ids=["no_noise", "v_prediction", "set_alpha_to_one"],
)
def test_published_ddim_inverse_loops(prediction, beta_start, total, mean):
    t = choose_timesteps(1000, 10, "leading")
    table = ddim_inversion_table(
        NoiseSchedule.linear(beta_start), t, prediction, clip=1.0, sees="target"
    )
    got = loop(table, sample_deter())
    assert got[0] == pytest.approx(total, abs=1e-2) and got[1] == pytest.approx(mean, abs=1e-3)


# ---- mathematical properties


def test_the_first_order_sde_step_is_ddpm_with_the_small_variance():
    """A first step of "dpm++2m-sde" has the distribution of DDPM (Lu et al. 2022b, section A)."""
    schedule = NoiseSchedule.linear()
    for t in ([999, 500], [700, 10], [30, 29]):
        sde = PRESETS["exact"].table(schedule, "dpm++2m-sde", np.array(t))
        ddpm = PRESETS["exact"].table(schedule, "ddpm", np.array(t), variance="fixed_small")
        np.testing.assert_allclose(sde.coef, ddpm.coef, rtol=1e-9, atol=1e-12)
    ode, ddim = (
        PRESETS["exact"].table(schedule, s, np.array([800, 300])) for s in ("dpm++2m", "ddim")
    )
    np.testing.assert_allclose(ode.coef, ddim.coef, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++2m-sde"])
def test_multistep_sampler_equals_the_loop(solver):
    """`Sampler` has the history of the loop, separately for each image."""
    net = parity_loops.network("eps", "")
    sampler = Sampler(lambda x, t: net(x, int(t[0])), parity_loops.SCHEDULE, parity_loops.SHAPE[1:])
    got = sampler.sample(
        4, seed=7, solver=solver, steps=parity_loops.T.tolist(), output="float", batch_size=4
    )
    alone = sampler.sample(
        [3], seed=7, solver=solver, steps=parity_loops.T.tolist(), output="float"
    )
    x = sampler.begin(torch.arange(4), 7).x
    want = parity_loops.run_table(
        sampler.table(solver=solver, steps=parity_loops.T.tolist()), net, x
    )
    assert torch.equal(got, want) and torch.equal(alone[0], want[3])


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++2m", "dpm++2m-sde"])
@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_tables_of_zero_terminal_snr_are_finite(solver, prediction):
    """At alpha_bar = 0, lambda is -inf, but every coefficient is finite."""
    schedule = NoiseSchedule.linear().zero_terminal_snr()
    table = PRESETS["exact"].table(schedule, solver, choose_timesteps(1000, 10), prediction)
    finite = np.delete(table.coef, [2], axis=1)
    assert np.isfinite(finite).all()
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    np.testing.assert_allclose(
        schedule.alpha_bar, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4, atol=1e-9
    )
    with pytest.raises(ValueError, match="let the network predict x_0 or v"):
        PRESETS["exact"].table(schedule, solver, choose_timesteps(1000, 10), "eps")


def test_inversion_leads_back(figure):
    """Image -> x_T -> image with the exact denoiser of a Gaussian: an error of first order."""
    schedule = NoiseSchedule.linear()

    def net(x, t):
        a, n = (
            torch.from_numpy(np.sqrt(v))[t].view(-1, 1, 1, 1).to(x)
            for v in (schedule.alpha_bar, schedule.noise_var)
        )
        return n * (x - a * 0.1) / (a * a * 0.3**2 + n * n)

    sampler = Sampler(net, schedule, (1, 4, 4), clip=None)
    x_0 = 0.1 + 0.3 * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (50, 100, 200):
        x_t, t = sampler.invert(x_0, steps)
        assert t == 999 and abs(float(x_t.std()) - 1) < 0.2
        back = sampler.sample(3, solver="ddim", steps=steps, start=(x_t, t), output="float")
        errors.append(float((back - x_0).abs().max()))
    figure(
        "DDIM inversion and back, 50, 100, 200 steps: largest error",
        " ".join(f"{e:.4f}" for e in errors),
    )
    assert errors[2] < 0.04 and all(a / b == pytest.approx(2, rel=0.1) for a, b in pairwise(errors))
    with pytest.raises(ValueError, match="at least two"):
        sampler.invert(x_0, 1)


def test_refuses():
    schedule, t = NoiseSchedule.linear(), choose_timesteps(1000, 10, "trailing")
    for call, message in (
        (
            lambda: ddim_table(schedule, t, end="t=0"),
            "the steps end at t = 99; expected two or more, to t = 0",
        ),
        (lambda: ddim_table(schedule, t, end="never"), "end 'never'"),
        (lambda: ddim_table(schedule, t, eps_from="nowhere"), "eps_from 'nowhere'"),
        (lambda: ddim_inversion_table(schedule, t, sees="both"), "sees 'both'"),
        (
            lambda: ddim_inversion_table(schedule, t, "x_0", sees="target"),
            "x_0 does not determine eps",
        ),
        (lambda: PRESETS["ho"].timesteps(1000, "ddpm", 50), "visits all 1000 timesteps"),
        (
            lambda: Sampler(lambda x, t: x, schedule, (1, 4, 4)).table(preset="mine"),
            "preset 'mine'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
