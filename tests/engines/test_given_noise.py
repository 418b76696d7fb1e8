"""Noise given by the caller, and step tables at an offset, on every engine."""

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.diffusion.solvers import StepTable
from ddpm_fast.kernels import noise
from ddpm_fast.kernels.ddpm_step import COLUMNS, ddpm_step_reference
from ddpm_fast.utils.numerics import relative_error

SCHEDULE = NoiseSchedule.linear(timesteps=12)
SHAPE = (3, 8, 8)
ENGINES = ["reference", "cpu", "fused"]
LOOPS = {
    "ddpm": dict(steps=6),
    "ddim, eta": dict(solver="ddim", steps=5, eta=0.5),
    "dpm++2m-sde": dict(solver="dpm++2m-sde", steps=4),
}


@pytest.fixture(scope="module", params=ENGINES)
def sampler(request):
    if request.param == "cpu":
        pytest.importorskip("llvmlite")
    return make(request.param, "fixed_large", 3)


def make(engine, variance, out_channels):
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        out_channels=out_channels,
        channels=(16, 32),
        layers=1,
        attention=(False, True),
        norm_groups=4,
    )
    unet = UNet(config).eval().requires_grad_(False)
    return Sampler(unet, SCHEDULE, SHAPE, variance=variance, engine=engine)


def philox(sampler, state):
    def draw(step, z):
        rows = torch.full_like(state.image, step)
        z.copy_(noise.noise(state.seed, state.image, rows, noise.REVERSE, *SHAPE))

    return draw


def drawn(sampler, table, given_noise, draw=philox):
    with sampler.begin(torch.arange(3) + 5, 11, given_noise=given_noise) as state:
        for _ in sampler.steps(state, table, draw=draw(sampler, state) if given_noise else None):
            pass
        return state.x.clone()


@pytest.mark.parametrize("loop", LOOPS)
def test_given_philox_noise_draws_the_bit_exact_images_of_made_noise(sampler, loop):
    table = sampler.table(**LOOPS[loop])
    assert torch.equal(drawn(sampler, table, True), drawn(sampler, table, False))


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("engine", ENGINES)
def test_given_noise_against_the_reference_step_in_fp64(engine, variance):
    """Noise of another generator: x_t of every step is that of the fp64 loop."""
    sampler = make(engine, variance, 3 if variance == "fixed_large" else 6)
    table = sampler.table(steps=6)
    z = torch.randn(6, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    wide = UNet(sampler.model.config).double().eval()
    wide.load_state_dict(sampler.model.state_dict())
    image = torch.arange(3)
    x = noise.noise(torch.full((3,), 7), image, torch.zeros_like(image), noise.X_T, *SHAPE).double()
    coef = torch.from_numpy(table.coef)
    with torch.no_grad():
        for i, t in enumerate(table.t):
            out = wide(x, torch.full((3,), int(t)))
            step = torch.full((3,), i)
            x = ddpm_step_reference(x, out, z[i].double(), coef, step, table.learned)
    result = drawn_with(sampler, table, image, z)
    assert relative_error(result, x) < 1e-5


def drawn_with(sampler, table, image, z):
    with sampler.begin(image, 7, given_noise=True) as state:
        for _ in sampler.steps(state, table, draw=lambda step, buffer: buffer.copy_(z[step])):
            pass
        return state.x.clone()


def test_noise_rows_and_coefficients_are_counted_apart(sampler):
    """The same steps at an offset in a longer table draw the same images."""
    table = sampler.table(steps=6)
    front = StepTable(
        np.concatenate([[3, 1, 2], table.t]), np.concatenate([table.coef[-3:], table.coef])
    )
    with sampler.begin(torch.arange(3) + 5, 11) as state:
        state.step_index.fill_(3)
        steps = sampler.steps(state, front)
        for _ in range(6):
            next(steps)
        assert torch.equal(state.x, drawn(sampler, table, False))


def test_other_noise_rows_draw_other_images(sampler):
    table = sampler.table(steps=6)
    coef = table.coef.copy()
    coef[:, COLUMNS.index("noise_row")] += 1
    assert (
        drawn(sampler, StepTable(table.t, coef), False) - drawn(sampler, table, False)
    ).abs().max() > 0.1


def test_a_buffer_in_another_layout_is_refused_by_the_cpu_engine():
    pytest.importorskip("llvmlite")
    sampler = make("cpu", "fixed_large", 3)
    with sampler.begin(torch.arange(3), 0, given_noise=True) as state:
        state.z = torch.zeros(3, *SHAPE)
        with pytest.raises(ValueError, match="expected channels-last float32"):
            next(sampler.engine.steps(state, sampler.table(steps=2)))
