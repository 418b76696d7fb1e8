"""Accelerated diffusers pipelines against the originals: images, generator states, folders."""

import copy
import filecmp
import inspect
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast
from ddpm_fast.utils.numerics import relative_error

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.disable_progress_bar()

CHECKPOINT = Path(__file__).parents[2] / "weights" / "fashion-mnist-32"
SMALL = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def small_network(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**SMALL | options).eval().requires_grad_(False)


def trained_network(label=3):
    """The shipped network with one class embedding folded into the time MLP: unconditional."""
    unet = diffusers.UNet2DModel.from_pretrained(CHECKPOINT, subfolder="unet")
    config = dict(unet.config) | dict(num_class_embeds=None)
    folded = diffusers.UNet2DModel.from_config(config)
    weights = unet.state_dict()
    weights["time_embedding.linear_2.bias"] += weights.pop("class_embedding.weight")[label]
    folded.load_state_dict(weights)
    return folded.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    return trained_network()


def pipeline(network, scheduler=None, kind=None):
    kind = kind or diffusers.DDPMPipeline
    default = diffusers.DDIMScheduler if kind is diffusers.DDIMPipeline else diffusers.DDPMScheduler
    pipe = kind(network, scheduler or default())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(which, count=2):
    if which == "list":
        return [torch.Generator().manual_seed(i) for i in range(count)]
    return torch.Generator().manual_seed(5) if which == "one" else None


def states(generator):
    if generator is None:
        return [torch.get_rng_state()]
    return [g.get_state() for g in (generator if isinstance(generator, list) else [generator])]


def both(pipe, fast, which="one", count=2, **options):
    """Images of both with equal generators; asserts that the generators end in the same state."""
    results, ends = [], []
    for p in (pipe, fast):
        torch.manual_seed(11)
        generator = generators(which, count)
        out = p(batch_size=count, generator=generator, output_type="np", **options).images
        results.append(torch.from_numpy(np.asarray(out)))
        ends.append(states(generator))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    return results


LOOPS = {
    "ddpm": dict(scheduler=dict(), call=dict(num_inference_steps=37)),
    "ddpm, few steps": dict(
        scheduler=dict(variance_type="fixed_large"), call=dict(num_inference_steps=7)
    ),
    "ddpm, offset": dict(
        scheduler=dict(steps_offset=1, variance_type="fixed_small_log"),
        call=dict(num_inference_steps=10),
    ),
    "ddpm, v, trailing": dict(
        scheduler=dict(prediction_type="v_prediction", timestep_spacing="trailing"),
        call=dict(num_inference_steps=9),
    ),
    "ddpm, x_0, no clip": dict(
        scheduler=dict(prediction_type="sample", clip_sample=False),
        call=dict(num_inference_steps=9),
    ),
}


@pytest.mark.each_value
@pytest.mark.parametrize("which", ["one", "list", "global"])
@pytest.mark.parametrize("loop", LOOPS)
def test_ddpm_pipeline_on_trained_weights(trained, loop, which):
    options = LOOPS[loop]
    pipe = pipeline(trained, diffusers.DDPMScheduler(**options["scheduler"]))
    expected, images = both(pipe, ddpm_fast.accelerate(pipe), which, **options["call"])
    assert (images - expected).abs().max() < 1e-4


@pytest.mark.each_value
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim_pipeline_on_trained_weights(trained, clipped, eta, spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=clipped)
    pipe = pipeline(trained, scheduler, diffusers.DDIMPipeline)
    expected, images = both(
        pipe,
        ddpm_fast.accelerate(pipe),
        eta=eta,
        num_inference_steps=9,
        use_clipped_model_output=clipped,
    )
    assert (images - expected).abs().max() < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_predictions(prediction):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction)
    pipe = pipeline(small_network(), scheduler, diffusers.DDIMPipeline)
    expected, images = both(pipe, ddpm_fast.accelerate(pipe), eta=0.5, num_inference_steps=6)
    assert (images - expected).abs().max() < 2e-4  # untrained networks amplify rounding


MULTISTEP = {
    "order 2": dict(),
    "order 1": dict(solver_order=1),
    "heun": dict(solver_type="heun"),
    "sde": dict(algorithm_type="sde-dpmsolver++"),
    "sde, heun": dict(algorithm_type="sde-dpmsolver++", solver_type="heun"),
    "karras": dict(use_karras_sigmas=True),
    "sigma_min": dict(final_sigmas_type="sigma_min"),
    "euler at final": dict(euler_at_final=True, timestep_spacing="trailing"),
}


SLOW_FORMS = ("heun", "sde, heun", "sigma_min", "euler at final")


@pytest.mark.parametrize(
    "form",
    [pytest.param(f, marks=pytest.mark.full) if f in SLOW_FORMS else f for f in MULTISTEP],
)
def test_dpm_solver_on_trained_weights(trained, form):
    pipe = pipeline(trained, diffusers.DPMSolverMultistepScheduler(**MULTISTEP[form]))
    for steps in (8, 16):
        expected, images = both(pipe, ddpm_fast.accelerate(pipe), num_inference_steps=steps)
        assert (images - expected).abs().max() < 1e-4


def test_learned_variance():
    pipe = pipeline(
        small_network(out_channels=6), diffusers.DDPMScheduler(variance_type="learned_range")
    )
    expected, images = both(pipe, ddpm_fast.accelerate(pipe), num_inference_steps=8)
    assert (images - expected).abs().max() < 2e-3


@pytest.mark.full
def test_bf16_pipeline_keeps_its_dtype_and_agrees_within_rounding(trained):
    pipe = pipeline(copy.deepcopy(trained).to(torch.bfloat16))
    fast = ddpm_fast.accelerate(pipe)
    images = []
    for p in (pipe, fast):
        generator = torch.Generator().manual_seed(5)
        out = p(batch_size=2, generator=generator, num_inference_steps=10, output_type="pt").images
        images.append(out)
    assert images[1].dtype == torch.bfloat16 and fast.report["dtype"] == "bf16"
    assert relative_error(images[1].float(), images[0].float()) < 0.05


def test_seed_draws_the_images_of_sampler(trained):
    pipe = pipeline(trained, diffusers.DDPMScheduler(variance_type="fixed_large"))
    fast = ddpm_fast.accelerate(pipe)
    before = torch.get_rng_state()
    images = fast(seed=7, images=[3, 9], num_inference_steps=6, output_type="pt").images
    assert torch.equal(torch.get_rng_state(), before)
    assert fast.report["noise"] == "philox"
    unet = ddpm_fast.UNet(ddpm_fast.UNetConfig.from_diffusers(dict(trained.config)))
    unet.load_state_dict(trained.state_dict())
    sampler = ddpm_fast.Sampler(unet, ddpm_fast.NoiseSchedule.linear(), (1, 32, 32))
    expected = sampler.sample([3, 9], seed=7, steps=6, spacing="leading", output="float")
    assert (images - (expected / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def test_class_labels():
    pipe = diffusers.DDPMPipeline.from_pretrained(CHECKPOINT)
    fast = ddpm_fast.accelerate(pipe)
    fast.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=5, output_type="pt", seed=1)
    one = fast(batch_size=2, class_labels=4, **call).images
    each = fast(batch_size=2, class_labels=[4, 7], **call).images
    assert torch.equal(one[0], each[0]) and not torch.equal(one[1], each[1])
    for wrong, message in (
        (None, "class_labels is missing"),
        ([1], "expected one, or 2"),
        (10, "expected 0..9"),
        (1.5, "expected integers"),
    ):
        with pytest.raises(ValueError, match=message):
            fast(batch_size=2, class_labels=wrong, **call)


def test_callback_observes_and_replaces_the_state(trained):
    fast = ddpm_fast.accelerate(pipeline(trained))
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((pipe is fast, step, t, tensors["latents"].shape))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 4 else {}

    images = fast(num_inference_steps=5, output_type="pt", callback_on_step_end=callback).images
    assert seen == [(True, i, t, (1, 1, 32, 32)) for i, t in enumerate([800, 600, 400, 200, 0])]
    assert torch.allclose(images, torch.full_like(images, 0.75))


# ---- the object


def test_the_copy_is_the_original_in_name_signature_and_saved_files(trained, tmp_path):
    pipe = pipeline(trained)
    fast = ddpm_fast.accelerate(pipe)
    assert isinstance(fast, diffusers.DDPMPipeline) and type(pipe) is diffusers.DDPMPipeline
    assert (type(fast).__name__, type(fast).__module__) == (
        type(pipe).__name__,
        type(pipe).__module__,
    )
    assert inspect.signature(type(fast).__init__) == inspect.signature(type(pipe).__init__)
    parameters = list(inspect.signature(type(fast).__call__).parameters.values())
    assert parameters[: len(inspect.signature(type(pipe).__call__).parameters)] == list(
        inspect.signature(type(pipe).__call__).parameters.values()
    )
    assert fast.unet is pipe.unet and fast.scheduler is pipe.scheduler
    pipe.save_pretrained(tmp_path / "original")
    fast.save_pretrained(tmp_path / "fast")
    files = sorted(
        os.path.relpath(os.path.join(folder, name), tmp_path / "original")
        for folder, _, names in os.walk(tmp_path / "original")
        for name in names
    )
    assert len(files) == 4
    match, *others = filecmp.cmpfiles(tmp_path / "original", tmp_path / "fast", files, False)
    assert sorted(match) == files and not any(others)


def test_twice_is_once_and_restore_returns_the_original(trained):
    pipe = pipeline(trained)
    fast = ddpm_fast.accelerate(pipe)
    again = ddpm_fast.accelerate(fast)
    assert ddpm_fast.restore(again) is pipe and ddpm_fast.restore(fast) is pipe
    assert ddpm_fast.restore(pipe) is pipe


def test_pickle_and_copy_build_an_accelerated_pipeline():
    pipe = pipeline(small_network())
    fast = ddpm_fast.accelerate(pipe)
    for other in (pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        expected, images = both(pipe, other, num_inference_steps=4)
        assert (images - expected).abs().max() < 2e-4 and other.report["engine"]


def test_building_draws_nothing(trained):
    before = torch.get_rng_state()
    ddpm_fast.accelerate(pipeline(trained))
    ddpm_fast.accelerate(trained)
    assert torch.equal(torch.get_rng_state(), before)


def test_report(trained):
    fast = ddpm_fast.accelerate(pipeline(trained), engine="reference")
    report = fast.report
    assert (report["engine"], report["noise"], report["dtype"]) == ("reference", "torch", "fp32")


def test_follows_weights_networks_and_schedulers():
    pipe = pipeline(small_network())
    fast = ddpm_fast.accelerate(pipe)
    changes = [
        lambda p: p.unet.conv_out.weight.data.mul_(1.5),  # no version counter
        lambda p: p.unet.load_state_dict({k: v * 0.9 for k, v in p.unet.state_dict().items()}),
        lambda p: setattr(p, "unet", small_network(layers_per_block=2)),
        lambda p: setattr(p, "scheduler", diffusers.DDIMScheduler(num_train_timesteps=500)),
        lambda p: p.scheduler.register_to_config(clip_sample=False),
        lambda p: p.to(torch.float64).to(torch.float32),
    ]
    for change in changes:
        change(fast)
        pipe.unet, pipe.scheduler = fast.unet, fast.scheduler
        expected, images = both(pipe, fast, num_inference_steps=4)
        assert (images - expected).abs().max() < 5e-4


LATER = [
    lambda n: n.mid_block.register_forward_hook(lambda *_: torch.zeros(())),
    lambda n: setattr(n.mid_block.attentions[0], "processor", object()),
    lambda n: setattr(n, "conv_act", torch.nn.Identity()),
    lambda n: setattr(n.conv_out, "forward", n.conv_out.forward),
]


@pytest.mark.parametrize("change", LATER, ids=["hook", "processor", "layer", "forward"])
def test_modifications_after_accelerate_are_refused(change):
    fast, network = ddpm_fast.accelerate(pipeline(small_network())), small_network()
    fast.unet = network
    fast(num_inference_steps=2)
    change(network)
    with pytest.raises(ValueError, match="not accelerated"):
        fast(num_inference_steps=2)
    alone = ddpm_fast.accelerate(small_network())
    change(alone)
    with pytest.raises(ValueError, match=r"mid_block|conv_"), torch.no_grad():
        alone(torch.zeros(1, 3, 8, 8), 3)


def test_changed_attributes_of_layers_are_refused():
    network = small_network()
    network.conv_norm_out.eps = 0.1
    with pytest.raises(ValueError, match="attributes of its layers were changed"):
        ddpm_fast.accelerate(pipeline(network))


def circular_padding(pipe):
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"


def own_step(pipe):
    pipe.scheduler.step = pipe.scheduler.step


def other_variance(pipe):
    pipe.scheduler.variance_type = "fixed_large"


@pytest.mark.parametrize("change", [circular_padding, own_step, other_variance])
@pytest.mark.parametrize("later", [False, True])
def test_changed_attributes_are_refused(change, later):
    pipe = pipeline(small_network())
    fast = ddpm_fast.accelerate(pipe) if later else pipe
    change(pipe)
    with pytest.raises(ValueError, match="not accelerated"):
        (fast if later else ddpm_fast.accelerate(fast))(num_inference_steps=2)


def test_global_hooks_are_refused():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="global forward hook"):
            ddpm_fast.accelerate(pipeline(small_network()))
    finally:
        handle.remove()


def test_changed_alphas_cumprod_are_used(trained):
    pipe = pipeline(trained, diffusers.DDIMScheduler(), diffusers.DDIMPipeline)
    fast = ddpm_fast.accelerate(pipe)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**1.5
    expected, images = both(pipe, fast, num_inference_steps=5)
    assert (images - expected).abs().max() < 1e-4


def test_the_reference_engine_is_as_close_to_the_original(trained):
    pipe = pipeline(trained)
    fast = ddpm_fast.accelerate(pipe, engine="reference")
    expected, images = both(pipe, fast, num_inference_steps=5)
    assert (images - expected).abs().max() < 1e-4


def test_objects_of_the_accelerated_classes_are_those_of_diffusers():
    """As `type(pipe)(**pipe.components)` and `from_pipe` construct them."""
    fast = ddpm_fast.accelerate(pipeline(small_network()))
    other = type(fast)(**fast.components)
    other.set_progress_bar_config(disable=True)
    assert other.report["engine"] == "diffusers" and len(other(num_inference_steps=2).images) == 1
    network = ddpm_fast.accelerate(small_network())
    plain = type(network).from_config(network.config)
    assert plain(torch.zeros(1, 3, 8, 8), 3).sample.shape == (1, 3, 8, 8)


def test_fp16_arrays():
    pipe = pipeline(small_network().half())
    results = [
        p(num_inference_steps=2, output_type="np").images.dtype
        for p in (pipe, ddpm_fast.accelerate(pipe))
    ]
    assert results[0] == results[1]


def test_permuted_weights_are_seen(trained):
    pipe = pipeline(copy.deepcopy(trained))
    fast = ddpm_fast.accelerate(pipe)
    fast(num_inference_steps=2)
    weight = pipe.unet.conv_in.weight
    weight.data.copy_(weight.data.flip(0))
    expected, images = both(pipe, fast, num_inference_steps=3)
    assert (images - expected).abs().max() < 1e-3


def test_copies_and_a_second_accelerate_keep_changes():
    fast = ddpm_fast.accelerate(pipeline(small_network()))
    fast.scheduler = diffusers.DDIMScheduler()
    pickled = pickle.loads(pickle.dumps(fast))
    for other in (copy.copy(fast), copy.deepcopy(fast), pickled, ddpm_fast.accelerate(fast)):
        assert type(other.scheduler) is diffusers.DDIMScheduler
        expected, images = both(fast, other, num_inference_steps=3)
        assert torch.equal(images, expected)


def test_latents_of_a_callback_are_a_tensor_of_each_step(trained):
    states = []
    fast = ddpm_fast.accelerate(pipeline(trained))
    record = lambda pipe, step, t, tensors: states.append(tensors["latents"])
    fast(num_inference_steps=3, callback_on_step_end=record)
    assert not torch.equal(states[0], states[2]) and states[0].is_contiguous()
    with pytest.raises(ValueError, match="returned Tensor; expected a dict"):
        fast(num_inference_steps=3, callback_on_step_end=lambda *_: torch.zeros(1))


def test_train_mode_is_kept_and_dropout_has_no_effect():
    network = small_network(dropout=0.5).train()
    fast = ddpm_fast.accelerate(pipeline(network))
    images = [fast(seed=0, num_inference_steps=3, output_type="pt").images for _ in range(2)]
    assert network.training and torch.equal(*images)


# ---- the network alone


def test_accelerated_network(trained):
    fast = ddpm_fast.accelerate(trained)
    assert isinstance(fast, diffusers.UNet2DModel)
    assert inspect.signature(fast.forward) == inspect.signature(trained.forward)
    x = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in (17, torch.tensor(999), torch.tensor([1, 500, 7])):
        assert relative_error(fast(x, t).sample, trained(x, t).sample) < 1e-5
    assert relative_error(fast(x, 3, return_dict=False)[0], trained(x, 3).sample) < 1e-5
    assert torch.equal(fast(x, 2.5).sample, trained(x, 2.5).sample)  # a fractional timestep
    assert ddpm_fast.restore(fast) is trained


def test_report_of_the_last_call_of_a_network(trained):
    fast, x = ddpm_fast.accelerate(trained, engine="reference"), torch.zeros(1, 1, 32, 32)
    with torch.no_grad():
        fast(x, torch.tensor(3.0))  # as many schedulers of diffusers pass it
        assert fast.report["engine"] == "reference"
        fast(x, 3.5)
        assert fast.report["reason"] == "the timesteps are not integers"


def test_the_engine_of_a_network_is_built_once(monkeypatch):
    from ddpm_fast.integrations import diffusers_unet

    builds, choose = [], diffusers_unet.choose
    monkeypatch.setattr(diffusers_unet, "choose", lambda *a: (builds.append(1), choose(*a))[1])
    fast = ddpm_fast.accelerate(small_network())
    with torch.no_grad():
        for t in (999, 500, 0, 999, 1500, 700):
            fast(torch.zeros(1, 3, 8, 8), t)
    assert len(builds) == 2  # the second for t = 1500


def test_networks_are_copied_pickled_and_fall_back():
    network = small_network()
    fast, x = ddpm_fast.accelerate(network, otherwise="diffusers"), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x, 3).sample
        for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
            assert relative_error(other(x, 3).sample, expected) < 1e-5
        hooked(network)
        with pytest.warns(UserWarning, match="forward hook"):
            assert torch.equal(fast(x, 3).sample, expected)


def test_accelerated_network_with_gradients_is_the_original():
    network = small_network().requires_grad_(True)
    fast = ddpm_fast.accelerate(network)
    x = torch.randn(2, 3, 8, 8)
    fast(x, 5).sample.square().sum().backward()
    gradient = network.conv_in.weight.grad.clone()
    network.zero_grad()
    network(x, 5).sample.square().sum().backward()
    assert torch.equal(gradient, network.conv_in.weight.grad)


def test_any_scheduler_around_the_accelerated_network(trained):
    results = []
    for network in (trained, ddpm_fast.accelerate(trained)):
        pipe = pipeline(
            network, diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
        )
        generator = torch.Generator().manual_seed(0)
        results.append(pipe(generator=generator, num_inference_steps=5, output_type="pt").images)
    assert (results[0] - results[1]).abs().max() < 1e-4


# ---- what cannot be accelerated


def hooked(network):
    network.mid_block.register_forward_hook(lambda *_: None)


def exchanged(network):
    network.conv_in = torch.nn.Sequential(network.conv_in)


def overridden(network):
    network.conv_out.forward = network.conv_out.forward


def halved(network):
    network.conv_in.to(torch.float16)


def parametrized(network):
    torch.nn.utils.parametrizations.weight_norm(network.conv_in)


class Other(diffusers.UNet2DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


REFUSED_NETWORKS = [
    (hooked, "mid_block has a forward hook; remove the hook"),
    (exchanged, "which the configuration does not describe"),
    (overridden, "conv_out has a forward hook"),
    (halved, "cast all to one dtype"),
    (parametrized, "is parametrized"),
    (lambda n: setattr(n, "__class__", Other), "Other overrides forward"),
    (lambda n: setattr(n, "peft_config", {}), "has PEFT adapters"),
    (lambda n: setattr(n, "is_quantized", True), "is quantized"),
    (lambda n: setattr(n.mid_block, "_hf_hook", object()), "offloading"),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED_NETWORKS, ids=lambda v: getattr(v, "__name__", "")
)
def test_refuses_networks(change, message):
    network = small_network()
    change(network)
    with pytest.raises(ValueError, match=message) as error:
        ddpm_fast.accelerate(pipeline(network))
    assert "\n" not in str(error.value)


REFUSED_SCHEDULERS = [
    (
        lambda: diffusers.EulerAncestralDiscreteScheduler(),
        "the scheduler is EulerAncestralDiscreteScheduler; expected",
    ),
    (lambda: diffusers.DDPMScheduler(thresholding=True), "thresholding=True"),
    (lambda: diffusers.DDPMScheduler(variance_type="learned"), "variance_type='learned'"),
    (lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3), "solver_order=3"),
    (lambda: diffusers.DDPMScheduler(variance_type="learned_range"), "3 output channels"),
]


@pytest.mark.parametrize(
    ("make", "message"), REFUSED_SCHEDULERS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_refuses_schedulers_or_runs_those_of_diffusers_with_one_warning(make, message):
    network = small_network()
    learned = message.startswith("3 output")
    with pytest.raises(ValueError, match=message):
        ddpm_fast.accelerate(pipeline(network, make()))
    if "variance_type" in message or learned:
        return  # diffusers fails too
    pipe = pipeline(network, make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = ddpm_fast.accelerate(pipe, otherwise="diffusers")
        expected, images = both(pipe, fast, num_inference_steps=5)
        both(pipe, fast, num_inference_steps=5)
    assert len([w for w in caught if "not accelerated" in str(w.message)]) == 1
    assert (images - expected).abs().max() < 5e-3
    with pytest.raises(ValueError, match="seed needs the accelerated loop"):
        fast(seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=0, generator=torch.Generator()), "seed and generator were both given"),
        (dict(images=[1]), "images was given without seed"),
        (dict(seed=0, images=[1], batch_size=2), "expected as many"),
        (dict(generator=[torch.Generator()], batch_size=2), "list of 1 generators"),
        (dict(class_labels=1), "unconditional network"),
        (dict(num_inference_steps=1001), "cannot be larger"),
        (dict(num_inference_steps=-1), "expected an integer of at least 1"),
        (dict(class_labels="a"), "class_labels"),
        (dict(callback_on_step_end_tensor_inputs=["eps"]), "expected latents only"),
        (dict(seed=2**64), "seed"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refuses_calls(options, message):
    fast = ddpm_fast.accelerate(pipeline(small_network()))
    with pytest.raises(ValueError, match=message):
        fast(**options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fast(sead=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "a string", "pipe is a str; expected"),
        (lambda: torch.nn.Linear(1, 1), "pipe is a Linear; expected"),
        (lambda: diffusers.DDPMPipeline, "expected a DDPMPipeline"),
    ],
)
def test_refuses_other_objects(make, message):
    with pytest.raises(ValueError, match=message):
        ddpm_fast.accelerate(make())
    with pytest.raises(ValueError, match="otherwise is"):
        ddpm_fast.accelerate(make(), otherwise="ignore")
