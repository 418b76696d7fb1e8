"""Scores compared with their definitions and with known results."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, save_pretrained
from ddpm_fast.data.datasets import load_images
from ddpm_fast.evaluation.classifier import Classifier, load_classifier, save_classifier
from ddpm_fast.evaluation.metrics import Features, class_scores, fid, kid

linalg = pytest.importorskip("scipy.linalg")
pytest.importorskip("torchmetrics")
pytest.importorskip("efficientnet_lite_pytorch")
cli = import_module("ddpm_fast.cli.main")
WEIGHTS = Path(__file__).parents[2] / "weights"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def features(count, shift=0.0, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (count, 64)))


def exact_kid(x, y):
    """Unbiased estimate over all pairs, kernel (x y / D + 1)^3 (Binkowski et al. 2018, sec. 4)."""
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = ((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return sum(within) - 2 * xy.mean()


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_kid(shift):
    real, drawn = features(800), features(800, shift, seed=1)
    mean, deviation = kid(real, drawn, subsets=200, subset_size=200)
    exact = exact_kid(real.numpy(), drawn.numpy())
    assert mean == pytest.approx(exact, abs=4 * deviation / 200**0.5)
    assert (abs(mean) < 2 * deviation) == (shift == 0)
    assert kid(real, drawn, 200, 200) == (mean, deviation)  # subsets are deterministic


def test_fid():
    real, drawn = features(500), features(400, 0.3, seed=1)
    x, y = real.numpy(), drawn.numpy()
    covariances = np.cov(x.T), np.cov(y.T)
    product = linalg.sqrtm(covariances[0] @ covariances[1]).real
    distance = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sum(covariances) - 2 * product)
    assert fid(real, drawn) == pytest.approx(distance, rel=1e-6)


def test_features_are_those_of_the_networks_pooling_layer():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 32, 32, 1), dtype=torch.uint8)
    extract = Features()
    result, colour = extract(images, batch_size=2), images.expand(-1, -1, -1, 3)
    assert result.shape == (3, 1280) and result.dtype == torch.float64
    assert torch.equal(result, extract(colour, batch_size=2))
    pooled = []
    pooling = extract.network._avg_pooling
    pooling.register_forward_hook(lambda m, i, out: pooled.append(out.flatten(1)))
    x = colour.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        extract.network((x - 127) / 128)
    assert torch.allclose(pooled[0].double(), result, rtol=1e-4, atol=1e-5)


def test_class_scores():
    class Constant(Classifier):
        def probabilities(self, images, batch_size=256):
            return torch.tensor([[0.9, 0.1, 0], [0.5, 0.5, 0], [0, 0.2, 0.8], [0.05, 0.9, 0.05]])

    classifier, images = Constant(3), torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    scores = class_scores(classifier, images, torch.tensor([0, 1, 2, 1]))
    assert scores.shares == [0.5, 0.25, 0.25]
    assert scores.confident == 0.5 and scores.accuracy == 0.75
    assert class_scores(classifier, images, None).accuracy is None


def test_classifier_round_trip(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(4, channels=3, size=16, width=8).eval()
    save_classifier(tmp_path / "c.safetensors", classifier)
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    results = load_classifier(tmp_path / "c.safetensors").probabilities(images, batch_size=2)
    assert torch.allclose(results, classifier.probabilities(images), atol=1e-6)
    assert torch.allclose(results.sum(1), torch.ones(5))
    with pytest.raises(ValueError, match="the classifier was trained on"):
        classifier.probabilities(images[:, :8])
    with pytest.raises(ValueError, match="does not exist"):
        load_classifier(tmp_path / "missing")
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not a classifier"):
        load_classifier(tmp_path / "other")


@pytest.mark.skipif(
    not FASHION.exists(), reason="the package dataset-fashion-mnist is not installed"
)
def test_accuracy_of_the_fashion_mnist_classifier_on_the_test_split(figure):
    test = load_images(FASHION, 32, "pad", split="test")
    classifier = load_classifier(WEIGHTS / "fashion-mnist-classifier.safetensors")
    images, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    accuracy = class_scores(classifier, images, labels).accuracy
    figure("Fashion-MNIST classifier, accuracy on the test split", f"{accuracy:.4f}")
    assert accuracy >= 0.9


# ---- the command


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An untrained network, and real images, 8 x 8."""
    home = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    config |= dict(attention=(False, True), norm_groups=4, num_classes=4)
    save_pretrained(home / "model", UNet(UNetConfig(**config)), NoiseSchedule.linear())
    generator = np.random.default_rng(0)
    images = np.clip(generator.normal(128, 20, (120, 8, 8, 1)), 0, 255).astype(np.uint8)
    np.savez(home / "real.npz", images=images, labels=np.arange(120) % 4)
    save_classifier(home / "classifier.safetensors", Classifier(4, size=8, width=4))
    return home


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(["eval", *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    return call


def test_eval_of_weights(run, small):
    arguments = ("--weights", small / "model", "--data-dir", small / "real.npz", "--images", 40)
    arguments += ("--steps", 4, "--classifier", small / "classifier.safetensors")
    code, out, _ = run(*arguments, "--json")
    report = json.loads(out)
    scores = report["classes_drawn"]
    assert code == 0 and report["images"] == report["real_images"] == 40 and "fid" not in report
    assert report["kid"][0] > report["kid_floor"][0] + 0.01
    assert sum(scores["shares"]) == pytest.approx(1) and 0 <= scores["accuracy"] <= 1
    code, out, _ = run(*arguments)
    assert code == 0
    assert all(text in out for text in ("EfficientNet-Lite0", "KID floor", "accuracy", "rounded"))


def test_kid_of_samples_with_the_distribution_of_the_data(run, small, tmp_path):
    images = np.clip(np.random.default_rng(1).normal(128, 20, (120, 8, 8, 1)), 0, 255)
    np.save(tmp_path / "samples.npy", images.astype(np.uint8))
    arguments = ("--samples", tmp_path / "samples.npy", "--data-dir", small / "real.npz")
    code, out, _ = run(*arguments, "--resolution", 8, "--json")
    report = json.loads(out)
    assert code == 0 and abs(report["kid"][0]) < 3 * report["kid"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere", "--weights", "W"], "nowhere does not exist"),
        (["--data-dir", "D"], "give --weights to draw from, or --samples"),
        (["--data-dir", "D", "--weights", "W", "--samples", "D"], "give --weights to draw from"),
        (["--data-dir", "D", "--weights", "nowhere"], "nowhere is not a directory"),
        (["--data-dir", "D", "--weights", "W", "--classifier", "no"], "no does not exist"),
        (["--data-dir", "D", "--weights", "W", "--device", "toaster"], "--device is 'toaster'"),
    ],
    ids=lambda v: " ".join(v[2:]) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, small, arguments, message):
    known = {"W": small / "model", "D": small / "real.npz"}
    code, out, err = run(*(known.get(a, a) for a in arguments), "--images", 4, "--steps", 1)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_samples_have_the_requested_class(figure):
    """50 images, five per class."""
    sampler = Sampler.from_pretrained(WEIGHTS / "fashion-mnist-32", "cpu")
    labels = torch.arange(10).repeat_interleave(5)
    images = sampler.sample(50, solver="ddim", steps=20, labels=labels)
    classifier = load_classifier(WEIGHTS / "fashion-mnist-classifier.safetensors")
    accuracy = class_scores(classifier, images, labels).accuracy
    figure("Fashion-MNIST weights, DDIM 20, 50 images: classifier accuracy", f"{accuracy:.2f}")
    assert sampler.num_classes == 10 and accuracy >= 0.75
