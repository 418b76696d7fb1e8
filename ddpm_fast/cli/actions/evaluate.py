"""Implementation of ddpm-fast eval."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from ...data.datasets import ImageData, has_test_split, load_images
from ...diffusion.presets import PRESETS, preset_of
from ...evaluation.classifier import Classifier, load_classifier
from ...evaluation.likelihood import bits_per_dimension
from ...evaluation.metrics import (
    CONFIDENT,
    FEATURES,
    FID_FROM,
    ClassScores,
    Features,
    class_scores,
    fid,
    kid,
)
from ...sampling.callbacks import progress_bar
from ...sampling.request import SamplingParams
from ...sampling.sampler import Sampler
from ..common import pick_device, print_report


def evaluate(as_json: bool, options: dict[str, Any]) -> None:
    """Scores images, or computes bits per dimension, and prints a report."""
    if options["bits_per_dim"]:
        bits, text = _bits(options)
        print_report(bits, as_json, text)
        return
    device = pick_device(options["device"])
    features = Features(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classifier = load_classifier(options["classifier"]) if options["classifier"] else None
    # validate all inputs before the long computation
    if options["weights"] is not None:
        sampler = Sampler.from_pretrained(
            options["weights"], device, options["dtype"], variance=options["variance"]
        )
        sampler.table(_params(options))
        count, (channels, side, _) = options["images"], sampler.shape
    else:
        samples = load_images(options["samples"], options["resolution"], options["fit"])
        count, side, _, channels = samples.images.shape
        if count < 4:
            raise ValueError(f"{options['samples']} has {count} images; expected at least 4")
    if classifier is not None:
        classifier.check((side, side, channels))
    test, train = _real(options, count, side, channels)
    start, log = time.perf_counter(), _log(options["show"])
    if options["weights"] is not None:
        drawn, labels, source = _draw(sampler, options)
        rounding = f"uint8, {PRESETS[options['preset']].rounding}"
    else:
        drawn = torch.from_numpy(np.array(samples.images))
        labels, source = _labels_of(samples), str(options["samples"])
        rounding = "as stored"
    seconds = time.perf_counter() - start
    log("computing features")
    report: dict[str, Any] = dict(
        source=source,
        images=len(drawn),
        real_images=len(test),
        features=FEATURES,
        rounding=rounding,
        seconds_of_drawing=round(seconds, 1),
    )
    lines = [
        f"{len(drawn)} images ({source}) compared with {len(test)} real images; {rounding}",
        f"features: {FEATURES}",
        *_add_distances(report, features, drawn, test, train),
    ]
    if classifier is not None:
        log("classifying")
        lines += _add_classes(report, classifier, drawn, labels, test)
    print_report(report, as_json, "\n".join(lines))


def _log(show: bool) -> Callable[[str], None]:
    return lambda line: click.echo(f"ddpm-fast: {line} ...", err=True) if show else None


def _bits(options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Bits per dimension as (report, text)."""
    weights, device = options["weights"], pick_device(options["device"])
    sampler = Sampler.from_pretrained(
        weights, device, options["dtype"], variance=options["variance"]
    )
    channels, side, _ = sampler.shape
    source, split = options["data_dir"], "test" if has_test_split(options["data_dir"]) else "train"
    data = load_images(
        source, side, options["fit"], channels if channels in (1, 3) else None, split
    )
    data = _select(data, slice(options["images"]))
    steps, preset = options["steps"], options["preset"]
    visited = preset_of(preset).timesteps(len(sampler.schedule), "ddpm", steps, options["spacing"])
    start = time.perf_counter()
    with progress_bar(options["show"], len(data) * len(visited)) as bar:
        bits = bits_per_dimension(
            sampler,
            data,
            visited.tolist(),
            seed=options["seed"],
            batch_size=options["batch_size"],
            preset=preset,
            terms_file=options["terms"],
            callback=bar.update,
        )
    seconds = time.perf_counter() - start
    means = dict(
        l_0=float(bits.terms[:, 0].mean()),
        l_t=float(bits.terms[:, 1:].sum(1).mean()),
        l_T=float(bits.prior.mean()),
    )
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
    error = f" +- {bits.standard_error:.4f}" if len(data) > 1 else ""
    condition = ", given the labels" if sampler.num_classes is not None else ""
    lines = [
        f"{weights}: {len(data)} images ({split}), {len(visited)} steps, {sampler.variance}, "
        f"preset {preset}, seed {options['seed']}, {options['dtype']}, {seconds:.0f} s",
        f"bits per dimension  {bits.mean:.4f}{error}  upper bound{condition}",
        f"  L_0               {means['l_0']:.4f}  last step, 256 levels",
        f"  L_1 ... L_T-1     {means['l_t']:.4f}  other steps",
        f"  L_T               {means['l_T']:.6f}  prior",
    ]
    return report, "\n".join(lines)


def _add_distances(
    report: dict[str, Any], features: Features, drawn: Tensor, test: ImageData, train: ImageData
) -> list[str]:
    """Adds KID, FID and their floors to the report; returns them as lines of text."""
    real, other_real, sampled = (
        features(x) for x in (torch.from_numpy(test.images), torch.from_numpy(train.images), drawn)
    )
    report.update(kid=kid(real, sampled), kid_floor=kid(real, other_real))
    mean, floor = ("{:.4f} +- {:.4f}".format(*report[key]) for key in ("kid", "kid_floor"))
    lines = [
        f"KID        {mean}",
        f"KID floor  {floor}  two sets of real images, {len(train)} and {len(test)}",
    ]
    if min(len(drawn), len(test)) >= FID_FROM:
        report.update(fid=fid(real, sampled), fid_floor=fid(real, other_real))
        lines.append(f"FID        {report['fid']:.3f}, floor {report['fid_floor']:.3f}")
    return lines


def _add_classes(
    report: dict[str, Any],
    classifier: Classifier,
    drawn: Tensor,
    labels: Tensor | None,
    test: ImageData,
) -> list[str]:
    """Adds class scores of drawn and of real images to the report; returns them as lines."""
    drawn_scores = class_scores(classifier, drawn, labels)
    real_scores = class_scores(classifier, torch.from_numpy(test.images), _labels_of(test))
    report.update(classes_drawn=vars(drawn_scores), classes_real=vars(real_scores))
    return _class_lines(drawn_scores, real_scores)


def _draw(sampler: Sampler, options: dict[str, Any]) -> tuple[Tensor, Tensor | None, str]:
    """Draws images: (images uint8 [N, H, W, C], labels or None, description)."""
    params, count, seed = _params(options), options["images"], options["seed"]
    images = sampler.sample(
        count, params, batch_size=options["batch_size"], progress=options["show"]
    )
    labels = sampler.labels(count, seed).cpu() if sampler.num_classes else None
    solver = f"ddpm {sampler.variance}" if params.solver == "ddpm" else params.solver
    preset = "" if params.preset == "exact" else f", preset {params.preset}"
    steps = f"{solver} {len(sampler.table(params))} steps{preset}"
    return images, labels, f"{options['weights']}, seed {seed}, {steps}, {options['dtype']}"


def _params(options: dict[str, Any]) -> SamplingParams:
    named = {name: options[name] for name in ("seed", "solver", "spacing", "eta", "preset")}
    return SamplingParams(steps=options["steps"], **named)


def _labels_of(data: ImageData) -> Tensor | None:
    return None if data.labels is None else torch.from_numpy(data.labels)


def _real(
    options: dict[str, Any], count: int, resolution: int, channels: int
) -> tuple[ImageData, ImageData]:
    """Two sets of up to `count` real images: of the test and training splits, or of one split."""
    source = options["data_dir"]
    train = load_images(source, resolution, options["fit"], channels)
    order = np.random.default_rng(0).permutation(len(train))
    if has_test_split(source):
        test = load_images(source, resolution, options["fit"], channels, split="test")
        test_order = np.random.default_rng(1).permutation(len(test))
        return _select(test, test_order[:count]), _select(train, order[:count])
    count = min(count, len(train) // 2)
    if count < 4:
        raise ValueError(f"{source} has {len(train)} images; expected at least 8")
    return _select(train, order[:count]), _select(train, order[count : 2 * count])


def _select(data: ImageData, rows: Any) -> ImageData:
    labels = None if data.labels is None else data.labels[rows]
    return ImageData(data.images[rows], labels, data.classes)


def _class_lines(drawn: ClassScores, real: ClassScores) -> list[str]:
    def row(name: str, sampled: float, expected: float) -> str:
        ratio = f"{sampled / expected:.3f}" if expected else "-"  # no real image is of this class
        return f"{name:28} {sampled:7.3f}  {expected:7.3f}  {ratio:>7}"

    lines = [
        f"{'classifier':28} {'drawn':>7}  {'real':>7}  {'ratio':>7}",
        row(f"confidence above {CONFIDENT}", drawn.confident, real.confident),
    ]
    if drawn.accuracy is not None and real.accuracy is not None:
        lines.append(row("accuracy", drawn.accuracy, real.accuracy))
    return lines + [
        row(f"share of class {i}", *pair)
        for i, pair in enumerate(zip(drawn.shares, real.shares, strict=True))
    ]
