"""Schedulers with a fused step against diffusers' classes: steps, loops, generator states, folders."""

import copy
import pickle

import pytest
import torch

from ddpm_fast import schedulers
from ddpm_fast.utils.numerics import relative_error

diffusers = pytest.importorskip("diffusers")

FORMS = {
    "ddpm": ("DDPMScheduler", dict(), {}, 3),
    "ddpm large v": (
        "DDPMScheduler",
        dict(variance_type="fixed_large", prediction_type="v_prediction"),
        {},
        3,
    ),
    "ddpm log x_0": (
        "DDPMScheduler",
        dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample=False),
        {},
        3,
    ),
    "ddpm learned": ("DDPMScheduler", dict(variance_type="learned_range"), {}, 6),
    "ddpm thresholding": ("DDPMScheduler", dict(thresholding=True), {}, 3),
    "ddim": ("DDIMScheduler", dict(), {}, 3),
    "ddim eta": ("DDIMScheduler", dict(set_alpha_to_one=False), dict(eta=0.5), 3),
    "ddim clipped v": (
        "DDIMScheduler",
        dict(prediction_type="v_prediction"),
        dict(eta=1.0, use_clipped_model_output=True),
        3,
    ),
    "ddim x_0": ("DDIMScheduler", dict(prediction_type="sample"), dict(eta=0.2), 3),
    "dpm++": ("DPMSolverMultistepScheduler", dict(), {}, 3),
    "dpm++ heun karras": (
        "DPMSolverMultistepScheduler",
        dict(solver_type="heun", use_karras_sigmas=True),
        {},
        3,
    ),
    "sde-dpm++": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="sde-dpmsolver++", prediction_type="v_prediction"),
        {},
        3,
    ),
    "sde-dpm++ heun": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="sde-dpmsolver++", solver_type="heun"),
        {},
        3,
    ),
    "dpm++ order 3": ("DPMSolverMultistepScheduler", dict(solver_order=3), {}, 3),
}


def loop(scheduler, channels, options, steps=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = torch.cos(x * (1 + t / 500))
        if channels == 6:
            out = torch.cat([out, torch.sin(3 * x)], dim=1)
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
    return x, generator.get_state()


@pytest.mark.parametrize("form", FORMS)
def test_loops_are_those_of_diffusers(form):
    name, config, options, channels = FORMS[form]
    expected, end = loop(getattr(diffusers, name)(**config), channels, options)
    x, state = loop(getattr(schedulers, name)(**config), channels, options)
    assert torch.equal(state, end)
    assert relative_error(x, expected) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["ddpm", "ddim eta", "dpm++"])
def test_half_precision_keeps_its_dtype(form, dtype):
    name, config, options, channels = FORMS[form]
    expected, _ = loop(getattr(diffusers, name)(**config), channels, options, 3, dtype)
    x, _ = loop(getattr(schedulers, name)(**config), channels, options, 3, dtype)
    assert x.dtype == expected.dtype
    assert relative_error(x.float(), expected.float()) < 0.03


@pytest.mark.parametrize("name", schedulers.__all__)
def test_saved_copied_and_pickled_as_the_class_of_diffusers(name, tmp_path):
    scheduler = getattr(schedulers, name)(num_train_timesteps=321)
    scheduler.save_pretrained(tmp_path / "fused")
    original = getattr(diffusers, name)(num_train_timesteps=321)
    original.save_pretrained(tmp_path / "original")
    names = [p / "scheduler_config.json" for p in (tmp_path / "fused", tmp_path / "original")]
    assert names[0].read_bytes() == names[1].read_bytes()
    for other in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert type(other) is getattr(schedulers, name)
        assert other.config.num_train_timesteps == 321


def test_pred_original_sample():
    x, out = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    results = []
    for module in (diffusers, schedulers):
        scheduler = module.DDPMScheduler()
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(out, 500, x, generator=generator).pred_original_sample)
    assert relative_error(*results) < 1e-6


def test_a_pipeline_with_a_fused_scheduler_is_accelerated():
    from ddpm_fast.integrations.diffusers_tables import scheduler_table

    scheduler = schedulers.DDIMScheduler()
    scheduler.set_timesteps(5)
    assert len(scheduler_table(scheduler).steps) == 5
