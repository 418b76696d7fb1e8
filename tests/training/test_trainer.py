"""The training step against a plain PyTorch loop, and random draws against the seed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.kernels import noise as N
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.data_loader import BatchLoader
from ddpm_fast.training.flat_weights import as_vector
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.numerics import relative_error

stats = pytest.importorskip("scipy.stats")
GENERATOR = np.random.default_rng(0)
DATA = ImageData(GENERATOR.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8), np.arange(20) % 3)
SCHEDULE = NoiseSchedule.linear()
# images and timesteps of seed 1234, batch 0
ORDER = [0, 5, 7, 10, 3, 14, 8, 2]
TIMES = [371, 87, 287, 500, 465, 853, 876, 395]


def small_unet(num_classes=3, **options):
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    config |= dict(attention=(False, True), norm_groups=4, num_classes=num_classes)
    return UNet(UNetConfig(**config, **options))


def trainer(data=DATA, unet=None, device="cpu", **options):
    steps = dict(train_batch_size=8, max_train_steps=100, lr_warmup_steps=3, learning_rate=1e-2)
    return Trainer(unet or small_unet(), SCHEDULE, data, TrainConfig(**steps | options), device)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def noise_of(inputs):
    shape = tuple(inputs.x_0.shape[1:])
    return N.noise_reference(inputs.seed, inputs.image, inputs.row, N.Q_SAMPLE, shape)


def plain_steps(count, prediction="eps", **options):
    """The same training by PyTorch and diffusers, one parameter at a time, with the same draws."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    unet, config = small_unet(), trainer(**options).config
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(0.8, 0.99), weight_decay=0.1, eps=1e-6
    )
    steps = dict(num_warmup_steps=0, num_training_steps=config.max_train_steps)
    scheduler = get_scheduler(config.lr_scheduler, optimizer, **steps)
    ema = EMAModel(unet.parameters(), 0.6, use_ema_warmup=True, inv_gamma=2.0, power=0.5)
    loader, losses = BatchLoader(DATA, 0, 8, torch.device("cpu")), []
    bar = torch.from_numpy(SCHEDULE.alpha_bar.copy())
    for step in range(count):
        batch = loader.batch(step)
        a, s = (v[batch.t].view(-1, 1, 1, 1).float() for v in (bar.sqrt(), (1 - bar).sqrt()))
        seed = torch.zeros_like(batch.image)
        eps = N.noise_reference(seed, batch.image, batch.epoch, N.Q_SAMPLE, (1, 8, 8))
        out = unet(a * batch.x_0 + s * eps, batch.t, batch.labels)
        targets = {"eps": eps, "x_0": batch.x_0, "v": a * eps - s * batch.x_0}
        loss = F.mse_loss(out, targets[prediction])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.step(unet.parameters())
        losses.append((loss.item(), float(norm)))
    return unet, ema.shadow_params, losses


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "cosine", "linear"])
def test_equals_a_plain_loop(prediction, scheduler):
    adam = dict(adam_beta1=0.8, adam_beta2=0.99, adam_weight_decay=0.1, adam_epsilon=1e-6)
    ema = dict(ema_decays=(0.6,), ema_inv_gamma=2.0, ema_power=0.5)
    steps = dict(lr_scheduler=scheduler, max_train_steps=12, lr_warmup_steps=0)
    t = trainer(prediction_type=prediction, **steps, **adam, **ema)
    unet, average, losses = plain_steps(6, prediction, lr_scheduler=scheduler, max_train_steps=12)
    # Few steps: Adam divides by roots of small numbers, which magnifies rounding.
    for step in range(6):
        if step == 2:
            means, (loss, norm) = t.means(), np.mean(losses[:2], axis=0)
            assert means["loss"] == pytest.approx(loss, rel=1e-4)
            assert means["grad_norm"] == pytest.approx(norm, rel=1e-3)
        t.step()
    assert relative_error(flat(t.unet.parameters()), flat(unet.parameters())) < 2e-4
    assert relative_error(flat(t.ema.parameters()), flat(average)) < 2e-4


def test_rates_and_decays_are_those_of_diffusers():
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    for name in ("constant", "constant_with_warmup", "cosine", "linear"):
        config = TrainConfig(
            lr_scheduler=name, lr_warmup_steps=10, max_train_steps=60, learning_rate=1.0
        )
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=60)
        for step in range(60):
            # diffusers' warm-up starts with a step of rate zero, which ddpm_fast leaves out
            shift = 1 if step < 10 and name != "constant" else 0
            rate = optimizer.param_groups[0]["lr"]
            assert rate == pytest.approx(config.rate(step - shift), abs=1e-12)
            optimizer.step()
            scheduler.step()
    model = EMAModel([], 0.999, use_ema_warmup=True, inv_gamma=2.0, power=0.7)
    config = TrainConfig(ema_inv_gamma=2.0, ema_power=0.7, ema_decays=(0.999,))
    for step in (0, 1, 2, 10, 1000, 10**6):
        assert config.ema_decays_at(step)[0] == pytest.approx(model.get_decay(step + 1), rel=1e-12)
    assert config.ema_decays_at(0) == (0,)


def gradient(**options):
    t = trainer(**options)
    t.step()
    return t.weights.grad.clone(), t.means()["loss"]


def test_threads_and_accumulation_change_only_rounding():
    """16 images in one part, in two threads, in two batches: one gradient."""
    threads = torch.get_num_threads()
    whole, loss = gradient(train_batch_size=16, max_grad_norm=1e9)
    try:
        torch.set_num_threads(2)
        assert trainer(train_batch_size=16)._parts == 2
        torch.set_num_threads(1)
        assert trainer(train_batch_size=16)._parts == 1
        alone, loss_alone = gradient(train_batch_size=16, max_grad_norm=1e9)
    finally:
        torch.set_num_threads(threads)
    twice, loss_twice = gradient(
        train_batch_size=8, gradient_accumulation_steps=2, max_grad_norm=1e9
    )
    for other, other_loss in ((alone, loss_alone), (twice, loss_twice)):
        assert relative_error(other, whole) < 1e-5 and other_loss == pytest.approx(loss, rel=1e-5)


def test_gradient_in_fp64():
    result, _ = gradient(train_batch_size=16, max_grad_norm=1e9)
    t = trainer(train_batch_size=16)
    unet, inputs = small_unet().double(), t._noised(t.loader.batch(0))
    out = unet(inputs.x_t.double(), inputs.t, inputs.labels)
    exact = torch.autograd.grad(F.mse_loss(out, noise_of(inputs).double()), list(unet.parameters()))
    assert relative_error(result, torch.cat([as_vector(g) for g in exact])) < 1e-5


# ---- random draws


def test_every_epoch_visits_every_image_once_in_a_different_order():
    loader = BatchLoader(DATA, 3, 8, torch.device("cpu"))
    batches = [loader.batch(i) for i in range(10)]  # 80 visits: four epochs
    image, epoch = torch.cat([b.image for b in batches]), torch.cat([b.epoch for b in batches])
    assert epoch.tolist() == [i // 20 for i in range(80)]
    orders = image.view(4, 20)
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for batch in batches:
        pixels = torch.from_numpy(DATA.images)[batch.image].permute(0, 3, 1, 2)
        assert torch.equal(batch.x_0, pixels / 127.5 - 1)
        assert batch.labels.tolist() == (batch.image % 3).tolist()


def test_draws_depend_on_seed_image_and_epoch_alone():
    by_visit = {}
    for size in (8, 5):
        t = trainer(train_batch_size=size, random_flip=True, seed=7)
        for number in range(80 // size):
            batch = t.loader.batch(number)
            inputs = t._noised(batch)
            x_t, eps = inputs.x_t, noise_of(inputs)
            for i in range(size):
                visit = int(batch.image[i]), int(batch.epoch[i])
                drawn = (int(batch.t[i]), batch.x_0[i], x_t[i], eps[i])
                for a, b in zip(by_visit.get(visit, drawn), drawn, strict=True):
                    assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                by_visit[visit] = drawn
    assert len(by_visit) == 80


def test_timesteps_are_uniform_flips_are_half_and_orders_are_random():
    data = ImageData(np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1).repeat(5000, axis=0))
    loader = BatchLoader(data, 0, 5000, torch.device("cpu"), random_flip=True)
    batches = [loader.batch(i) for i in range(8)]
    counts = torch.cat([b.t for b in batches]).bincount(minlength=1000)
    assert len(counts) == 1000 and stats.chisquare(counts).pvalue > 1e-3
    flipped = torch.cat([b.x_0[:, 0, 0, 0] > b.x_0[:, 0, 0, 1] for b in batches])
    assert stats.binomtest(int(flipped.sum()), len(flipped)).pvalue > 1e-3
    positions = [loader.order(e).argsort() for e in range(8)]
    positions = torch.stack([*positions, torch.arange(5000)]).double()
    assert (torch.corrcoef(positions) - torch.eye(9)).abs().max() < 5 / math.sqrt(5000)


def test_the_order_is_frozen():
    """A change of these values would break every resume."""
    loader = BatchLoader(DATA, 1234, 8, torch.device("cpu"))
    assert loader.batch(0).image.tolist() == ORDER and loader.batch(0).t.tolist() == TIMES


def test_the_noise_of_a_step_is_that_of_the_kernel(device):
    t = trainer(device=device)
    batch = t.loader.batch(3)
    inputs = t._noised(batch)
    assert torch.equal(inputs.labels, batch.labels) and torch.equal(inputs.t, batch.t)
    bar = torch.from_numpy(SCHEDULE.alpha_bar.copy()).to(device)[batch.t].view(-1, 1, 1, 1)
    expected = bar.sqrt() * batch.x_0 + (1 - bar).sqrt() * noise_of(inputs)
    assert relative_error(inputs.x_t, expected) < 1e-6


# ---- edge cases


def test_a_step_with_nan_or_inf_changes_no_weight(monkeypatch):
    t = trainer()
    t.step()
    before, losses = {k: v.clone() for k, v in t.state().items()}, Trainer._losses
    monkeypatch.setattr(Trainer, "_losses", lambda *a: losses(*a) * math.inf)
    t.step()
    after = t.state()
    for name in ("weights", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(before[name], after[name])
    assert after["ema"].isfinite().all()
    monkeypatch.undo()
    t.step()
    assert t.means()["skipped"] == 1 and t.weights.isfinite().all() and t.done == 3
    monkeypatch.setattr(Trainer, "_losses", lambda *a: losses(*a) * math.nan)
    t.step()
    assert math.isnan(t.means()["loss"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_close_to_fp32(precision):
    exact, _ = gradient(max_grad_norm=1e9)
    t = trainer(mixed_precision=precision, max_grad_norm=1e9)
    t.step()
    assert t.weights.dtype == torch.float32 and t.means()["skipped"] == 0
    assert relative_error(t.weights.grad, exact) < {"bf16": 0.03, "fp16": 0.01}[precision]


def test_validation_loss_is_a_repeatable_mean_over_its_images():
    t = trainer()
    first = t.validation_loss(t.unet, DATA)
    t.step()
    t.unet.load_state_dict(small_unet().state_dict())
    assert t.validation_loss(t.unet, DATA) == pytest.approx(first, rel=1e-6) and t.unet.training
    image, row = torch.arange(20), torch.full((20,), 2**24 - 1)
    at = torch.tensor([int(1000 * ((i * 0.6180339887498949) % 1)) for i in range(20)])
    eps = N.noise_reference(torch.zeros_like(image), image, row, N.Q_SAMPLE, (1, 8, 8)).double()
    bar = torch.from_numpy(SCHEDULE.alpha_bar.copy())[at].view(-1, 1, 1, 1)
    x_0 = torch.from_numpy(DATA.images).permute(0, 3, 1, 2).double() / 127.5 - 1
    out = small_unet().double()(
        bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, at, torch.from_numpy(DATA.labels)
    )
    assert first == pytest.approx(F.mse_loss(out, eps).item(), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"use_ema": False}, {"dropout": 0.2}, {"prediction_type": "v"}], ids=str
)
def test_a_resumed_state_is_bit_exact(options):
    unet = lambda: small_unet(dropout=options.get("dropout", 0.0))
    config = {k: v for k, v in options.items() if k != "dropout"}
    straight = trainer(unet=unet(), **config)
    for _ in range(3):
        straight.step()
    saved = {k: v.clone() for k, v in straight.state().items()}
    torch.manual_seed(99)  # nothing may depend on torch's generator
    torch.rand(7)
    resumed = trainer(unet=unet(), **config)
    resumed.load_state(saved, 3)
    for t in (straight, resumed):
        for _ in range(3):
            t.step()
    expected, result = straight.state(), resumed.state()
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[k], result[k]) for k in expected)
    with pytest.raises(ValueError, match="expected a state of the same network"):
        trainer(unet=small_unet(num_classes=4), **config).load_state(saved, 3)


def test_the_weights_remain_views_of_one_vector():
    t = trainer()
    t.step()
    first = next(t.unet.parameters())
    assert first.data_ptr() == t.weights.data_ptr()
    t.weights.data.zero_()
    assert not any(p.any() for p in t.unet.parameters())


def test_learns():
    """Two classes, black and white: after training, images have the color of their label."""
    pixels = np.zeros((32, 8, 8, 1), np.uint8)
    pixels[16:] = 255
    data, unet = ImageData(pixels, np.arange(32) // 16), small_unet(num_classes=2)
    config = dict(train_batch_size=32, prediction_type="x_0", ema_decays=(0.95,))
    t = trainer(data, unet, **config)
    for _ in range(100):
        t.step()
    sampler, options = Sampler(t.ema, SCHEDULE, (1, 8, 8), "x_0"), dict(solver="ddim", steps=10)
    x = sampler.sample(8, labels=[0, 1] * 4, output="float", **options)
    means = x.mean((1, 2, 3))
    assert (means[::2] < -0.7).all() and (means[1::2] > 0.7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(train_batch_size=0), "train_batch_size = 0"),
        (dict(learning_rate=-1.0), "learning_rate = -1.0"),
        (dict(learning_rate=math.nan), "learning_rate = nan"),
        (dict(adam_beta1=1.0), "adam_beta1 = 1.0"),
        (dict(lr_warmup_steps=-1), "lr_warmup_steps = -1"),
        (dict(lr_scheduler="polynomial"), "expected one of constant"),
        (dict(mixed_precision="fp8"), "expected one of no, bf16, fp16"),
        (dict(prediction_type="noise"), "expected one of eps"),
        (dict(seed=-1), "seed = -1"),
        (dict(max_train_steps=2**25 * 20), "epochs of 20 images"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_invalid_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_data_that_does_not_fit_the_network():
    with pytest.raises(ValueError, match="expected 3 and 3 for images of 3 channels"):
        trainer(ImageData(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64)))
    with pytest.raises(ValueError, match="the network has 3 classes, the data no labels"):
        trainer(ImageData(DATA.images))
    with pytest.raises(ValueError, match="the network has 3 classes, the data 5"):
        trainer(ImageData(DATA.images, np.arange(20) % 5))
    t = trainer(unet=small_unet(num_classes=None))  # an unconditional network ignores labels
    assert t.loader.batch(0).labels is not None
    t.step()


def test_half_precision_through_fp32_on_a_cpu_is_as_accurate():
    """GroupNorm and attention in fp32: the error is at most 1.2 times that of autocast alone."""
    from ddpm_fast.training.cpu_ops import use_fp32_for_slow_ops

    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999])
    labels = torch.tensor([0, 1, 2, 0])

    def gradient_of(unet, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = unet(x.to(unet.dtype), t, labels)
        loss = out.double().square().mean()
        return flat(g.double() for g in torch.autograd.grad(loss, list(unet.parameters())))

    exact = gradient_of(small_unet().double(), False)
    plain, unet = gradient_of(small_unet(), True), small_unet()
    use_fp32_for_slow_ops(unet)
    result = gradient_of(unet, True)
    assert not torch.equal(result, plain)
    assert relative_error(result, exact) < 1.2 * relative_error(plain, exact) < 0.05
    assert torch.equal(
        gradient_of(unet, False), gradient_of(small_unet(), False)
    )  # fp32: no change


def test_validation_covers_sorted_data_at_all_timesteps(monkeypatch):
    """A folder of classes is sorted by class: its first images are of one class."""
    batches, noised = [], Trainer._noised
    monkeypatch.setattr(
        Trainer, "_noised", lambda self, batch: (batches.append(batch), noised(self, batch))[1]
    )
    data = ImageData(DATA.images[:1].repeat(3000, axis=0), np.arange(3000) // 1000)
    trainer(data).validation_loss(small_unet(), data, 300)
    labels, t = torch.cat([b.labels for b in batches]), torch.cat([b.t for b in batches])
    assert labels.bincount().tolist() == [100, 100, 100]
    for label in range(3):
        assert stats.kstest(t[labels == label].numpy() / 1000, "uniform").pvalue > 0.5


def test_dropout_differs_in_every_batch_of_a_step():
    t = trainer(unet=small_unet(dropout=0.5), gradient_accumulation_steps=2)
    masks = []
    t.unet.mid_block.resnets[0].dropout.register_forward_hook(
        lambda m, i, out: masks.append(out == 0)
    )
    t.step()
    t.step()
    assert len(masks) == 4 and not any(torch.equal(masks[0], m) for m in masks[1:])


def test_loss_scaling_skips_a_step_that_overflows():
    t = trainer(mixed_precision="fp16")
    t.scaler.update(2.0**40)  # overflows
    before = t.weights.detach().clone()
    t.step()
    assert torch.equal(before, t.weights) and t.means()["skipped"] == 1
    for _ in range(40):
        t.step()
    assert not torch.equal(before, t.weights) and t.means()["loss"] > 0
