"""Losses of Nichol & Dhariwal 2021 and Hang et al. 2023 in training; loss-aware timesteps."""

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, load_pretrained
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.diffusion.losses import Bound, min_snr_weights
from ddpm_fast.evaluation.likelihood import bits_per_dimension
from ddpm_fast.kernels import noise as N
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.flat_weights import as_vector
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.numerics import relative_error

GENERATOR = np.random.default_rng(0)
DATA = ImageData(GENERATOR.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
SHORT = NoiseSchedule.linear(1e-3, 0.3, 12)
KINDS = [
    dict(loss_type="simple", timestep_sampling="loss_aware"),
    dict(loss_type="min_snr", prediction_type="v"),
    dict(loss_type="hybrid", timestep_sampling="loss_aware"),
    dict(loss_type="vlb", prediction_type="x_0"),
]


def unet_for(loss_type="simple", **_):
    torch.manual_seed(0)
    out = 2 if loss_type in ("hybrid", "vlb") else 1
    network = dict(sample_size=8, in_channels=1, out_channels=out, norm_groups=4, layers=1)
    return UNet(UNetConfig(**network, channels=(8, 16), attention=(False, True)))


def trainer(schedule=SHORT, data=DATA, **options):
    steps = dict(train_batch_size=8, max_train_steps=100, lr_warmup_steps=3, learning_rate=1e-3)
    config = TrainConfig(**steps | options)
    return Trainer(unet_for(**options), schedule, data, config, "cpu")


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o.values()))
def test_gradient_is_that_of_the_formula_in_fp64(options):
    t = trainer(max_grad_norm=1e9, **options)
    t.step()
    result = t.weights.grad
    t = trainer(**options)
    inputs, unet = t._noised(t.loader.batch(0)), unet_for(**options).double()
    out = unet(inputs.x_t.double(), inputs.t)
    eps = N.noise_reference(inputs.seed, inputs.image, inputs.row, N.Q_SAMPLE, (1, 8, 8)).double()
    a, s = (
        torch.from_numpy(np.sqrt(v))[inputs.t][:, None, None, None]
        for v in (SHORT.alpha_bar, SHORT.noise_var)
    )
    prediction = options.get("prediction_type", "eps")
    target = {"eps": eps, "x_0": inputs.x_0, "v": a * eps - s * inputs.x_0}[prediction]
    loss = (out[:, :1] - target).square().mean((1, 2, 3))
    bound = Bound(SHORT, prediction, "learned_range", clip=None)
    if options["loss_type"] == "min_snr":
        loss = loss * torch.from_numpy(min_snr_weights(SHORT, prediction, 5.0))[inputs.t]
    if options["loss_type"] == "vlb":
        loss = 12 * bound.terms(out, inputs.x_0, inputs.x_t, inputs.t)
    if options["loss_type"] == "hybrid":
        variance_only = torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)
        loss = loss + 12 / 1000 * bound.terms(variance_only, inputs.x_0, inputs.x_t, inputs.t)
    exact = torch.autograd.grad(loss.mean(), list(unet.parameters()))
    assert relative_error(result, torch.cat([as_vector(g) for g in exact])) < 2e-5


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o.values()))
def test_a_resumed_state_is_bit_exact(options):
    """Across the start of loss-aware sampling, after ten losses of each of the 12 timesteps."""
    straight, saved = trainer(**options), None
    half = 25 if "timestep_sampling" in options else 5
    for step in range(2 * half):
        if step == half:
            saved = {k: v.clone() for k, v in straight.state().items()}
        straight.step()
    resumed = trainer(**options)
    resumed.load_state(saved, half)
    for _ in range(half):
        resumed.step()
    expected, result = straight.state(), resumed.state()
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[k], result[k]) for k in expected)
    if straight.timesteps is not None:
        assert "loss_squares" in expected and (straight.timesteps.count >= 10).all()
        assert straight.timesteps.shares().unique().numel() > 1


def test_draws_do_not_depend_on_threads():
    def run(threads):
        torch.set_num_threads(threads)
        t = trainer(train_batch_size=16, loss_type="hybrid", timestep_sampling="loss_aware")
        for _ in range(20):
            t.step()
        return t

    threads = torch.get_num_threads()
    try:
        one, two = run(1), run(2)
    finally:
        torch.set_num_threads(threads)
    assert (one._parts, two._parts) == (1, 2)
    assert torch.equal(one.timesteps.count, two.timesteps.count)
    assert relative_error(two.weights.detach(), one.weights.detach()) < 1e-3


def test_vlb_reduces_the_bits_per_dimension():
    values = (90 + np.arange(64) % 2 * 60).astype(np.uint8)
    data = ImageData(np.tile(values[:, None, None, None], (1, 8, 8, 1)))

    def bits(t):
        sampler = Sampler(t.ema, SHORT, (1, 8, 8), variance="learned_range", clip=None)
        return bits_per_dimension(sampler, data).mean

    t = trainer(data=data, loss_type="vlb", max_train_steps=150, train_batch_size=16)
    before = bits(t)
    for _ in range(150):
        t.step()
    assert bits(t) < 0.8 * before


def test_networks_and_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected 1 and 2 \(mean and variance\) for images of 1"):
        Trainer(unet_for(), SHORT, DATA, TrainConfig(8, loss_type="vlb"), "cpu")
    with pytest.raises(ValueError, match="let the network predict x_0 or v"):
        trainer(SHORT.zero_terminal_snr())
    trainer(SHORT.zero_terminal_snr(), prediction_type="v").step()
    for options in (dict(loss_type="l2"), dict(timestep_sampling="best"), dict(snr_gamma=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            TrainConfig(**options)


def test_a_learned_variance_from_the_command_line_to_samples(command, tmp_path):
    pytest.importorskip("click")
    pytest.importorskip("safetensors")
    np.savez(tmp_path / "images.npz", images=DATA.images)

    def run(*arguments):
        code, _, err = command(*arguments)
        assert code == 0, err

    network = "--resolution 8 --channels 8,16 --layers 1 --head-dim 8 --train-batch-size 4"
    train = ("train --train-data-dir", tmp_path / "images.npz", network, "--output-dir")
    hybrid = "--loss-type hybrid --timestep-sampling loss-aware --ddpm-num-steps 8"
    run(*train, tmp_path / "run", hybrid, "--max-train-steps 40")
    more = "--max-train-steps 44 --resume-from-checkpoint latest"
    run(*train, tmp_path / "run", hybrid, more)
    model = tmp_path / "run" / "model"
    checkpoint = load_pretrained(model)
    assert checkpoint.variance == "learned_range" and checkpoint.unet.config.out_channels == 2
    run("sample --images 2 --weights", model, "--out", tmp_path / "a.npy")
    v = "--rescale-betas-zero-snr --prediction-type v --loss-type min-snr --max-train-steps 2"
    run(*train, tmp_path / "v", v)
    model = tmp_path / "v" / "model"
    assert load_pretrained(model).schedule.alpha_bar[-1] == 0
    run("sample --images 2 --steps 5 --weights", model, "--out", tmp_path / "b.npy")
