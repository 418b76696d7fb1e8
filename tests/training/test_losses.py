"""Training with the losses of Nichol & Dhariwal 2021 and Hang et al. 2023, and timesteps drawn by their loss."""

from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, load_pretrained
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.diffusion.losses import Bound, min_snr_weights
from ddpm_fast.evaluation.likelihood import bits_per_dimension
from ddpm_fast.kernels import noise as N
from ddpm_fast.training.config import TrainConfig
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
    config = dict(
        sample_size=8,
        in_channels=1,
        out_channels=out,
        channels=(8, 16),
        layers=1,
        attention=(False, True),
    )
    return UNet(UNetConfig(**config, norm_groups=4))


def trainer(schedule=SHORT, data=DATA, **options):
    options = {
        "train_batch_size": 8,
        "max_train_steps": 100,
        "lr_warmup_steps": 3,
        "learning_rate": 1e-3,
        **options,
    }
    return Trainer(unet_for(**options), schedule, data, TrainConfig(**options), "cpu")


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o.values()))
def test_gradient_is_that_of_the_formula_in_fp64(options):
    t = trainer(max_grad_norm=1e9, **options)
    t.step()
    got = t.weights.grad
    t = trainer(**options)
    inputs, unet = t._noised(t.loader.batch(0)), unet_for(**options).double()
    out = unet(inputs.x_t.double(), inputs.t)
    eps = N.noise_reference(inputs.seed, inputs.image, inputs.row, N.Q_SAMPLE, (1, 8, 8)).double()
    a, s = (
        torch.from_numpy(np.sqrt(v))[inputs.t][:, None, None, None]
        for v in (SHORT.alpha_bar, SHORT.noise_var)
    )
    prediction = options.get("prediction_type", "eps")
    truth = {"eps": eps, "x_0": inputs.x_0, "v": a * eps - s * inputs.x_0}[prediction]
    loss = (out[:, :1] - truth).square().mean((1, 2, 3))
    bound = Bound(SHORT, prediction, "learned_range", clip=None)
    if options["loss_type"] == "min_snr":
        loss = loss * torch.from_numpy(min_snr_weights(SHORT, prediction, 5.0))[inputs.t]
    if options["loss_type"] == "vlb":
        loss = 12 * bound.terms(out, inputs.x_0, inputs.x_t, inputs.t)
    if options["loss_type"] == "hybrid":
        kept = torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)
        loss = loss + 12 / 1000 * bound.terms(kept, inputs.x_0, inputs.x_t, inputs.t)
    exact = torch.autograd.grad(loss.mean(), list(unet.parameters()))
    exact = torch.cat(
        [g.permute(0, 2, 3, 1).flatten() if g.ndim == 4 else g.flatten() for g in exact]
    )
    assert relative_error(got, exact) < 2e-5


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o.values()))
def test_state_goes_on_to_the_bit(options):
    """Over the moment when loss-aware drawing begins: 12 timesteps times ten losses."""
    straight, held = trainer(**options), None
    half = 25 if "timestep_sampling" in options else 5
    for step in range(2 * half):
        if step == half:
            held = {k: v.clone() for k, v in straight.state().items()}
        straight.step()
    resumed = trainer(**options)
    resumed.load_state(held, half)
    for _ in range(half):
        resumed.step()
    want, got = straight.state(), resumed.state()
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    if straight.timesteps is not None:
        assert "loss_squares" in want and (straight.timesteps.count >= 10).all()
        assert straight.timesteps.shares().unique().numel() > 1


def test_threads_draw_and_learn_the_same():
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


def test_vlb_brings_the_bits_down():
    data = ImageData(
        np.full((64, 8, 8, 1), 90, np.uint8)
        + (np.arange(64) % 2 * 60).astype(np.uint8)[:, None, None, None]
    )

    def bits(t):
        return bits_per_dimension(
            Sampler(t.ema, SHORT, (1, 8, 8), variance="learned_range", clip=None), data
        ).mean

    t = trainer(
        data=data, loss_type="vlb", learning_rate=1e-3, max_train_steps=150, train_batch_size=16
    )
    before = bits(t)
    for _ in range(150):
        t.step()
    assert bits(t) < 0.8 * before


def test_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"must take 1 and give 2 \(mean and variance\); it takes 1 and gives 1"
    ):
        Trainer(unet_for(), SHORT, DATA, TrainConfig(8, loss_type="vlb"), "cpu")
    with pytest.raises(ValueError, match="let the network predict x_0 or v"):
        trainer(SHORT.zero_terminal_snr())
    trainer(SHORT.zero_terminal_snr(), prediction_type="v").step()
    for options in (dict(loss_type="l2"), dict(timestep_sampling="best"), dict(snr_gamma=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            TrainConfig(**options)


def test_command_line_to_a_model_that_knows_its_variance(tmp_path, capsys):
    pytest.importorskip("click")
    pytest.importorskip("safetensors")
    cli = import_module("ddpm_fast.cli.main")
    np.savez(tmp_path / "images.npz", images=DATA.images)
    tiny = [
        "--resolution",
        8,
        "--channels",
        "8,16",
        "--layers",
        1,
        "--head-dim",
        8,
        "--train-batch-size",
        4,
        "--learning-rate",
        1e-4,
    ]
    kind = ["--loss-type", "hybrid", "--timestep-sampling", "loss-aware", "--ddpm-num-steps", 8]

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        assert end.value.code == 0, capsys.readouterr().err

    train = [
        "train",
        "--train-data-dir",
        tmp_path / "images.npz",
        "--output-dir",
        tmp_path / "run",
        *tiny,
        *kind,
    ]
    call(*train, "--max-train-steps", 40)
    call(*train, "--max-train-steps", 44, "--resume-from-checkpoint", "latest")
    checkpoint = load_pretrained(tmp_path / "run" / "model")
    assert checkpoint.variance == "learned_range" and checkpoint.unet.config.out_channels == 2
    call(
        "sample",
        "--weights",
        tmp_path / "run" / "model",
        "--images",
        2,
        "--out",
        tmp_path / "a.npy",
    )
    v = [
        *train[:4],
        tmp_path / "v",
        *tiny,
        "--rescale-betas-zero-snr",
        "--prediction-type",
        "v",
        "--loss-type",
        "min-snr",
    ]
    call(*v, "--max-train-steps", 2)
    assert load_pretrained(tmp_path / "v" / "model").schedule.alpha_bar[-1] == 0
    call(
        "sample",
        "--weights",
        tmp_path / "v" / "model",
        "--images",
        2,
        "--steps",
        5,
        "--out",
        tmp_path / "b.npy",
    )
