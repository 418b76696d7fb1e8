"""Sampler API: names of dtypes and devices, hints in errors, repr, outputs, memory."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, Trajectory
from ddpm_fast.data.image_io import to_pil
from ddpm_fast.engines.base import check_device, dtype_name
from ddpm_fast.kernels import ddpm_step, noise, noise_mse, q_sample
from ddpm_fast.sampling.sinks import open_sink
from ddpm_fast.utils import memory

SCHEDULE = NoiseSchedule.linear(timesteps=20)


def half(x_t, t):
    return 0.5 * x_t


def sampler_of(model=half, **options):
    return Sampler(model, SCHEDULE, **{"shape": (1, 4, 4), **options})


# ---- names


@pytest.mark.parametrize(
    ("name", "names"),
    {
        "fp32": ["fp32", "FP32", "float32", "float", "torch.float32", torch.float32],
        "fp16": ["fp16", "half", "float16", "Float16", "torch.half", torch.float16, torch.half],
        "bf16": ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16],
        "fp8": ["fp8", "float8", "float8_e4m3fn", "torch.float8_e4m3fn"],
    }.items(),
)
def test_dtype_aliases(name, names):
    assert [dtype_name(n) for n in names] == [name] * len(names)


@pytest.mark.parametrize("dtype", ["int8", "fp64", "", torch.int8, torch.float64, 16, None])
def test_refuses_other_dtypes(dtype):
    with pytest.raises(ValueError, match="expected one of fp32, fp16, bf16, fp8"):
        dtype_name(dtype)


def test_the_error_for_an_unknown_device_lists_available_devices():
    for device in ("bogus", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=r"device is .*; expected one of cpu") as raised:
            sampler_of(device=device)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 250
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_cuda_without_a_gpu():
    with pytest.raises(ValueError, match="device is 'cuda'; expected one of cpu"):
        sampler_of().to("cuda")
    with pytest.raises(ValueError, match="device is 'cuda'; expected one of cpu"):
        Sampler.from_pretrained("weights/fashion-mnist-32", device="cuda")


# ---- hints


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("num_inference_steps", "use steps="),
        ("generator", "use seed=, an integer"),
        ("guidance_scale", "classifier-free guidance is not supported"),
        ("output_type", 'use output="uint8"'),
        ("class_labels", "use labels="),
        ("batchsize", "did you mean batch_size?"),
        ("lables", "did you mean labels?"),
        ("outputs", "did you mean output?"),
        ("zzz", "expected some of seed, solver, steps"),
    ],
)
@pytest.mark.parametrize("method", ["sample", "stream"])
def test_the_error_for_an_unknown_keyword_names_the_method_and_a_replacement(method, keyword, hint):
    with pytest.raises(TypeError) as raised:
        getattr(sampler_of(), method)(1, **{keyword: 1})
    message = str(raised.value)
    assert message.startswith(f"Sampler.{method}() got an unknown keyword {keyword!r}")
    assert hint in message


def test_an_unknown_keyword_of_table():
    with pytest.raises(TypeError, match=r"Sampler\.table\(\) .* 'step': did you mean steps\?"):
        sampler_of().table(step=3)


def test_errors_about_num_classes_and_the_signature():
    def conditional(x_t, t, labels):
        return x_t * labels[:, None, None, None]

    with pytest.raises(ValueError, match="if the third argument is the class, give num_classes="):
        sampler_of(conditional)
    assert sampler_of(conditional, num_classes=3).sample(2, steps=1).shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match="leave num_classes out"):
        sampler_of(half, num_classes=3)
    with pytest.raises(ValueError, match="wrap it in a function"):
        sampler_of(lambda x_t: x_t)
    with pytest.raises(ValueError, match="model is int; expected a callable"):
        sampler_of(3)
    with pytest.raises(ValueError, match="give Sampler"):
        sampler_of().sample(2, labels=1)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x_t, t):
        return self.conv(x_t)


def test_a_float64_module_is_refused():
    with pytest.raises(ValueError, match=r"weights of torch.float64; .* model.float\(\)"):
        sampler_of(Conv().double())


# ---- repr, to


def test_repr_is_one_line():
    sampler = sampler_of(Conv())
    assert repr(sampler) == (
        "Sampler(Conv of 2 parameters, shape (1, 4, 4), 20 timesteps, eps, fixed_large, clip 1.0, "
        "fp32 on cpu, engine 'reference')"
    )
    assert repr(sampler.engine) == (
        "EagerEngine('reference', dtype=torch.float32, reason='the model is not a ddpm_fast UNet')"
    )
    assert repr(sampler.table(steps=10)) == "StepTable(10 steps, t = 19 ... 0)"


def test_to_casts_a_module_in_place():
    torch.manual_seed(0)
    model = Conv()
    sampler = sampler_of(model)
    expected = sampler_of(Conv().to(torch.bfloat16))
    expected.model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    assert sampler.to("cpu") is sampler and sampler.precision == "fp32"
    assert sampler.to(torch.bfloat16) is sampler and sampler.precision == "bf16"
    assert torch.equal(sampler.sample(2, steps=3), expected.sample(2, steps=3))
    assert sampler.to(dtype="float32").model.conv.weight.dtype == torch.float32


def test_to_leaves_the_sampler_unchanged_if_it_raises():
    sampler = sampler_of()
    engine = sampler.engine
    with pytest.raises(ValueError, match="dtype is bf16"):
        sampler.to(dtype="bf16")  # a function cannot be cast
    assert sampler.engine is engine and sampler.precision == "fp32"
    model = Conv()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = sampler_of(model)
    with pytest.raises(ValueError, match="fp8"):
        sampler.to(dtype="fp8")  # casts the weights to bf16 before it raises
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sampler.sample(1, steps=2).shape == (1, *sampler.shape[1:], sampler.shape[0])


# ---- outputs


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_output_has_the_pixels_of_uint8(channels, mode):
    sampler = sampler_of(shape=(channels, 4, 5))
    expected = sampler.sample(3, steps=2)
    images = sampler.sample(3, steps=2, output="pil", batch_size=2)
    assert [image.mode for image in images] == [mode] * 3
    pixels = np.stack([np.asarray(image).reshape(4, 5, channels) for image in images])
    np.testing.assert_array_equal(pixels, expected.numpy())
    assert images[0].tobytes() == to_pil(expected)[0].tobytes()


def test_pil_output_of_other_channels_is_refused_before_the_run():
    with pytest.raises(ValueError, match="5-channel images"):
        sampler_of(shape=(5, 4, 4)).stream(1, output="pil")


def test_batches_have_the_indices_of_their_images():
    sampler = sampler_of()
    batches = list(sampler.stream([7, 3, 9], steps=2, batch_size=2))
    assert [b.indices.tolist() for b in batches] == [[7, 3], [9]]
    assert [first for first, _ in batches] == [7, 9]
    padded = list(sampler.stream(range(3), steps=2, batch_size=2, pad=True))
    assert [b.indices.tolist() for b in padded] == [[0, 1], [2]]


def test_a_stopped_run_continues_with_the_remaining_indices():
    sampler, drawn = sampler_of(), []
    for _, images in sampler.stream(5, steps=2, batch_size=2, stop=lambda: len(drawn) == 1):
        drawn.append(images)
    count = sum(map(len, drawn))
    rest = sampler.sample(range(count, 5), steps=2)
    assert 0 < count < 5
    assert torch.equal(torch.cat([*drawn, rest]), sampler.sample(5, steps=2))
    assert len(sampler.sample(5, steps=2, batch_size=2, stop=lambda: True)) == 0


# ---- trajectories


def test_a_trajectory_has_the_records_of_the_last_run():
    sampler, trajectory = sampler_of(), Trajectory(every=2)
    sampler.sample(5, steps=6, callback=trajectory, batch_size=2)
    expected = Trajectory(every=2)
    sampler.sample(range(3, 5), steps=4, callback=expected)
    sampler.sample(range(3, 5), steps=4, callback=trajectory, batch_size=1)  # other steps, images
    assert trajectory.t == expected.t and trajectory.x.shape == (2, 2, 1, 4, 4)
    assert torch.equal(trajectory.x, expected.x)


def test_a_trajectory_has_the_images_that_are_returned():
    """A stopped batch is left out."""
    sampler, trajectory, polls = sampler_of(), Trajectory(), iter(range(100))
    images = sampler.sample(
        5, steps=4, batch_size=2, callback=trajectory, stop=lambda: next(polls) == 6, output="float"
    )
    assert len(images) == 2 and torch.equal(trajectory.x[-1], images)


def test_an_empty_trajectory_raises():
    trajectory = Trajectory(every=3)
    with pytest.raises(RuntimeError, match=r"pass it as callback= to Sampler\.sample"):
        _ = trajectory.x
    sampler_of().sample(1, steps=2, callback=trajectory)
    with pytest.raises(RuntimeError, match="at least every = 3 steps"):
        _ = trajectory.x


# ---- memory


def test_images_that_memory_cannot_hold_are_refused_before_the_run(tmp_path):
    def model(x_t, t):
        raise AssertionError("the run has started")

    for output in ("uint8", "float", "pil"):
        with pytest.raises(ValueError, match=r"GiB of memory .* Sampler\.stream, or write .* dir"):
            sampler_of(model).sample(10**12, output=output)
    sampler_of(model).stream(10**12)  # needs memory for one batch
    for name in ("many.npz", "many.npy", "many.png"):
        with pytest.raises(ValueError, match=r"GiB of memory are available .* write a directory"):
            open_sink(tmp_path / name, range(10**12), (1, 4, 4))
    open_sink(tmp_path / "many", range(10**12), (1, 4, 4))
    open_sink(tmp_path / "few.npz", range(10), (1, 4, 4))


def test_available_memory_is_the_least_of_system_and_control_groups(tmp_path):
    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    meminfo = write(tmp_path / "meminfo", "MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    assert memory._of_system(meminfo) == [8000 * 1024]
    assert memory._of_system(tmp_path / "absent") == []
    root = tmp_path / "cgroup"
    write(root / "a/b/memory.max", "max\n")
    write(root / "a/b/memory.current", "100\n")
    write(root / "a/memory.max", "1000\n")
    write(root / "a/memory.current", "700\n")
    write(root / "a/memory.stat", "anon 1\ninactive_file 50\n")
    membership = write(tmp_path / "membership", "0::/a/b\n")
    assert memory._of_groups(membership, root) == [350]  # the limit of the parent group
    write(root / "memory/c/memory.limit_in_bytes", "500\n")
    write(root / "memory/c/memory.usage_in_bytes", "450\n")
    write(membership, "5:cpu:/c\n4:memory,x:/c\n")
    assert memory._of_groups(membership, root) == [50]
    assert memory.available_memory(torch.device("cpu")) > 2**20


# ---- kernels


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        (q_sample.q_sample, "x_0 coef t noise_row seed image"),
        (ddpm_step.ddpm_step, "x_t out table step seed image learned old"),
        (noise_mse.noise_mse, "out x_0 coef t noise_row seed image"),
        (noise.noise, "seed image noise_row tag channels height width"),
        (noise.words, "seed image noise_row tag count"),
    ],
)
def test_signatures_and_docstrings_of_operations(operation, parameters):
    assert list(inspect.signature(operation).parameters) == parameters.split()
    assert "[B" in operation.__doc__ and operation.__name__ in str(operation.__qualname__)


def test_operations_compile():
    def draw(index):
        return 2 * noise.noise(index, index, index, noise.X_T, 1, 2, 2)

    index = torch.arange(3)
    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    assert torch.equal(compiled(index), draw(index))


def test_backward_through_q_sample_raises():
    index = torch.zeros(1, dtype=torch.int64)
    x_0 = torch.zeros(1, 1, 2, 2, requires_grad=True)
    x_t = q_sample.q_sample(x_0, SCHEDULE.q_sample_table("cpu"), index, index, index, index)
    with pytest.raises(RuntimeError, match=r"ddpm_fast.*q_sample.*no autograd formula"):
        x_t.sum().backward()
