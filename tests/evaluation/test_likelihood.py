import json
from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, save_pretrained
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.diffusion.vlb import discretised_gaussian_log_likelihood
from ddpm_fast.evaluation.likelihood import bits_per_dimension
from ddpm_fast.kernels import noise as N

CHAIN = NoiseSchedule.linear(1e-3, 0.2, 20)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 2), dtype=np.uint8)
DATA = ImageData(PIXELS, np.array([0, 2, 1]))


def small_unet(num_classes=3, learned=False):
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=2, out_channels=4 if learned else 2, channels=(8, 16))
    config |= dict(layers=1, attention=(False, True), norm_groups=4, num_classes=num_classes)
    return UNet(UNetConfig(**config)).eval()


def sampler(variance="fixed_large", prediction="eps", **options):
    unet = small_unet(learned=variance.startswith("learned"), **options)
    return Sampler(unet, CHAIN, (2, 8, 8), prediction, variance)


def one_at_a_time(variance, prediction, clip=1.0):
    """The bound in fp64 from the formulas of the papers, one image and one timestep at a time."""
    unet = small_unet(learned=variance.startswith("learned")).double()
    beta = np.linspace(1e-3, 0.2, 20)
    bar = np.cumprod(1 - beta)
    total = np.zeros(3)
    for i in range(3):
        x_0 = torch.from_numpy(PIXELS[i : i + 1]).permute(0, 3, 1, 2).double() / 127.5 - 1
        mean, var = np.sqrt(bar[-1]) * x_0, 1 - bar[-1]
        total[i] += float(0.5 * (var + mean**2 - 1 - np.log(var)).mean()) / np.log(2)
        for t in range(20):
            index, time, seed = torch.tensor([[i], [t], [5]])
            eps = N.noise_reference(seed, index, time, N.Q_SAMPLE, (2, 8, 8)).double()
            x_t = np.sqrt(bar[t]) * x_0 + np.sqrt(1 - bar[t]) * eps
            with torch.no_grad():
                out = unet(x_t, time, torch.from_numpy(DATA.labels)[index])
            out, v = out[:, :2], out[:, 2:]
            if prediction == "eps":
                predicted = (x_t - np.sqrt(1 - bar[t]) * out) / np.sqrt(bar[t])
            else:
                predicted = np.sqrt(bar[t]) * x_t - np.sqrt(1 - bar[t]) * out
            predicted = predicted.clamp(-clip, clip)
            bar_before = bar[t - 1] if t else 1.0
            tilde = beta[t] * (1 - bar_before) / (1 - bar[t])
            if t == 0:
                tilde = beta[1] * (1 - bar[0]) / (1 - bar[1])
            of_x_0 = np.sqrt(bar_before) * beta[t] / (1 - bar[t])
            of_x_t = np.sqrt(1 - beta[t]) * (1 - bar_before) / (1 - bar[t])
            mu, mu_tilde = of_x_0 * predicted + of_x_t * x_t, of_x_0 * x_0 + of_x_t * x_t
            var = tilde if variance == "fixed_small" else beta[t]
            log_var = torch.full_like(mu, np.log(var))
            if variance == "learned_range":
                log_var = (v + 1) / 2 * np.log(beta[t]) + (1 - v) / 2 * np.log(tilde)
            if t == 0:
                term = -discretised_gaussian_log_likelihood(x_0, mu, log_var / 2)
            else:
                ratio = tilde / log_var.exp()
                term = 0.5 * (ratio - 1 - ratio.log() + (mu - mu_tilde) ** 2 / log_var.exp())
            total[i] += float(term.mean()) / np.log(2)
    return total


@pytest.mark.parametrize(
    ("variance", "prediction"),
    [
        ("fixed_small", "eps"),
        ("fixed_large", "eps"),
        ("learned_range", "eps"),
        ("fixed_large", "v"),
    ],
)
def test_agrees_with_the_slow_evaluation_in_fp64(variance, prediction, figure):
    slow = one_at_a_time(variance, prediction)
    fast = bits_per_dimension(sampler(variance, prediction), DATA, seed=5, batch_size=7)
    worst = np.abs(fast.per_image - slow).max()
    figure(
        f"bits per dimension, {variance}, {prediction}: batched, compared with one by one in fp64",
        f"{worst:.1e} of {slow.mean():.2f}",
    )
    assert worst < 1e-5
    assert fast.mean == pytest.approx(slow.mean(), abs=1e-5)
    assert fast.standard_error == pytest.approx(slow.std(ddof=1) / 3**0.5, rel=1e-4)
    assert fast.terms.shape == (3, 20)


def test_does_not_depend_on_the_batch():
    whole, single = (bits_per_dimension(sampler(), DATA, batch_size=size).terms for size in (60, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-4, atol=1e-6)


def test_bound_of_a_respaced_chain():
    respaced = bits_per_dimension(sampler(), DATA, steps=[19, 10, 4, 0])
    assert respaced.terms.shape == (3, 4)
    chain = CHAIN.respaced([0, 4, 10, 19])
    whole = bits_per_dimension(sampler(), DATA)
    # the last and the first timestep are the same
    np.testing.assert_allclose(respaced.prior, whole.prior, rtol=1e-9)
    np.testing.assert_allclose(respaced.terms[:, 0], whole.terms[:, 0], rtol=1e-4)
    assert chain.beta[1] > CHAIN.beta[4]


class Interrupted(Exception):
    pass


def test_a_resumed_evaluation_has_the_same_results(tmp_path):
    terms_file, calls = tmp_path / "terms.npz", []
    options = dict(batch_size=8, terms_file=terms_file)

    def stop(count):
        calls.append(count)
        if len(calls) == 4:
            raise Interrupted

    whole = bits_per_dimension(sampler(), DATA, batch_size=8)
    with pytest.raises(Interrupted):
        bits_per_dimension(sampler(), DATA, **options, save_every=0, callback=stop)
    with np.load(terms_file) as arrays:
        assert int(arrays["done"]) == 24  # three batches; the fourth was not yet written
    counts = []
    resumed = bits_per_dimension(sampler(), DATA, **options, callback=counts.append)
    assert np.array_equal(resumed.terms, whole.terms) and counts[0] == 24 and sum(counts) == 60
    counts.clear()
    bits_per_dimension(sampler(), DATA, terms_file=terms_file, callback=counts.append)
    assert counts == [60]  # the file is complete
    for change in (dict(seed=1), dict(preset="ho"), dict(steps=10)):
        with pytest.raises(ValueError, match="another evaluation"):
            bits_per_dimension(sampler(), DATA, terms_file=terms_file, **change)
    with pytest.raises(ValueError, match="another evaluation"):
        bits_per_dimension(sampler("fixed_small"), DATA, terms_file=terms_file)
    with pytest.raises(ValueError, match="does not exist; create it first"):
        bits_per_dimension(sampler(), DATA, terms_file=tmp_path / "no" / "terms.npz")
    terms_file.write_bytes(b"not an array")
    with pytest.raises(ValueError, match="has no terms of bits per dimension"):
        bits_per_dimension(sampler(), DATA, terms_file=terms_file)


def test_presets_differ_in_the_first_term_only():
    """The preset "openai" has another variance at t = 0 and another decoder."""
    exact, openai = (
        bits_per_dimension(sampler(), DATA, preset=name).terms for name in ("exact", "openai")
    )
    np.testing.assert_array_equal(exact[:, 1:], openai[:, 1:])
    assert (exact[:, 0] != openai[:, 0]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ImageData(PIXELS[:, :4], DATA.labels), r"are \(4, 8, 2\); expected \(8, 8, 2\)"),
        (ImageData(PIXELS), "the data has no labels"),
        (ImageData(PIXELS, np.array([0, 1, 3])), "label is 3; the network has 3 classes"),
    ],
)
def test_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dimension(sampler(), data)


def test_command_line(tmp_path, capsys):
    pytest.importorskip("click")
    pytest.importorskip("safetensors")
    cli = import_module("ddpm_fast.cli.main")
    save_pretrained(tmp_path / "model", small_unet(), CHAIN, variance="fixed_small")
    np.savez(tmp_path / "images.npz", images=np.repeat(PIXELS[..., :1], 3, axis=3))

    def call(*arguments):
        line = (
            f"eval --weights {tmp_path / 'model'} --bits-per-dim --data-dir {tmp_path}/images.npz"
        )
        with pytest.raises(SystemExit) as end:
            cli.main([*line.split(), *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    code, _, err = call("--images", 4)
    assert code == 2 and "expected (8, 8, 2)" in err and err.count("\n") == 1
    torch.manual_seed(1)
    config = dict(sample_size=8, in_channels=3, out_channels=3, channels=(8, 16), layers=1)
    unet = UNet(UNetConfig(**config, attention=(False, True), norm_groups=4))
    save_pretrained(tmp_path / "model", unet, CHAIN, variance="fixed_small")
    arguments = ("--images", 4, "--resolution", 8, "--terms", tmp_path / "terms.npz")
    code, out, _ = call(*arguments, "--json")
    report = json.loads(out)
    unet_sampler = Sampler.from_pretrained(tmp_path / "model", "cpu")
    expected = bits_per_dimension(unet_sampler, ImageData(np.repeat(PIXELS[..., :1], 3, axis=3)))
    bits = report["bits_per_dim"]
    assert code == 0 and report["images"] == 3 and bits == pytest.approx(expected.mean, rel=1e-6)
    assert report["l_0"] + report["l_t"] + report["l_T"] == pytest.approx(bits, rel=1e-9)
    code, out, _ = call(*arguments)
    assert code == 0 and f"{bits:.4f}" in out and "+-" in out
    code, _, err = call(*arguments, "--seed", 3)
    assert code == 2 and "another evaluation" in err
    code, _, err = call("--samples", tmp_path / "images.npz")
    assert code == 2 and "give --weights" in err
