"""Calibration of e4m3 convolutions: activation ranges of one network, and the layers that stay in
bf16 (`calibration.json`).

An e4m3 number has 3 mantissa bits and lies between 2^-9 and 448, so each layer needs a unit: the
value of a stored 1. `ddpm-fast calibrate` measures two figures per layer during sampling: the
largest activation, and the error of the product in e4m3 (`sampling.calibrate`). They depend on the
weights, so the file is in the weights' folder and contains their digest.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...kernels._gemm import E4M3_MAX
from ...models.unet import ResBlock, UNet
from ...utils.validation import is_number

FILE = "calibration.json"
FORMAT = 1
# The largest e4m3 number represents this multiple of the largest measured activation. This does not
# reduce the accuracy: the relative error of e4m3 is the same for all numbers above 2^-6 units.
MARGIN = 1.25
# Rounding both operands to 3 bits gives a product of independent terms a relative error of 0.0375.
# A layer with a third more, and with twice the error that is typical in its network, has another
# problem: a range too wide for one unit, or sums that cancel.
FLOOR = 0.05
TIMES_MEDIAN = 2.0


@dataclass(frozen=True)
class Layer:
    """Calibration of one convolution.

    Attributes:
        amax: The largest |input|.
        error: Relative L2 error of the product in e4m3 against fp32.
        keep_bf16: Whether the layer stays in bf16.
    """

    amax: float
    error: float
    keep_bf16: bool


@dataclass(frozen=True)
class Calibration:
    """Calibration of a network.

    Attributes:
        weights: `digest_of` the network.
        made: Settings of the calibration run.
        layers: Name of a convolution -> `Layer`.
    """

    weights: str
    made: Mapping[str, Any]
    layers: Mapping[str, Layer]

    @classmethod
    def of(
        cls,
        unet: UNet,
        made: Mapping[str, Any],
        amax: Mapping[str, float],
        error: Mapping[str, float],
    ) -> Calibration:
        """Creates a calibration from measured ranges and errors. Layers above `allowed_error` stay
        in bf16.
        """
        limit = allowed_error(error)
        return cls(
            digest_of(unet),
            made,
            {name: Layer(amax[name], error[name], not error[name] <= limit) for name in amax},
        )

    @property
    def units(self) -> dict[str, float]:
        """Convolution -> the value of a stored 1 of its e4m3 input."""
        return {name: unit_of(layer.amax) for name, layer in self.layers.items()}

    @property
    def keep_bf16(self) -> list[str]:
        """Names of the convolutions that stay in bf16."""
        return [name for name, layer in self.layers.items() if layer.keep_bf16]

    @property
    def allowed(self) -> float:
        """The error above which a layer stays in bf16."""
        return allowed_error({name: layer.error for name, layer in self.layers.items()})

    def expect(self, unet: UNet, source: str = "the calibration") -> None:
        """Raises ValueError if the calibration is of other weights. Weights on the meta device are
        not compared.
        """
        if set(self.layers) != set(e4m3_convolutions(unet)):
            raise ValueError(f"{source} is of another network: its layers differ; {_AGAIN}")
        if not unet.conv_in.weight.is_meta and digest_of(unet) != self.weights:
            raise ValueError(
                f"{source} is of other weights: {self.weights[:12]}...; expected "
                f"{digest_of(unet)[:12]}...; {_AGAIN}"
            )

    def to_json(self) -> bytes:
        return (json.dumps(dict(format=FORMAT, **asdict(self)), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, source: str) -> Calibration:
        """Inverse of `to_json`. Raises ValueError with `source` in its message if that fails."""
        try:
            fields = json.loads(content)
            if not isinstance(fields, dict) or fields.get("format") != FORMAT:
                what = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
                raise ValueError(f"format {what!r}; this version reads format {FORMAT}")
            layers = {name: Layer(**values) for name, values in fields["layers"].items()}
            for name, layer in layers.items():
                if not (
                    _is_size(layer.amax)
                    and _is_size(layer.error)
                    and isinstance(layer.keep_bf16, bool)
                ):
                    raise ValueError(
                        f"{name}: {asdict(layer)}; expected amax and error of 0 or more, "
                        "keep_bf16 true or false"
                    )
            if (
                not isinstance(fields["weights"], str)
                or not isinstance(fields["made"], dict)
                or not layers
            ):
                raise ValueError("expected weights, made and layers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (
                f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            )
            raise ValueError(
                f"{source} cannot be read as a calibration: {reason}; {_AGAIN}"
            ) from None
        return cls(fields["weights"], fields["made"], layers)


_AGAIN = "create it again by ddpm-fast calibrate, or remove it"


def load_calibration(directory: str | Path, unet: UNet) -> Calibration | None:
    """Returns the calibration in a checkpoint's folder, or None if there is none. Only for fp8.

    Raises:
        ValueError: The file is damaged or of other weights.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    calibration = Calibration.from_json(path.read_bytes(), str(path))
    calibration.expect(unet, str(path))
    return calibration


def unit_of(amax: float) -> float:
    """Value of a stored 1 for which `MARGIN` times amax is the largest e4m3; 1 if amax is 0."""
    return MARGIN * amax / E4M3_MAX or 1.0


def allowed_error(errors: Mapping[str, float]) -> float:
    """Largest error that a layer in e4m3 may have: `TIMES_MEDIAN` times the median of the finite
    errors, at least `FLOOR`.
    """
    finite = [e for e in errors.values() if e == e]
    return max(FLOOR, TIMES_MEDIAN * statistics.median(finite)) if finite else FLOOR


def e4m3_convolutions(unet: UNet) -> dict[str, nn.Conv2d]:
    """3x3 convolutions that support e4m3: in residual blocks, not after resampling, with a multiple
    of 32 input channels (the K of one tensor-core instruction).
    """
    convolutions: dict[str, nn.Conv2d] = {}
    for name, block in unet.named_modules():
        if isinstance(block, ResBlock):
            convolutions |= {f"{name}.conv1": block.conv1} if block.resample is None else {}
            convolutions[f"{name}.conv2"] = block.conv2
    return {name: conv for name, conv in convolutions.items() if conv.in_channels % 32 == 0}


def digest_of(unet: UNet) -> str:
    """SHA-256 of names, shapes and fp32 values of all parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_size(value: Any) -> bool:
    return is_number(value) and value >= 0
