"""Calibration of e4m3 convolutions: activation ranges of one network, and the layers that stay in
bf16 (`calibration.json`).

An e4m3 number has 3 bits after its leading one and lies between 2^-9 and 448, so the value of a
stored 1 (a unit) must be chosen beforehand for every layer. `ddpm-fast calibrate` records the
activations of real sampling runs (`calibrate.calibrate`): the largest of each layer, and the error
of that layer's product in e4m3. They depend on the weights, so the file lies in the weights' folder
and contains their digest.
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
# A unit is chosen so that the largest activation that was seen, and a quarter more, just fits. It
# costs next to nothing: e4m3 is as precise for large numbers as for small ones, until they fall
# below 2^-6 units.
MARGIN = 1.25
# Rounding both operands of a product to 3 bits leaves it off by 0.0375 if its terms are
# independent, whatever the layer. What is a third above that, and twice what the layers of this
# network typically lose, loses to something else: a range too wide for one unit, or sums that
# cancel.
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
        made: The settings of the calibration run.
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
        """From measured ranges and errors; `allowed_error` decides which layers stay in bf16."""
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
        """The convolutions that stay in bf16."""
        return [name for name, layer in self.layers.items() if layer.keep_bf16]

    @property
    def allowed(self) -> float:
        """The error above which a layer stays in bf16."""
        return allowed_error({name: layer.error for name, layer in self.layers.items()})

    def expect(self, unet: UNet, source: str = "the calibration") -> None:
        """Raises ValueError if it belongs to other weights. The weights of a network on the meta
        device are not compared.
        """
        if set(self.layers) != set(e4m3_convolutions(unet)):
            raise ValueError(f"{source} is of another network: its layers differ; {_AGAIN}")
        if not unet.conv_in.weight.is_meta and digest_of(unet) != self.weights:
            raise ValueError(
                f"{source} is of other weights ({self.weights[:12]}...; these are "
                f"{digest_of(unet)[:12]}...), "
                f"with which e4m3 would saturate or be coarse; {_AGAIN}"
            )

    def to_json(self) -> bytes:
        return (json.dumps(dict(format=FORMAT, **asdict(self)), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, source: str) -> Calibration:
        """Reads what `to_json` writes. For other content raises ValueError, naming `source`."""
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
                        f"{name}: {asdict(layer)}; expected amax and error of 0 or more, keep_bf16 true or false"
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


_AGAIN = "make it again by ddpm-fast calibrate, or remove it"


def load_calibration(directory: str | Path, unet: UNet) -> Calibration | None:
    """Returns the calibration in a checkpoint's folder, or None if there is none. Only fp8 reads
    it.

    Raises:
        ValueError: The file is damaged or belongs to other weights. It is not ignored, since the
            images would differ.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    calibration = Calibration.from_json(path.read_bytes(), str(path))
    calibration.expect(unet, str(path))
    return calibration


def unit_of(amax: float) -> float:
    """The value of a stored 1 for which `MARGIN` times amax is stored as the largest e4m3; 1 for a
    layer that is never used.
    """
    return MARGIN * amax / E4M3_MAX or 1.0


def allowed_error(errors: Mapping[str, float]) -> float:
    """The largest error in e4m3 that a layer may have: twice the median of the layers, at least
    `FLOOR`. NaN counts as large.
    """
    finite = [e for e in errors.values() if e == e]
    return max(FLOOR, TIMES_MEDIAN * statistics.median(finite)) if finite else FLOOR


def e4m3_convolutions(unet: UNet) -> dict[str, nn.Conv2d]:
    """The 3x3 convolutions that can take e4m3: those of residual blocks without resampling before
    them, with a multiple of 32 input channels, which is the K of one tensor-core instruction.
    """
    convolutions: dict[str, nn.Conv2d] = {}
    for name, block in unet.named_modules():
        if isinstance(block, ResBlock):
            convolutions |= {f"{name}.conv1": block.conv1} if block.resample is None else {}
            convolutions[f"{name}.conv2"] = block.conv2
    return {name: conv for name, conv in convolutions.items() if conv.in_channels % 32 == 0}


def digest_of(unet: UNet) -> str:
    """SHA-256 of names, shapes and fp32 values of all parameters, independent of how they are
    stored.
    """
    digest = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_size(value: Any) -> bool:
    return is_number(value) and value >= 0
