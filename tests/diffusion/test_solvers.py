import itertools

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule
from ddpm_fast.data.pixels import to_uint8
from ddpm_fast.diffusion.prediction import convert
from ddpm_fast.diffusion.presets import EXACT, PRESETS
from ddpm_fast.diffusion.solvers import ddim_table, ddpm_table
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels.ddpm_step import COLUMNS, ddpm_step_reference

diffusers = pytest.importorskip("diffusers")

SCHEDULE = NoiseSchedule.linear()
NAMES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def take(table, i, x, out, z):
    """Step i of a table in fp64."""
    row = torch.full((len(x),), i)
    return ddpm_step_reference(x, out, z, torch.from_numpy(table.coef), row, table.learned)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", NAMES)
def test_ddpm_is_diffusers_ddpm(prediction, variance, clip, steps, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        prediction_type=NAMES[prediction], variance_type=variance, clip_sample=clip is not None
    )
    scheduler.set_timesteps(steps)
    t = choose_timesteps(1000, steps, "leading")
    assert scheduler.timesteps.tolist() == t.tolist()
    table = ddpm_table(SCHEDULE, t, prediction, variance, clip)
    torch.manual_seed(0)
    worst = 0.0
    for i in sorted({0, 1, steps // 2, steps - 3, steps - 2, steps - 1}):
        x, out, v, z = torch.randn(4, 2, 3, 8, 8)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: z
        )
        out = torch.cat([out, v], dim=1) if table.learned else out
        want = scheduler.step(out, int(t[i]), x).prev_sample
        got = take(table, i, x, out, z)
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    assert worst < 5e-4  # diffusers' tables are fp32: beta from a ratio is off by 4.9e-4 near t = 4


@pytest.mark.parametrize(
    ("eps_from", "clip", "eta"),
    list(itertools.product(["x_0", "network"], [1.0, None], [0.0, 0.7, 1.0])),
)
@pytest.mark.parametrize("prediction", NAMES)
def test_ddim_is_diffusers_ddim(prediction, eps_from, clip, eta):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=NAMES[prediction], clip_sample=clip is not None
    )
    scheduler.set_timesteps(50)
    t = choose_timesteps(1000, 50, "leading")
    table = ddim_table(SCHEDULE, t, prediction, eta, clip, eps_from)
    torch.manual_seed(0)
    for i in (0, 25, 48, 49):
        x, out, z = torch.randn(3, 2, 3, 8, 8)
        options = dict(eta=eta, use_clipped_model_output=eps_from == "x_0", variance_noise=z)
        want = scheduler.step(out, int(t[i]), x, **options).prev_sample
        got = take(table, i, x, out, z)
        assert float((got - want).abs().max() / want.abs().max()) < 5e-4


def test_ddim_with_eta_one_is_ddpm_with_the_small_variance():
    t = choose_timesteps(1000, 37)
    ddim, ddpm = ddim_table(SCHEDULE, t, eta=1.0), ddpm_table(SCHEDULE, t, variance="fixed_small")
    np.testing.assert_allclose(ddim.coef, ddpm.coef, rtol=1e-9, atol=1e-12)


def test_predictions_convert_into_one_another():
    """eps, x_0 and v of one x_t give one step."""
    t = choose_timesteps(1000, 10)
    torch.manual_seed(0)
    for i, x_0, eps, z in (
        (i, *torch.randn(3, 1, 3, 4, 4, dtype=torch.float64)) for i in range(10)
    ):
        a, n = SCHEDULE.alpha_bar[t[i]] ** 0.5, SCHEDULE.noise_var[t[i]] ** 0.5
        x_t = a * x_0 + n * eps
        outs = {"eps": eps, "x_0": x_0, "v": a * eps - n * x_0}
        steps = [
            take(ddpm_table(SCHEDULE, t, p, clip=None), i, x_t, out, z) for p, out in outs.items()
        ]
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps[0], steps[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_last_step_returns_x_0_without_noise(solver, steps):
    table = EXACT.table(SCHEDULE, solver, choose_timesteps(1000, steps))
    last = dict(zip(COLUMNS, table.coef[-1], strict=True))
    assert (last["sigma"], last["mean_out"]) == (0, 0)
    assert last["mean_x"] == pytest.approx(0, abs=1e-12)
    assert last["mean_x_0"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 250, 999, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spacings(steps, spacing):
    t = choose_timesteps(1000, steps, spacing)
    assert len(t) == steps and (np.diff(t) < 0).all() and t[0] <= 999 and t[-1] >= 0
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    if spacing != "linspace" or steps > 1:  # one step: diffusers visits t = 0, not T - 1
        assert t.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "steps", [0, 1001, -1, 5.5, "many", [], [5, 5], [3, 9], [1000, 2], [4, -1], [5.5, 2.5]]
)
def test_refuses_steps(steps):
    with pytest.raises(ValueError, match="steps"):
        choose_timesteps(1000, steps)


def test_refuses_options():
    t = choose_timesteps(1000, 10)
    with pytest.raises(ValueError, match="spacing 'even'"):
        choose_timesteps(1000, 10, "even")
    for options, message in [
        (dict(solver="euler"), "solver 'euler'"),
        (dict(solver="ddpm", prediction="noise"), "prediction 'noise'"),
        (dict(solver="ddpm", variance="huge"), "variance 'huge'"),
        (dict(solver="ddpm", clip=0.0), "clip = 0.0"),
        (dict(solver="ddpm", eta=0.5), "belongs to solver"),
        (dict(solver="ddim", eta=1.5), "eta = 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            EXACT.table(SCHEDULE, t=t, **options)


# ---- spacings of other codebases


def test_openai_sections():
    t = choose_timesteps(1000, "10,20,30")[::-1]
    assert len(t) == 60
    for part, first, last, count in (
        (t[:10], 0, 333, 10),
        (t[10:30], 334, 666, 20),
        (t[30:], 667, 999, 30),
    ):
        assert (part[0], part[-1], len(part)) == (first, last, count)
        even = first + (last - first) * np.arange(count) / (count - 1)
        assert np.abs(part - even).max() <= 0.5 + 1e-9
    assert choose_timesteps(1000, 250, "openai").tolist() == choose_timesteps(1000, "250").tolist()
    assert choose_timesteps(1000, "1,1")[::-1].tolist() == [0, 500]


def test_openai_rounds_as_python_adding_its_stride_up():
    """Rounding errors of a running sum decide ties; 283 counts differ from linspace."""
    differ = 0
    for count in range(2, 1001):
        position, want = 0.0, []
        for _ in range(count):
            want.append(round(position))
            position += 999 / (count - 1)
        got = choose_timesteps(1000, str(count))[::-1].tolist()
        assert got == want
        differ += got != choose_timesteps(1000, count)[::-1].tolist()
    assert differ > 100


def test_openai_ddim_stride():
    assert choose_timesteps(1000, "ddim50")[::-1].tolist() == list(range(0, 1000, 20))
    for bad in ("ddim300", "ddim10,20", "ddim0", "ten", "0,5", "600,600", "10,,20"):
        with pytest.raises(ValueError, match="steps"):
            choose_timesteps(1000, bad)


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_quadratic_is_ermongroups_without_its_repetitions(steps):
    expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert choose_timesteps(1000, steps, "quadratic")[::-1].tolist() == sorted(set(expected))


def test_presets_visit_the_timesteps_of_their_codebases():
    uniform = PRESETS["ddim"].timesteps(1000, "ddim", 300)
    assert uniform[::-1].tolist() == list(range(0, 1000, 3))  # 334: the stride is 1000 // 300
    assert (
        PRESETS["openai"].timesteps(1000, "ddpm", 250).tolist()
        == choose_timesteps(1000, "250").tolist()
    )
    for steps in (20, 37):
        scheduler = diffusers.DPMSolverMultistepScheduler()
        scheduler.set_timesteps(steps)
        assert (
            PRESETS["diffusers"].timesteps(1000, "dpm++2m", steps).tolist()
            == scheduler.timesteps.tolist()
        )
        scheduler = diffusers.DDPMScheduler()
        scheduler.set_timesteps(steps)
        assert (
            PRESETS["diffusers"].timesteps(1000, "ddpm", steps).tolist()
            == scheduler.timesteps.tolist()
        )
    assert len(PRESETS["ho"].timesteps(1000, "ddpm", None)) == 1000
    assert len(PRESETS["exact"].timesteps(1000, "dpm++2m", None)) == 20


def test_presets_round_as_their_codebases_do():
    x = torch.linspace(-1.1, 1.1, 2001).view(1, 1, 1, -1)
    expected = {
        "ho": ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8),
        "openai": ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8),
        "diffusers": (((x / 2 + 0.5).clamp(0, 1)) * 255).round().to(torch.uint8),
        "ddim": ((x + 1) / 2).clamp(0, 1).mul(255).add(0.5).clamp(0, 255).to(torch.uint8),
        "exact": ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8),
    }
    for name, want in expected.items():
        got = to_uint8(x, PRESETS[name].level)
        assert (got.flatten().int() - want.flatten().int()).abs().max() <= (name == "diffusers"), (
            name
        )  # a tie's last bit
    assert to_uint8(torch.full((1, 1, 1, 1), 0.999), PRESETS["openai"].level).item() == 254


def test_ddims_preset_does_not_clip_and_its_ddpm_does():
    t = choose_timesteps(1000, 10)
    clip = COLUMNS.index("clip")
    assert np.isinf(PRESETS["ddim"].table(SCHEDULE, "ddim", t).coef[:, clip]).all()
    assert (PRESETS["ddim"].table(SCHEDULE, "ddpm", t).coef[:, clip] == 1).all()


@pytest.mark.parametrize(
    "schedule",
    [SCHEDULE, NoiseSchedule.cosine(), SCHEDULE.zero_terminal_snr()],
    ids=["linear", "cosine", "zero"],
)
def test_conversions_are_exact_both_ways(schedule):
    torch.manual_seed(0)
    t = torch.tensor([0, 1, 250, 998])
    x_0, eps = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)
    a, n = (
        torch.from_numpy(np.sqrt(v))[t][:, None, None, None]
        for v in (schedule.alpha_bar, schedule.noise_var)
    )
    x_t = a * x_0 + n * eps
    truth = {"eps": eps, "x_0": x_0, "v": a * eps - n * x_0}
    for source, target in itertools.product(truth, truth):
        got = convert(truth[source], x_t, t, schedule, source, target)
        # x_0 from eps is a difference over a small signal
        tolerance = 1e-9 if schedule.alpha_bar[998] > 1e-6 else 1e-7
        torch.testing.assert_close(got, truth[target], rtol=tolerance, atol=tolerance)
