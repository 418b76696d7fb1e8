"""The command line of scores: ddpm-fast eval."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from ..data.datasets import FITS, ImageData, has_test_split, load_images
from ..diffusion.presets import PRESETS, preset_of
from ..evaluation.classifier import Classifier, load_classifier
from ..evaluation.likelihood import bits_per_dimension
from ..evaluation.metrics import CONFIDENT, FEATURES, FID_FROM, ClassScores, Features, class_scores, fid, kid
from ..sampling.callbacks import bar_of
from ..sampling.sampler import Sampler
from .common import DTYPES, PATH, parse_steps, pick_device, report_of, solver_options


@click.command("eval")
@click.option("--weights", type=PATH, help="Checkpoint to draw from: a diffusers folder.")
@click.option("--samples", type=PATH, help="Score these images instead: a folder, .npz or .npy.")
@click.option("--data-dir", type=PATH, required=True, help="Real images: a folder, .npz, .npy or IDX files.")
@click.option("--resolution", type=int, default=32, show_default=True, help="Of --samples, in pixels; --weights know theirs.")
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True, help="As in training.")
@click.option("--images", type=click.IntRange(4), default=2000, show_default=True, help="How many are drawn.")
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@solver_options("ddim")
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--bits-per-dim", is_flag=True, help="The bound on the likelihood of real images instead.")
@click.option("--terms", type=PATH, help="With --bits-per-dim: FILE.npz of all its terms; a run that was stopped goes on from it.")
@click.option("--classifier", type=PATH, help="Also ask this one, such as weights/fashion-mnist-classifier.safetensors.")
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Of the network.")
@click.option("--progress/--quiet", default=None, help="A progress bar.  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def evaluate(as_json: bool, **options: Any) -> None:
    """Score drawn images against real ones: KID (FID from 10,000 images up), and what a classifier finds.

    The same distance between two sets of real images, train and test, is printed beside it: what perfect images would get.

    With --bits-per-dim: what the network thinks of the first --images real images, of the test split where there is one.
    """
    if options["bits_per_dim"]:
        report_of(*_bits(options, as_json))
        return
    if (options["weights"] is None) == (options["samples"] is None):
        raise ValueError("give --weights to draw from, or --samples to score")
    device = pick_device(options["device"])
    features = Features(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classifier = load_classifier(options["classifier"]) if options["classifier"] else None
    # everything that can be wrong is read before the long work begins
    if options["weights"] is not None:
        sampler = Sampler.from_pretrained(options["weights"], device, DTYPES[options["dtype"]], variance=options["variance"])
        sampler.table(**_how(options))
        count, (channels, side, _) = options["images"], sampler.shape
    else:
        given = load_images(options["samples"], options["resolution"], options["fit"])
        count, side, _, channels = given.images.shape
        if count < 4:
            raise ValueError(f"{options['samples']} holds {count} images; expected at least 4")
    if classifier is not None:
        classifier.check((side, side, channels))
    test, train = _real(options, count, side, channels)
    began = time.perf_counter()
    drawn, labels, source = _draw(sampler, options) if options["weights"] else _of(given, str(options["samples"]))
    seconds = time.perf_counter() - began
    report: dict[str, Any] = dict(
        source=source,
        images=len(drawn),
        real_images=len(test),
        features=FEATURES,
        rounding="as given" if options["samples"] else f"uint8, {PRESETS[options['preset']].rounding}",
        seconds_of_drawing=round(seconds, 1),
    )
    lines = [
        f"{len(drawn)} images ({source}) against {len(test)} real ones; {report['rounding']}",
        f"features: {FEATURES}",
        *_add_distances(report, features, drawn, test, train),
    ]
    if classifier is not None:
        lines += _add_classes(report, classifier, drawn, labels, test)
    report_of(report, as_json, "\n".join(lines))


def _bits(options: dict[str, Any], as_json: bool) -> tuple[dict[str, Any], bool, str]:
    """The bound in bits per dimension: what `report_of` takes."""
    if options["weights"] is None or options["samples"] is not None:
        raise ValueError("bits per dimension are those of a network: give --weights, and no --samples")
    sampler = Sampler.from_pretrained(
        options["weights"], pick_device(options["device"]), DTYPES[options["dtype"]], variance=options["variance"]
    )
    channels, side, _ = sampler.shape
    split = "test" if has_test_split(options["data_dir"]) else "train"
    data = load_images(options["data_dir"], side, options["fit"], channels if channels in (1, 3) else None, split)
    data = _some(data, slice(options["images"]))
    steps, preset = parse_steps(options["steps"]), options["preset"]
    visited = preset_of(preset).timesteps(len(sampler.schedule), "ddpm", steps, options["spacing"])
    began = time.perf_counter()
    show = sys.stderr.isatty() if options["progress"] is None else options["progress"]
    with bar_of(show, len(data) * len(visited)) as bar:
        how = dict(seed=options["seed"], batch_size=options["batch_size"], preset=preset, kept=options["terms"])
        bits = bits_per_dimension(sampler, data, visited.tolist(), advance=bar.update, **how)
    seconds = time.perf_counter() - began
    means = dict(l_0=float(bits.terms[:, 0].mean()), l_t=float(bits.terms[:, 1:].sum(1).mean()), l_T=float(bits.prior.mean()))
    report = dict(
        weights=str(options["weights"]),
        images=len(data),
        split=split,
        steps=len(visited),
        variance=sampler.variance,
        preset=preset,
        given_labels=sampler.num_classes is not None,
        bits_per_dim=bits.mean,
        standard_error=bits.standard_error if len(data) > 1 else None,
        **means,
        seconds=round(seconds, 1),
    )
    lines = [
        f"{options['weights']}: {len(data)} images ({split}), {len(visited)} steps, {sampler.variance}, preset {preset}, "
        f"seed {options['seed']}, {options['dtype']}, {seconds:.0f} s",
        f"bits per dimension  {bits.mean:.4f} +- {bits.standard_error:.4f}  at most"
        + (", given the labels" if sampler.num_classes is not None else ""),
        f"  L_0               {means['l_0']:.4f}  the last step, on 256 levels",
        f"  L_1 ... L_T-1     {means['l_t']:.4f}  the steps before",
        f"  L_T               {means['l_T']:.6f}  the start",
    ]
    return report, as_json, "\n".join(lines)


def _add_distances(report: dict[str, Any], features: Features, drawn: Tensor, test: ImageData, train: ImageData) -> list[str]:
    """KID and FID and their floors into the report, and as lines for a person."""
    real, other, ours = (features(x) for x in (torch.from_numpy(test.images), torch.from_numpy(train.images), drawn))
    report.update(kid=kid(real, ours), kid_floor=kid(real, other))
    lines = [
        f"KID        {_with_deviation(report['kid'])}",
        f"KID floor  {_with_deviation(report['kid_floor'])}  real images against real ones, {len(train)} and {len(test)}",
    ]
    if min(len(drawn), len(test)) >= FID_FROM:
        report.update(fid=fid(real, ours), fid_floor=fid(real, other))
        lines.append(f"FID        {report['fid']:.3f}, floor {report['fid_floor']:.3f}")
    return lines


def _add_classes(
    report: dict[str, Any], classifier: Classifier, drawn: Tensor, labels: Tensor | None, test: ImageData
) -> list[str]:
    """What the classifier finds, in drawn and in real images."""
    wanted = None if test.labels is None else torch.from_numpy(test.labels)
    of_drawn, of_real = class_scores(classifier, drawn, labels), class_scores(classifier, torch.from_numpy(test.images), wanted)
    report.update(classes_drawn=vars(of_drawn), classes_real=vars(of_real))
    return _class_lines(of_drawn, of_real)


def _draw(sampler: Sampler, options: dict[str, Any]) -> tuple[Tensor, Tensor | None, str]:
    """(images uint8 [N, H, W, C], labels or None, what they are)"""
    how = _how(options)
    show = sys.stderr.isatty() if options["progress"] is None else options["progress"]
    images = sampler.sample(options["images"], options["seed"], batch_size=options["batch_size"], progress=show, **how)
    labels = sampler.labels(options["images"], options["seed"]).cpu() if sampler.num_classes else None
    kind = f"{how['solver']} {sampler.variance}" if how["solver"] == "ddpm" else how["solver"]
    steps, preset = len(sampler.table(**how)), "" if how["preset"] == "exact" else f" as {how['preset']}"
    source = f"{options['weights']}, seed {options['seed']}, {kind} {steps} steps{preset}, {options['dtype']}"
    return images, labels, source


def _how(options: dict[str, Any]) -> dict[str, Any]:
    """What `Sampler.sample` and `Sampler.table` take of the options."""
    how = {name: options[name] for name in ("solver", "spacing", "eta", "preset")}
    return dict(how, steps=parse_steps(options["steps"]))


def _of(data: ImageData, name: str) -> tuple[Tensor, Tensor | None, str]:
    return torch.from_numpy(np.array(data.images)), None if data.labels is None else torch.from_numpy(data.labels), name


def _real(options: dict[str, Any], count: int, resolution: int, channels: int) -> tuple[ImageData, ImageData]:
    """Two sets of real images, `count` each or what there is: of the test and the training split, or two parts of one set."""
    source = options["data_dir"]
    train = load_images(source, resolution, options["fit"], channels)
    order = np.random.default_rng(0).permutation(len(train))
    if has_test_split(source):
        test = load_images(source, resolution, options["fit"], channels, split="test")
        return _some(test, np.random.default_rng(1).permutation(len(test))[:count]), _some(train, order[:count])
    count = min(count, len(train) // 2)
    if count < 4:
        raise ValueError(f"{source} holds {len(train)} images; expected at least 8")
    return _some(train, order[:count]), _some(train, order[count : 2 * count])


def _some(data: ImageData, chosen: Any) -> ImageData:
    return ImageData(data.images[chosen], None if data.labels is None else data.labels[chosen], data.classes)


def _with_deviation(value: tuple[float, float]) -> str:
    return f"{value[0]:.4f} +- {value[1]:.4f}"


def _class_lines(drawn: ClassScores, real: ClassScores) -> list[str]:
    def row(name: str, ours: float, theirs: float) -> str:
        return f"{name:28} {ours:7.3f}  {theirs:7.3f}  {ours / theirs if theirs else float('nan'):7.3f}"

    lines = [
        f"{'classifier':28} {'drawn':>7}  {'real':>7}  {'ratio':>7}",
        row(f"confidence above {CONFIDENT}", drawn.confident, real.confident),
    ]
    if drawn.right is not None and real.right is not None:
        lines.append(row("label found", drawn.right, real.right))
    return lines + [row(f"share of class {i}", *pair) for i, pair in enumerate(zip(drawn.shares, real.shares, strict=True))]
