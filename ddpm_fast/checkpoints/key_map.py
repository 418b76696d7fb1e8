"""Key maps: which stored tensor becomes which parameters of a `UNet`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.config import UNetConfig
from ..models.unet import UNet
from ..utils.validation import shown
from .raw_weights import RawWeights

# Orders of the rows of a joint projection [3 C, C], from slowest to fastest.
LEGACY_ORDER = ("heads", "qkv", "channels")
NEW_ORDER = ("qkv", "heads", "channels")
EDM_ORDER = ("heads", "channels", "qkv")


class Row(NamedTuple):
    """One row of a key map: a module of the source and its counterpart in `UNet`.

    kind is "plain" (weight and bias), "qkv" (one projection becomes three), "embedding" (weight
    only) or "transposed" (weight only, transposed).
    """

    source: str
    target: str
    kind: str = "plain"


class Block(NamedTuple):
    """Names inside a residual block or an attention block: {source: target}."""

    plain: Mapping[str, str]
    qkv: str | None = None  # the joint projection

    def rows(self, source: str, target: str) -> Iterator[Row]:
        """The rows of one block."""
        for old, new in self.plain.items():
            yield Row(f"{source}.{old}", f"{target}.{new}")
        if self.qkv is not None:
            yield Row(f"{source}.{self.qkv}", target, "qkv")


class _Step(NamedTuple):
    source: str
    targets: tuple[str, ...]
    change: Callable[[Tensor], Sequence[Tensor]]
    transposed: bool = False


def build_unet(
    weights: RawWeights,
    config: UNetConfig,
    rows: Iterable[Row],
    order: tuple[str, str, str] = LEGACY_ORDER,
) -> UNet:
    """The network of a configuration with the weights of another codebase, in fp32, in eval mode.

    Args:
        weights: Of the other codebase.
        config: Of the network.
        rows: The key map; rows of modules that the network does not have are left out.
        order: Of the rows of joint projections.

    Raises:
        ValueError: A tensor is missing, is not used exactly once, has another shape, or contains
            NaN or Inf.
    """
    with torch.device("meta"):
        unet = UNet(config)
    expected = unet.state_dict()
    names = set(expected)
    steps = [
        step for row in rows for step in _steps(row, config, order) if set(step.targets) <= names
    ]
    _check_names(weights, [step.source for step in steps])
    parameters: dict[str, Tensor] = {}
    for step in steps:
        _check_shape(weights, step, tuple(expected[step.targets[0]].shape))
        for target, value in zip(step.targets, step.change(weights.read(step.source)), strict=True):
            parameters[target] = value.reshape(expected[target].shape).contiguous()
    unet.load_state_dict(parameters, assign=True)
    return unet.eval()


def _steps(row: Row, config: UNetConfig, order: tuple[str, str, str]) -> Iterator[_Step]:
    source, target, kind = row
    if kind == "plain":
        for part in ("weight", "bias"):
            yield _Step(f"{source}.{part}", (f"{target}.{part}",), lambda t: [t])
    elif kind == "qkv":
        heads = config.levels[_level_of(target, len(config.channels))].heads
        for part in ("weight", "bias"):
            targets = tuple(f"{target}.to_{letter}.{part}" for letter in "qkv")
            yield _Step(f"{source}.{part}", targets, lambda t: _split_qkv(t, heads, order))
    elif kind == "embedding":
        yield _Step(f"{source}.weight", (f"{target}.weight",), lambda t: [t])
    else:
        yield _Step(f"{source}.weight", (f"{target}.weight",), lambda t: [t.t()], transposed=True)


def _level_of(target: str, levels: int) -> int:
    """The level of an attention layer, by its name in `UNet`."""
    way, _, rest = target.partition(".")
    if way == "mid_block":
        return levels - 1
    index = int(rest.partition(".")[0])
    return index if way == "down_blocks" else levels - 1 - index


def _split_qkv(joint: Tensor, heads: int, order: tuple[str, str, str]) -> Sequence[Tensor]:
    """The three projections, their rows ordered by (head, channel)."""
    channels, rest = joint.shape[0] // 3, joint.shape[1:]
    sizes = {"heads": heads, "qkv": 3, "channels": channels // heads}
    split = joint.reshape(*(sizes[axis] for axis in order), *rest)
    return [part.reshape(channels, *rest) for part in split.unbind(order.index("qkv"))]


def _check_names(weights: RawWeights, sources: list[str]) -> None:
    if missing := [name for name in sources if name not in weights]:
        raise ValueError(
            f"{weights.path}: parameter {missing[0]} is missing ({len(missing)} in all); "
            "check --from, and that the file is complete"
        )
    if unused := sorted(set(weights) - set(sources)):
        raise ValueError(
            f"{weights.path}: unexpected parameter {shown(unused[0])[1:-1]} "
            f"({len(unused)} in all); every stored tensor must be used: check --from"
        )


def _check_shape(weights: RawWeights, step: _Step, target: tuple[int, ...]) -> None:
    expected = (len(step.targets) * target[0], *target[1:])
    expected = expected[::-1] if step.transposed else expected
    shape = tuple(weights[step.source].shape)
    if _without_trailing_ones(shape) != _without_trailing_ones(expected):
        raise ValueError(
            f"{weights.path}: {step.source} has shape {shape}; expected {expected}, "
            "as the other tensors and the settings describe it"
        )


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1x1 convolutions and linear layers are the same matrix [C_out, C_in]."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
