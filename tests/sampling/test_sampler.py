import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, Trajectory, UNet, UNetConfig
from ddpm_fast.data.pixels import to_uint8
from ddpm_fast.kernels import noise as N
from ddpm_fast.utils.validation import seed_bits

SCHEDULE = NoiseSchedule.linear()
MEAN, STD = 0.3, 0.25


def gaussian_denoiser(x_t, t):
    """The exact eps of data ~ N(MEAN, STD^2), independent per pixel."""
    bar = torch.from_numpy(SCHEDULE.alpha_bar.copy()).float()[t][:, None, None, None]
    noise = torch.from_numpy(SCHEDULE.noise_var.copy()).float()[t][:, None, None, None]
    return noise.sqrt() * (x_t - bar.sqrt() * MEAN) / (bar * STD**2 + noise)


def gaussian_sampler(**options):
    return Sampler(gaussian_denoiser, SCHEDULE, **{"shape": (1, 8, 8), "clip": None, **options})


def small_unet(num_classes=10, **options):
    torch.manual_seed(0)
    config = dict(sample_size=16, in_channels=1, out_channels=1, channels=(16, 32), layers=1)
    config |= dict(attention=(False, True), norm_groups=4, num_classes=num_classes)
    return UNet(UNetConfig(**config, **options)).eval()


def unet_sampler(**options):
    return Sampler(small_unet(), SCHEDULE, (1, 16, 16), **options)


def chain_of_the_gaussian(table):
    """Exact mean and standard deviation after the table's steps: every step is linear in x_t."""
    mean, var = 0.0, 1.0
    for t, (x_0_x, x_0_out, _, mean_x_0, mean_x, mean_out, _, sigma, *_) in zip(
        table.t, table.coef, strict=True
    ):
        bar, noise = SCHEDULE.alpha_bar[t], SCHEDULE.noise_var[t]
        eps_x = np.sqrt(noise) / (bar * STD**2 + noise)
        eps_1 = -eps_x * np.sqrt(bar) * MEAN
        a = mean_x_0 * (x_0_x + x_0_out * eps_x) + mean_x + mean_out * eps_x
        b = (mean_x_0 * x_0_out + mean_out) * eps_1
        mean, var = a * mean + b, a * a * var + sigma**2
    return mean, np.sqrt(var)


@pytest.mark.parametrize(
    ("variance", "options", "ratio"),
    [
        pytest.param("fixed_small", {}, 0.985, marks=pytest.mark.full),
        pytest.param("fixed_large", {}, 1.004, marks=pytest.mark.full),
        ("fixed_large", dict(steps=100), None),
        ("fixed_large", dict(solver="ddim", eta=0.5), None),
    ],
    ids=str,
)
def test_moments_of_gaussian_samples(variance, options, ratio, figure):
    """100,000 samples: 1,000 images of 100 independent pixels."""
    sampler = gaussian_sampler(shape=(1, 10, 10), variance=variance)
    x = sampler.sample(1000, batch_size=500, output="float", **options).double()
    name = f"{x.numel():,} samples of a Gaussian, {variance} {options or ''}".strip()
    mean, std = chain_of_the_gaussian(sampler.table(**options))
    n = x.numel()
    z_mean = float(x.mean() - mean) / (std / n**0.5)
    z_std = float(x.std() - std) / (std / (2 * n) ** 0.5)
    figure(f"{name}: standard errors off, mean and std", f"{z_mean:+.2f} {z_std:+.2f}")
    assert abs(z_mean) < 4 and abs(z_std) < 4
    if ratio:
        figure(f"{name}: std of the chain / std of the data", f"{std / STD:.4f}")
        assert std / STD == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize(
    "options", [dict(steps=20), dict(solver="ddim", steps=20, eta=0.5)], ids=str
)
def test_an_image_does_not_depend_on_its_batch_pointwise(options):
    def sample(indices, **more):
        return gaussian_sampler().sample(indices, seed=3, output="float", **options, **more)

    whole = sample(7)
    parts = [
        (sample(7, batch_size=1), whole),
        (sample(7, batch_size=3), whole),
        (sample(range(4, 6)), whole[4:6]),
        (sample([6, 2]), whole[[6, 2]]),
    ]
    for images, expected in parts:
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch_unet(figure):
    sampler = unet_sampler()
    options = dict(seed=2**64 - 1, steps=30, output="float")
    whole = sampler.sample(8, **options)
    worst = max(
        float((sampler.sample(8, batch_size=b, **options) - whole).abs().max()) for b in (1, 3, 5)
    )
    figure("UNet on the CPU, batches of 1, 3, 5 against 8: largest difference", f"{worst:.1e}")
    assert worst < 1e-4
    pixels, alone = to_uint8(whole), sampler.sample(range(5, 6), **{**options, "output": "uint8"})
    difference = (pixels[5:6].int() - alone.int()).abs()
    ties = ((whole[5] + 1) * 127.5 % 1 - 0.5).abs() < 0.02
    assert (difference[0].permute(2, 0, 1)[~ties] == 0).all() and difference.max() <= 1


def test_padded_batches_are_bit_exact():
    sampler = unet_sampler()
    options = dict(seed=1, steps=10, output="float", batch_size=4, pad=True)
    whole = sampler.sample(10, **options)
    for images in ([7], range(3, 9), [9, 0, 5]):
        assert torch.equal(sampler.sample(images, **options), whole[list(images)])


def test_stream_yields_what_sample_returns():
    sampler = gaussian_sampler()
    pieces = list(sampler.stream(range(10, 17), batch_size=3, seed=5, steps=5))
    assert [first for first, _ in pieces] == [10, 13, 16]
    assert torch.equal(
        torch.cat([x for _, x in pieces]), sampler.sample(range(10, 17), seed=5, steps=5)
    )


def test_x_T_is_the_noise_of_the_image_index():
    sampler = gaussian_sampler()
    state = sampler.begin(torch.tensor([4]), seed_bits(9))
    seed, image, row = torch.tensor([9]), torch.tensor([4]), torch.tensor([0], dtype=torch.int32)
    assert torch.equal(state.x, N.noise_reference(seed, image, row, N.X_T, (1, 8, 8)))


def test_types_of_indices():
    sampler = gaussian_sampler()
    expected = sampler.sample(3, steps=2)
    lists = [0, 1, 2], (0, 1, 2), np.arange(3), torch.arange(3, dtype=torch.int32)
    for indices in (np.int64(3), range(3), *lists):
        images = sampler.sample(indices, seed=np.uint64(0), steps=np.int32(2))
        assert torch.equal(images, expected)
    assert sampler.sample([]).shape == sampler.sample(range(5, 5)).shape == (0, 8, 8, 1)


def test_trajectory_and_callback():
    sampler, trajectory, seen = gaussian_sampler(), Trajectory(every=2), []
    final = sampler.sample(5, steps=6, batch_size=2, output="float", callback=trajectory)
    assert trajectory.t == [799, 400, 0] and trajectory.x.shape == (3, 5, 1, 8, 8)
    assert torch.equal(trajectory.x[-1], final)
    sampler.sample(2, steps=3, callback=lambda step, t, x: seen.append((step, t, tuple(x.shape))))
    assert seen == [(0, 999, (2, 1, 8, 8)), (1, 500, (2, 1, 8, 8)), (2, 0, (2, 1, 8, 8))]


def test_start_from_partly_noised_images():
    sampler = gaussian_sampler()
    x_0 = torch.full((3, 1, 8, 8), 0.9)
    near = sampler.sample(3, output="float", start=(sampler.diffuse(x_0, 20, seed=1), 20))
    far = sampler.sample(3, output="float", start=(sampler.diffuse(x_0, 999, seed=1), 999))
    assert abs(near.mean() - 0.9) < 0.15 and abs(far.mean() - MEAN) < 0.1
    assert sampler.table(steps=10, start=500).t.tolist() == [500, 444, 333, 222, 111, 0]


def test_diffuse_has_the_moments_of_the_forward_process():
    x_t = gaussian_sampler().diffuse(torch.full((500, 1, 8, 8), 0.5), 300)
    assert float(x_t.mean()) == pytest.approx(0.5 * SCHEDULE.alpha_bar[300] ** 0.5, abs=0.02)
    assert float(x_t.var()) == pytest.approx(SCHEDULE.noise_var[300], rel=0.03)


def test_classes():
    sampler = unet_sampler()
    options = dict(steps=2, output="float")
    drawn = sampler.begin(torch.arange(2000), 0).labels
    assert drawn.bincount(minlength=10).min() > 140 and drawn.max() == 9  # each class 200 +- 13
    # a class does not depend on the batch
    assert torch.equal(sampler.begin(torch.tensor([77]), 0).labels, drawn[77:78])
    assert torch.equal(sampler.sample(3, labels=drawn[:3], **options), sampler.sample(3, **options))
    assert torch.equal(
        sampler.sample(3, labels=4, **options), sampler.sample(3, labels=[4, 4, 4], **options)
    )
    assert not torch.equal(
        sampler.sample(3, labels=4, **options), sampler.sample(3, labels=5, **options)
    )


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_learned_variance(solver):
    """Variance output 1 is the upper end of the range: fixed_large. DDIM ignores that output."""

    def model(x_t, t):
        return torch.cat([gaussian_denoiser(x_t, t), torch.ones_like(x_t)], dim=1)

    options = dict(solver=solver, steps=10, output="float")
    learned = Sampler(model, SCHEDULE, (1, 8, 8), variance="learned_range", clip=None)
    expected = gaussian_sampler().sample(4, **options)
    torch.testing.assert_close(learned.sample(4, **options), expected, rtol=0, atol=1e-5)


def test_a_model_that_modifies_the_state_is_refused():
    with pytest.raises(ValueError, match="changed its input x_t in place"):
        Sampler(lambda x, t: x.mul_(0.5), SCHEDULE, (1, 4, 4)).sample(1, steps=2)


def test_a_model_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="the network's output is"):
        Sampler(lambda x, t: x.repeat(1, 5, 1, 1), SCHEDULE, (1, 4, 4)).sample(1, steps=2)


def test_a_model_that_returns_no_tensor_is_refused():
    with pytest.raises(ValueError, match=r"the model returned tuple; expected a tensor"):
        Sampler(lambda x, t: (x,), SCHEDULE, (1, 4, 4)).sample(1, steps=2)


def test_dropout_is_off_during_sampling_and_training_mode_is_restored():
    unet = small_unet(dropout=0.5).train()
    sampler = Sampler(unet, SCHEDULE, (1, 16, 16))
    assert torch.equal(sampler.sample(1, steps=3), sampler.sample(1, steps=3))
    assert unet.training


def test_the_noise_does_not_depend_on_the_default_dtype():
    expected = gaussian_sampler().sample(2, steps=3, output="float")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(gaussian_sampler().sample(2, steps=3, output="float"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_long_ranges_are_not_expanded():
    indices = range(10**15, 2 * 10**15)
    first, images = next(gaussian_sampler().stream(indices, batch_size=2, steps=2))
    assert first == 10**15 and images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_other_predictions_give_the_same_images(prediction):
    def model(x_t, t):
        bar = torch.from_numpy(SCHEDULE.alpha_bar.copy())[t][:, None, None, None]
        eps = gaussian_denoiser(x_t, t).double()
        x_0 = (x_t.double() - (1 - bar).sqrt() * eps) / bar.sqrt()
        return (x_0 if prediction == "x_0" else bar.sqrt() * eps - (1 - bar).sqrt() * x_0).float()

    other = Sampler(model, SCHEDULE, (1, 8, 8), prediction=prediction, clip=None)
    images, expected = (s.sample(2, steps=50, output="float") for s in (other, gaussian_sampler()))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-3)


def test_the_state_of_a_half_precision_network_is_fp32():
    sampler = Sampler(small_unet().bfloat16(), SCHEDULE, (1, 16, 16))
    x = sampler.sample(2, steps=5, output="float")
    assert sampler.dtype == torch.bfloat16 and x.dtype == torch.float32
    assert float((x - unet_sampler().sample(2, steps=5, output="float")).abs().mean()) < 0.05


def test_output():
    sampler = gaussian_sampler(shape=(3, 8, 4), clip=1.0)
    pixels, x = sampler.sample(2, steps=3), sampler.sample(2, steps=3, output="float")
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 8, 4, 3) and x.shape == (2, 3, 8, 4)
    levels = np.rint((np.clip(x.numpy().astype(np.float64), -1, 1) + 1) * 127.5)
    expected = levels.astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.abs(pixels.numpy().astype(int) - expected).max() <= 1
    assert (pixels.numpy() == expected).mean() > 0.99
    values = torch.tensor([-2.0, -1, 0.999, 1, 2]).view(1, 1, 1, 5)
    assert to_uint8(values).flatten().tolist() == [0, 0, 255, 255, 255]
    assert sampler.sample(0).shape == (0, 8, 4, 3)


def test_uint8_device_is_uint8_on_the_device_of_the_sampler():
    s = gaussian_sampler()
    images = s.sample(5, steps=3, output="uint8_device", batch_size=2)
    assert images.device == s.device and torch.equal(images.cpu(), s.sample(5, steps=3))


def test_each_image_with_its_seed():
    s = gaussian_sampler()
    images = s.sample([4, 9, 4], seeds=[1, 2**64 - 1, 7], steps=3, batch_size=2, output="float")
    for image, index, seed in zip(images, (4, 9, 4), (1, 2**64 - 1, 7), strict=True):
        assert torch.equal(image, s.sample([index], seed=seed, steps=3, output="float")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seeds=[1]), "seeds has 1 seeds for 2 images"),
        (dict(seeds=[1, 2], seed=3), "seed and seeds were both given"),
        (dict(seeds=[1, -2]), "seed = -2"),
        (dict(seeds=[1, 0.5]), "expected an integer"),
    ],
)
def test_refuses_seeds(options, message):
    with pytest.raises(ValueError, match=message):
        gaussian_sampler().sample(2, steps=2, **options)


def test_images_with_nan_raise():
    def model(x, t):
        return torch.where(torch.arange(len(x))[:, None, None, None] == 1, float("nan"), x)

    with pytest.raises(RuntimeError, match=r"images \[8\] contain NaN or Inf"):
        Sampler(model, SCHEDULE, (1, 4, 4)).sample(range(7, 10), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(indices=-1), "indices = -1"),
        (dict(indices=2.5), "indices = 2.5; expected an integer"),
        (dict(indices=[0.5]), "expected a count, or a range or list of integers"),
        (dict(indices=[[1, 2]]), "expected a count, or a range or list of integers"),
        (dict(indices=2, seed=0.5), "seed = 0.5; expected an integer"),
        (dict(indices=2, batch_size=1.5), "batch_size = 1.5; expected an integer"),
        (dict(indices=[3, -2]), "image index is -2"),
        (dict(indices=2, seed=-1), "seed = -1"),
        (dict(indices=2, seed=2**64), "seed = 18446744073709551616"),
        (dict(indices=2, steps=0), "0 steps"),
        (dict(indices=2, solver="heun"), "solver 'heun'"),
        (dict(indices=2, batch_size=0), "batch_size = 0"),
        (dict(indices=2, output="png"), "output is 'png'"),
        (dict(indices=2, labels=3), "the sampler has no classes"),
        (dict(indices=2, start=(torch.zeros(1, 1, 8, 8), 5)), r"expected floating-point \(2, 1, 8"),
        (
            dict(indices=2, start=(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 5)),
            "images are torch.uint8",
        ),
        (dict(indices=2, start=(torch.zeros(2, 1, 8, 8), 1000)), "timestep = 1000"),
        (dict(indices=2, start=(torch.zeros(2, 1, 8, 8), None)), "timestep = None"),
        (dict(indices=2, start=torch.zeros(2, 1, 8, 8)), "start is Tensor"),
        (dict(indices=2**63 + 1), "image indices are 0 to"),
        (dict(indices=True), "indices = True; expected an integer"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        gaussian_sampler().sample(**options)


@pytest.mark.parametrize(
    "labels", [10, -1, [1, 2, 3], [0.5, 0.5], True, [True, False], "a", [1, None]]
)
def test_refuses_labels(labels):
    with pytest.raises(ValueError, match="labels"):
        unet_sampler().sample(2, labels=labels, steps=2)


def test_refuses_at_construction():
    for options in (
        dict(shape=(8, 8)),
        dict(shape=(1, 8.5, 8)),
        dict(prediction="noise"),
        dict(variance="huge"),
        dict(num_classes=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            gaussian_sampler(**options)
    with pytest.raises(ValueError, match=r"needs a network with 2 output channels, .* has 1"):
        unet_sampler(variance="learned_range")
    with pytest.raises(ValueError, match="every = 0"):
        Trajectory(0)
    for t in (5.5, 1000, -1):
        with pytest.raises(ValueError, match="timestep"):
            gaussian_sampler().diffuse(torch.zeros(1, 1, 8, 8), t)
