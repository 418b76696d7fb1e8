"""Sampling requests: parameters, image indices, labels, start images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..diffusion.presets import preset_of
from ..diffusion.solvers import check_eta
from ..diffusion.timesteps import SPACINGS, Steps
from ..kernels import noise
from ..utils.validation import integer, is_number, seed_bits
from .callbacks import Callback
from .keywords import check_keywords

Indices = int | range | Sequence[int] | Tensor
Labels = int | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. With the model and an image index, they determine an image.

    Hashable and JSON-serializable.

    Args:
        seed: 0 ... 2^64-1.
        solver: "ddpm", "ddim", "dpm++2m" or "dpm++2m-sde".
        steps: Number of steps, the timesteps themselves (decreasing), or sections such as
            "10,20,30"; None: all for "ddpm", 50 for "ddim", else 20.
        spacing: "linspace", "leading", "trailing", "quadratic" or "openai"; None: the preset's.
        eta: Noise of "ddim", from 0 (deterministic) to 1 (as much as "ddpm").
        preset: "exact", or the conventions of another codebase: "ho", "openai", "diffusers", "ddim"
            (`diffusion.presets.PRESETS`).

    Raises:
        ValueError: A value has the wrong type, is out of range or unknown. `Sampler.table` checks
            `steps` against the number of timesteps.
    """

    seed: int = 0
    solver: str = "ddpm"
    steps: int | str | tuple[int, ...] | None = None
    spacing: str | None = None
    eta: float = 0.0
    preset: str = "exact"

    def __post_init__(self) -> None:
        seed_bits(self.seed)
        self._store("seed", int(self.seed))
        self._store("steps", _plain_steps(self.steps))
        for name in ("solver", "preset"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a name")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(f"spacing is {self.spacing!r}; expected one of {', '.join(SPACINGS)}")
        if isinstance(self.eta, (np.floating, np.integer)):
            self._store("eta", self.eta.item())
        if not is_number(self.eta):
            raise ValueError(f"eta = {self.eta!r}; expected a finite number")
        self._store("eta", float(self.eta))
        check_eta(self.solver, self.eta)
        preset_of(self.preset)

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_json(self) -> str:
        """Returns a JSON object with every field."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> SamplingParams:
        """Parses a JSON object; missing fields take their defaults.

        Raises:
            ValueError: The text is not a JSON object, a field is unknown, or a value is invalid.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"sampling parameters are not JSON: {error}") from None
        known = [field.name for field in fields(cls)]
        expected = f"expected a JSON object with some of {', '.join(known)}"
        if not isinstance(content, dict):
            raise ValueError(f"sampling parameters are {content!r:.60}; {expected}")
        if unknown := sorted(set(content) - set(known)):
            names = ", ".join(unknown)
            raise ValueError(f"sampling parameters have unknown fields {names}; {expected}")
        return cls(**content)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords."""

    seed: int
    solver: str
    steps: Steps
    spacing: str | None
    eta: float
    preset: str


class StreamOptions(SamplingOptions, total=False):
    """Keywords of `Sampler.sample` and `Sampler.stream`, in addition to `output`."""

    labels: Labels
    batch_size: int
    start: tuple[Tensor, int] | None
    pad: bool
    progress: bool
    callback: Callback | None
    stop: Callable[[], bool] | None


def as_params(
    params: SamplingParams | None, options: Mapping[str, Any], method: str
) -> SamplingParams:
    """Returns `params`, or parameters from the keywords of a call of `method`.

    Raises:
        ValueError: Both are given, or `params` has another type.
        TypeError: A keyword is unknown.
    """
    check_keywords(method, options, SamplingOptions.__annotations__)
    if params is None:
        return SamplingParams(**options)
    if not isinstance(params, SamplingParams):
        raise ValueError(
            f"params is {type(params).__name__}; expected SamplingParams, or keywords such as "
            "seed=0, steps=50"
        )
    if options:
        raise ValueError(
            f"params and {', '.join(options)} were both given; use dataclasses.replace(params, ...)"
        )
    return params


def _plain_steps(steps: Any) -> int | str | tuple[int, ...] | None:
    if steps is None or isinstance(steps, str):
        return steps
    if isinstance(steps, (np.ndarray, Tensor)):
        steps = steps.tolist()
    if isinstance(steps, Sequence):
        return tuple(integer("steps", step) for step in steps)
    return integer("steps", steps)


def check_indices(indices: Indices) -> range | Tensor:
    """Validates image indices: a count (0 ... N-1), a range, or a sequence of integers.

    Returns:
        A range, which is never expanded, or int64 [N] on the CPU.

    Raises:
        ValueError: The indices are not integers, or outside 0 ... 2^63-1.
    """
    if not isinstance(indices, (range, list, tuple, Tensor, np.ndarray)):
        indices = range(integer("indices", indices))
        if indices.stop < 0:
            raise ValueError(
                f"indices = {indices.stop}; expected a count of at least 0, or a range"
            )
    if isinstance(indices, range):
        if indices and (min(indices[0], indices[-1]) < 0 or max(indices[0], indices[-1]) >= 2**63):
            raise ValueError(
                f"image indices are {indices[0]} to {indices[-1]}; expected 0 to 2^63 - 1"
            )
        return indices
    if not len(indices):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    expected = "expected a count, or a range or list of integers"
    try:
        tensor = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"indices are {str(indices)[:60]}; {expected}") from None
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"indices are {tensor.dtype} {tuple(tensor.shape)}; {expected}")
    if tensor.min() < 0:
        raise ValueError(f"image index is {int(tensor.min())}; expected 0 or more")
    return tensor.long()


def indices_tensor(indices: range | Tensor) -> Tensor:
    """Returns validated image indices as int64 [N] on the CPU."""
    if isinstance(indices, Tensor):
        return indices
    return torch.tensor(list(indices), dtype=torch.int64, device="cpu")


def check_labels(labels: Labels, count: int, num_classes: int | None) -> Tensor | None:
    """Validates labels: one class for all images, or one per image.

    Returns:
        int64 [count] on the CPU; None if `labels` is None.

    Raises:
        ValueError: The labels are not integers in 0 ... num_classes-1, or the network is
            unconditional.
    """
    if labels is None:
        return None
    if num_classes is None:
        raise ValueError(
            "labels were given and the sampler has no classes; leave them out, or give "
            "Sampler(..., num_classes=) if the network takes labels"
        )
    try:
        tensor = torch.as_tensor(labels, device="cpu")
        valid = not tensor.is_floating_point() and tensor.dtype != torch.bool
        tensor = tensor.long()
    except (TypeError, ValueError, RuntimeError):
        valid = False
    if not valid or tensor.shape not in ((), (count,)):
        raise ValueError(
            f"labels are {str(labels)[:60]}; expected one integer, or {count}, one per image"
        )
    if count and (tensor.min() < 0 or tensor.max() >= num_classes):
        raise ValueError(
            f"labels are {tensor.min()} to {tensor.max()}; expected 0 to {num_classes - 1}"
        )
    return tensor.expand(count)


def random_labels(seeds: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """Random classes int64 [N] of images; each class has the same share of 2^32 random words."""
    words = noise.words(seeds, indices, torch.zeros_like(indices), noise.LABEL, 1)[:, 0]
    return (words * num_classes) >> 32


def check_start(start: Any, shape: tuple[int, ...], timesteps: int) -> tuple[Tensor, int]:
    """Validates (x_t, t): floating-point images of `shape` and a timestep below `timesteps`."""
    if not isinstance(start, tuple) or len(start) != 2 or not isinstance(start[0], Tensor):
        raise ValueError(
            f"start is {type(start).__name__}; expected (x_t tensor [N, C, H, W], timestep)"
        )
    x, t = start
    if tuple(x.shape) != shape or not x.is_floating_point():
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; expected floating-point {shape}")
    return x, check_timestep(t, timesteps)


def check_timestep(t: Any, timesteps: int) -> int:
    """Returns a timestep as an int. ValueError outside 0 ... timesteps-1."""
    if not 0 <= integer("timestep", t) < timesteps:
        raise ValueError(f"timestep = {t}; expected 0 to {timesteps - 1}")
    return int(t)


def rows_of(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """Returns values[rows] of per-image values, on their device; None for None."""
    return None if values is None else values[rows.to(values.device)]
