"""What e4m3 convolutions are told of one network's activations, and which of them stay wide: `calibration.json`.

An e4m3 number has 3 bits behind its leading one and lies between 2^-9 and 448, so what a stored 1 is worth (a unit) must be chosen
beforehand for every layer. `ddpm-fast calibrate` looks at the activations of real sampling runs (`calibrate.calibrate`) and writes
down the largest of each layer, and how far off that layer's own product is in e4m3. These are the weights' own, so the file lies
in their folder and names them.
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
# A unit is chosen so that the largest activation that was seen, and a quarter more, just fits. It costs next to nothing: e4m3 is
# as precise for large numbers as for small ones, until they fall below 2^-6 units.
MARGIN = 1.25
# Rounding both operands of a product to 3 bits leaves it off by 0.0375 if its terms are independent, whatever the layer. What is a
# third above that, and twice what the layers of this network typically lose, loses to something else: a range too wide for one
# unit, or sums that cancel.
FLOOR = 0.05
TIMES_MEDIAN = 2.0


@dataclass(frozen=True)
class Layer:
    """amax: the largest |input| seen; error: relative L2 of the product in e4m3 against fp32; wide: does it stay out of e4m3?"""

    amax: float
    error: float
    wide: bool


@dataclass(frozen=True)
class Calibration:
    """weights: `digest_of` the network; made: how; layers: name of a convolution -> what was found."""

    weights: str
    made: Mapping[str, Any]
    layers: Mapping[str, Layer]

    @classmethod
    def of(cls, unet: UNet, made: Mapping[str, Any], amax: Mapping[str, float], error: Mapping[str, float]) -> Calibration:
        """What was found, judged by the rule (`allowed_error`)."""
        limit = allowed_error(error)
        return cls(digest_of(unet), made, {name: Layer(amax[name], error[name], not error[name] <= limit) for name in amax})

    @property
    def units(self) -> dict[str, float]:
        """Convolution -> what a stored 1 of its e4m3 input is worth."""
        return {name: unit_of(layer.amax) for name, layer in self.layers.items()}

    @property
    def wide(self) -> list[str]:
        """The convolutions that are not to be multiplied in e4m3."""
        return [name for name, layer in self.layers.items() if layer.wide]

    @property
    def allowed(self) -> float:
        """The error above which a layer stays wide."""
        return allowed_error({name: layer.error for name, layer in self.layers.items()})

    def expect(self, unet: UNet, source: str = "the calibration") -> None:
        """ValueError where it is not of this network's weights; not asked of a network without any (device "meta")."""
        if set(self.layers) != set(e4m3_convolutions(unet)):
            raise ValueError(f"{source} is of another network: its layers differ; {_AGAIN}")
        if not unet.conv_in.weight.is_meta and digest_of(unet) != self.weights:
            raise ValueError(
                f"{source} is of other weights ({self.weights[:12]}...; these are {digest_of(unet)[:12]}...), "
                f"with which e4m3 would saturate or be coarse; {_AGAIN}"
            )

    def to_json(self) -> bytes:
        return (json.dumps(dict(format=FORMAT, **asdict(self)), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, source: str) -> Calibration:
        """ValueError, which names `source`, for what `to_json` does not write."""
        try:
            found = json.loads(content)
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                what = found.get("format") if isinstance(found, dict) else type(found).__name__
                raise ValueError(f"format {what!r}; this version reads format {FORMAT}")
            layers = {name: Layer(**fields) for name, fields in found["layers"].items()}
            for name, layer in layers.items():
                if not (_is_size(layer.amax) and _is_size(layer.error) and isinstance(layer.wide, bool)):
                    raise ValueError(f"{name}: {asdict(layer)}; expected amax and error of 0 or more, wide true or false")
            if not isinstance(found["weights"], str) or not isinstance(found["made"], dict) or not layers:
                raise ValueError("expected weights, made and layers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{source} cannot be read as a calibration: {reason}; {_AGAIN}") from None
        return cls(found["weights"], found["made"], layers)


_AGAIN = "make it again by ddpm-fast calibrate, or remove it"


def load_calibration(directory: str | Path, unet: UNet) -> Calibration | None:
    """The calibration in a checkpoint's folder, None if there is none.

    ValueError for one that is damaged, or of other weights than `unet`'s: images drawn with a calibration that is silently left out
    would be other images. Only e4m3 reads it, so nothing else is kept from working.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    calibration = Calibration.from_json(path.read_bytes(), str(path))
    calibration.expect(unet, str(path))
    return calibration


def unit_of(amax: float) -> float:
    """What a stored 1 is worth, so that `MARGIN` times amax is stored as the largest e4m3; 1 for a layer that is never used."""
    return MARGIN * amax / E4M3_MAX or 1.0


def allowed_error(errors: Mapping[str, float]) -> float:
    """The rule: twice the median of the layers, and never less than `FLOOR`. NaN counts as large."""
    finite = [e for e in errors.values() if e == e]
    return max(FLOOR, TIMES_MEDIAN * statistics.median(finite)) if finite else FLOOR


def e4m3_convolutions(unet: UNet) -> dict[str, nn.Conv2d]:
    """The 3x3 convolutions that may take e4m3: those of residual blocks that no resampling stands before, of 32 input channels or
    multiples, for a tensor core takes so many at once.
    """
    found: dict[str, nn.Conv2d] = {}
    for name, block in unet.named_modules():
        if isinstance(block, ResBlock):
            found |= {f"{name}.conv1": block.conv1} if block.resample is None else {}
            found[f"{name}.conv2"] = block.conv2
    return {name: conv for name, conv in found.items() if conv.in_channels % 32 == 0}


def digest_of(unet: UNet) -> str:
    """SHA-256 of names, shapes and fp32 values of all parameters: the same however they are stored."""
    found = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)}\n".encode())
        found.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


def _is_size(value: Any) -> bool:
    return is_number(value) and value >= 0
