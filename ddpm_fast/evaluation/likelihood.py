"""Bits per dimension: the variational bound `vlb.Bound` of images.

Source: Ho et al. 2020, section 4.3; Nichol & Dhariwal 2021. The terms of the bound are independent,
so a batch consists of (image, timestep) pairs. The noise of a pair is a function of (seed, image
index, timestep): results do not depend on the batch size, and a resumed run repeats them.
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
    """Terms of the bound in bits per dimension.

    Attributes:
        terms: L_{t-1} of every image and step, fp64 [N, T]; the first column is L_0.
        prior: L_T of every image, fp64 [N].
    """

    terms: Array
    prior: Array

    @property
    def per_image(self) -> Array:
        """Bound of every image, fp64 [N]."""
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
    """Computes bits per dimension, an upper bound on the negative log-likelihood of images.

    With a class-conditional network, the likelihood of images given their labels.

    Args:
        sampler: Determines network, schedule, prediction, variance and clip.
        data: Images, with labels if the network is class-conditional.
        steps: Steps of a respaced chain, which is another model than the full chain; None: all.
        seed: Seed of the noise, 0 ... 2^64-1.
        batch_size: (image, timestep) pairs per batch.
        preset: Determines timesteps, rounding and decoder (`diffusion.presets.PRESETS`).
        terms_file: An .npz file of the terms computed so far; the same call resumes from it.
        save_every: Seconds between two writes of `terms_file`.
        callback: Called with the number of new terms after every batch.
        progress: Show a progress bar.

    Raises:
        ValueError: The images do not fit the network, or `terms_file` is of another evaluation.
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
    coef = chain.q_sample_table(sampler.device)
    times = torch.from_numpy(visited.copy()).to(sampler.device)
    total = len(data) * len(chain)
    identity = _identity(sampler, data, visited, seed, preset)
    terms, done = np.full(total, np.nan), 0
    resumed = terms_file is not None and Path(terms_file).exists()
    if terms_file is not None and resumed:
        terms, done = _read(Path(terms_file), identity, total)
    saved = time.monotonic()
    with (
        progress_bar(progress, total, "term") as bar,
        default_numerics(sampler.device),
        inference(sampler.model),
    ):
        if resumed:
            callback(done)
            bar.update(done)
        while done < total:
            pairs = torch.arange(done, min(done + batch_size, total), device="cpu")
            results = _terms(sampler, bound, data, coef, times, pairs, seed)
            terms[done : done + len(pairs)] = results.cpu().numpy()
            done += len(pairs)
            callback(len(pairs))
            bar.update(len(pairs))
            due = time.monotonic() - saved > save_every or done == total
            if terms_file is not None and due:
                _write(Path(terms_file), identity, terms, done)
                saved = time.monotonic()
    return Bits(terms.reshape(len(data), len(chain)), _prior(bound, data))


def _terms(
    sampler: Sampler,
    bound: Bound,
    data: ImageData,
    coef: Tensor,
    times: Tensor,
    pairs: Tensor,
    seed: int,
) -> Tensor:
    """Terms of (image, step) pairs [B], which are numbered image by image."""
    device = sampler.device
    image, row = pairs // len(times), (pairs % len(times)).to(device)
    x_0 = from_uint8(torch.from_numpy(data.images[image.numpy()]).to(device))
    labels: tuple[Tensor, ...] = ()
    if sampler.num_classes is not None and data.labels is not None:
        labels = (torch.from_numpy(data.labels)[image].to(device),)
    image, t = image.to(device), times[row]
    # noise is a function of the network's timestep, so that a respaced chain has the same noise
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
            f"the images are {data.images.shape[1:]}; expected {(h, w, c)} (height, width, "
            "channels), as the network takes"
        )
    if sampler.num_classes is not None:
        if data.labels is None:
            raise ValueError(
                "the data has no labels; expected labels, because the network is class-conditional"
            )
        if data.labels.max() >= sampler.num_classes:
            raise ValueError(
                f"the largest label is {data.labels.max()}; the network has {sampler.num_classes} "
                "classes"
            )


def _identity(sampler: Sampler, data: ImageData, visited: Any, seed: int, preset: str) -> str:
    """Fingerprint of all inputs that determine the terms."""
    weights = hashlib.sha256()
    if isinstance(sampler.model, torch.nn.Module):
        for tensor in sampler.model.state_dict().values():
            weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    schedule = hashlib.sha256(
        sampler.schedule.beta.tobytes() + np.ascontiguousarray(visited).tobytes()
    ).hexdigest()
    process = [sampler.prediction, sampler.variance, sampler.clip, str(sampler.dtype)]
    settings = [*process, preset, seed]
    return json.dumps(
        dict(weights=weights.hexdigest(), data=data.digest, schedule=schedule, settings=settings)
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
            f"{path} has no terms of bits per dimension: {error}; choose another file"
        ) from None
    if recorded != identity or terms.shape != (size,):
        raise ValueError(
            f"{path} is of another evaluation (other weights, images, steps, seed or preset); "
            "choose another file"
        )
    return terms, done
