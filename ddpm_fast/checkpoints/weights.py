"""Weights of a `UNet` in a safetensors file, validated against the configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.config import UNetConfig
from ..models.unet import UNet
from ..utils.input_files import regular_file_size
from ..utils.validation import shown

WEIGHTS = "diffusion_pytorch_model.safetensors"
# safetensors' names of the supported types
DTYPES = ("F32", "F16", "BF16", "F64")
_TENSORS_PER_BLOCK = 10  # two norms, two convolutions, one projection; each has a weight and a bias
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of attention
# diffusers before 2023 (the google/ddpm-* repositories)
_OLD_PROJECTIONS = dict(zip(("query", "key", "value", "proj_attn"), _PROJECTIONS, strict=True))


def read_unet(folder: Path, config: UNetConfig) -> UNet:
    """Returns the network with the weights in `folder`, on the CPU in fp32, in eval mode.

    The file's header is compared with the network on the meta device, so a mismatch is an error
    before memory is allocated.

    Raises:
        ValueError: The file is missing, not a regular file or damaged; a parameter is missing,
            unexpected, of another shape or type, or contains NaN or Inf.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    _check_presence(folder)
    try:
        with torch.device("cpu"), safe_open(path, "pt") as file:
            stored = _current_names(path, file.keys())
            _check_count(path, config, len(stored))
            with torch.device("meta"):
                unet = UNet(config)
            expected = unet.state_dict()
            _check_names(path, stored, expected)
            for name, key in stored.items():
                _check_entry(path, name, file.get_slice(key), expected[name])
            weights = {
                name: _read(path, name, file.get_tensor(key), expected[name])
                for name, key in stored.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def _check_presence(folder: Path) -> None:
    path = folder / WEIGHTS
    if os.path.lexists(path):
        regular_file_size(path)
        return
    others = sorted(p.name for p in folder.iterdir() if p.suffix != ".json")
    listed = ", ".join([*others[:5], *(["..."] if others[5:] else [])]) or "no weights"
    raise ValueError(
        f"{path} is missing ({listed} found); expected one safetensors file, never a pickle"
    )


def _current_names(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Keys of the file by current parameter name."""
    stored: dict[str, str] = {}
    for key in keys:
        name = key
        if ".attentions." in key:
            for old, new in _OLD_PROJECTIONS.items():
                name = name.replace(f".{old}.", f".{new}.")
        if name in stored:
            raise ValueError(
                f"{path}: {shown(stored[name])} and {shown(key)} are the same parameter; remove one"
            )
        stored[name] = key
    return stored


def _check_count(path: Path, config: UNetConfig, count: int) -> None:
    """Refuses too few parameters, in constant time, before the network is built."""
    blocks = 2 + sum(2 * layers + 1 for layers in config.levels_of("layers"))
    if count < blocks * _TENSORS_PER_BLOCK:
        raise ValueError(
            f"{path} has {count} parameters; expected at least {blocks * _TENSORS_PER_BLOCK} "
            f"for the {blocks} residual blocks of config.json: missing parameters"
        )


def _check_names(path: Path, stored: Mapping[str, str], expected: Mapping[str, Tensor]) -> None:
    if differing := sorted(set(stored) ^ set(expected)):
        kind = "unexpected" if differing[0] in stored else "missing"
        raise ValueError(
            f"{path}: {kind} parameter {shown(differing[0])[1:-1]} "
            f"({len(differing)} names differ from the configuration's network)"
        )


def _check_entry(path: Path, name: str, entry: Any, expected: Tensor) -> None:
    """Type and shape of one parameter in the header."""
    if (dtype := entry.get_dtype()) not in DTYPES:
        raise ValueError(
            f"{path}: {name} is stored as {dtype}; expected {', '.join(DTYPES)}: "
            "convert the weights to a floating type"
        )
    shape, target = tuple(entry.get_shape()), tuple(expected.shape)
    if shape != target and not (_is_projection(name) and shape == (*target, 1, 1)):
        raise ValueError(
            f"{path}: {name} has shape {shape}; expected {target}, as config.json describes it"
        )


def _is_projection(name: str) -> bool:
    """True for attention's linear layers: 1x1 convolutions [c, c, 1, 1] in old checkpoints."""
    return ".attentions." in name and name.endswith(tuple(f".{p}.weight" for p in _PROJECTIONS))


def _read(path: Path, name: str, stored: Tensor, expected: Tensor) -> Tensor:
    # a copy: the file may be mapped into memory, and may change
    value = stored.to(torch.float32, copy=True).reshape(expected.shape)
    if not value.isfinite().all():
        raise ValueError(f"{path}: {name} contains NaN or Inf in fp32")
    return value
