"""Bits per dimension: the bound of `vlb.Bound` over whole images (Ho et al. 2020, section 4.3; Nichol & Dhariwal 2021).

The terms of an image are independent of one another, so images and timesteps fill one batch together. The noise of image i at
timestep t is Philox's, counted by (seed, i, t): the same figures come out for every batch size, and after every restart.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import ImageData
from ..data.pixels import from_uint8
from ..diffusion.presets import preset_of
from ..diffusion.schedule import Array
from ..diffusion.timesteps import Steps
from ..diffusion.vlb import Bound
from ..engines.base import default_numerics
from ..engines.eager import inference
from ..kernels.q_sample import q_sample
from ..sampling.callbacks import progress_bar
from ..sampling.sampler import Sampler
from ..utils.files import write_atomically
from ..utils.validation import integer, seed_bits


@dataclass(frozen=True, eq=False)
class Bits:
    """Terms of the bound in bits per dimension, fp64: terms [N, T], L_{t-1} with L_0 in the first column; prior [N], L_T."""

    terms: Array
    prior: Array

    @property
    def per_image(self) -> Array:
        """The bound for every image: [N]."""
        return self.terms.sum(1) + self.prior

    @property
    def mean(self) -> float:
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over images; NaN for one image."""
        n = len(self.prior)
        return float(self.per_image.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


@torch.no_grad()
def bits_per_dimension(
    sampler: Sampler,
    data: ImageData,
    steps: Steps = None,
    seed: int = 0,
    batch_size: int = 64,
    preset: str = "exact",
    terms_file: str | Path | None = None,
    save_every: float = 30.0,
    callback: Callable[[int], Any] = lambda count: None,
    progress: bool = False,
) -> Bits:
    """Bits per dimension of every image, with the sampler's network, schedule, prediction, variance and clip.

    With a class-conditional network the likelihood is that of images given their labels.

    Args:
        sampler: for its network and settings.
        data: images, with labels if the network is class-conditional.
        steps: of a respaced chain, which is another model than the whole one; None: all.
        seed: of the noise.
        batch_size: (image, timestep) pairs per batch.
        preset: decides timesteps, rounding and decoder (`diffusion.presets.PRESETS`).
        terms_file: an .npz with the terms computed so far; the same call resumes from it.
        save_every: seconds between two writes of `terms_file`.
        callback: called with the number of new terms after every batch.
        progress: show a progress bar.

    Raises:
        ValueError: the images do not fit the network, or `terms_file` belongs to another evaluation.
    """
    if integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size = {batch_size}; expected at least 1")
    if terms_file is not None and not Path(terms_file).absolute().parent.is_dir():
        raise ValueError(f"{Path(terms_file).absolute().parent} does not exist; create it first")
    _check(sampler, data)
    rules = preset_of(preset)
    visited = rules.timesteps(len(sampler.schedule), "ddpm", steps)[::-1]
    chain = sampler.schedule.respaced(visited)
    bound = Bound(chain, sampler.prediction, sampler.variance, sampler.clip, rules, sampler.device)
    coef, label = (
        chain.q_sample_table(sampler.device),
        torch.from_numpy(visited.copy()).to(sampler.device),
    )
    count, total = len(data), len(chain)
    identity = _identity(sampler, data, visited, seed, preset)
    terms, done = np.full(count * total, np.nan), 0
    resumed = terms_file is not None and Path(terms_file).exists()
    if terms_file is not None and resumed:
        terms, done = _read(Path(terms_file), identity, count * total)
    saved = time.monotonic()
    with (
        progress_bar(progress, count * total, "term") as bar,
        default_numerics(sampler.device),
        inference(sampler.model),
    ):
        if resumed:
            callback(done)
            bar.update(done)
        while done < count * total:
            pair = torch.arange(done, min(done + batch_size, count * total), device="cpu")
            terms[done : done + len(pair)] = (
                _terms(sampler, bound, data, coef, label, pair, seed).cpu().numpy()
            )
            done += len(pair)
            callback(len(pair))
            bar.update(len(pair))
            if terms_file is not None and (
                time.monotonic() - saved > save_every or done == count * total
            ):
                _write(Path(terms_file), identity, terms, done)
                saved = time.monotonic()
    return Bits(terms.reshape(count, total), _prior(bound, data))


def _terms(
    sampler: Sampler,
    bound: Bound,
    data: ImageData,
    coef: Tensor,
    label: Tensor,
    pair: Tensor,
    seed: int,
) -> Tensor:
    """The terms of (image, step) pairs [B], image by image."""
    device = sampler.device
    image, row = pair // len(label), (pair % len(label)).to(device)
    x_0 = from_uint8(torch.from_numpy(data.images[image.numpy()]).to(device))
    labels = (
        ()
        if sampler.num_classes is None or data.labels is None
        else (torch.from_numpy(data.labels)[image].to(device),)
    )
    image, t = image.to(device), label[row]
    # noise is counted by the timestep that the network sees, so that a respaced chain meets the same
    x_t = q_sample(x_0, coef, row, t, torch.full_like(image, seed_bits(seed)), image)
    out = sampler.model(x_t.to(sampler.dtype), t, *labels)
    channels = x_0.shape[1] * (2 if bound.variance.startswith("learned") else 1)
    return bound.terms(out[:, :channels], x_0, x_t, row)


def _prior(bound: Bound, data: ImageData) -> Array:
    parts = [
        bound.prior(from_uint8(torch.from_numpy(data.images[i : i + 512])))
        for i in range(0, len(data), 512)
    ]
    return torch.cat(parts).cpu().numpy()


def _check(sampler: Sampler, data: ImageData) -> None:
    c, h, w = sampler.shape
    if data.images.shape[1:] != (h, w, c):
        raise ValueError(
            f"the images are {data.images.shape[1:]}; the network takes {(h, w, c)} (height, width, channels)"
        )
    if sampler.num_classes is not None:
        if data.labels is None:
            raise ValueError(
                "the data has no labels; expected labels, because the network is class-conditional"
            )
        if data.labels.max() >= sampler.num_classes:
            raise ValueError(
                f"labels up to {data.labels.max()}; the network has {sampler.num_classes} classes"
            )


def _identity(sampler: Sampler, data: ImageData, visited: Any, seed: int, preset: str) -> str:
    """Everything that the terms depend on, except rounding."""
    weights = hashlib.sha256()
    if isinstance(sampler.model, torch.nn.Module):
        for tensor in sampler.model.state_dict().values():
            weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    schedule = hashlib.sha256(
        sampler.schedule.beta.tobytes() + np.ascontiguousarray(visited).tobytes()
    ).hexdigest()
    settings = [
        sampler.prediction,
        sampler.variance,
        sampler.clip,
        str(sampler.dtype),
        preset,
        seed,
    ]
    return json.dumps(
        dict(weights=weights.hexdigest(), data=data.digest, schedule=schedule, how=settings)
    )


def _write(path: Path, identity: str, terms: Array, done: int) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, identity=np.array(identity), terms=terms, done=np.array(done))
    write_atomically(path, buffer.getvalue())


def _read(path: Path, identity: str, size: int) -> tuple[Array, int]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            recorded, terms, done = str(arrays["identity"]), arrays["terms"], int(arrays["done"])
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} holds no bits per dimension: {error}; choose another file"
        ) from None
    if recorded != identity or terms.shape != (size,):
        raise ValueError(
            f"{path} holds another evaluation (other weights, images, steps, seed or preset); choose another file"
        )
    return terms, done
