"""Choice of the engine for a network, a precision and a device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import _triton
from ..models.unet import UNet, channels_last
from .base import DTYPES, Engine
from .eager import EagerEngine
from .fused.calibration import Calibration

ENGINES = ("auto", "fused", "compile", "cpu", "reference")


@dataclass(frozen=True)
class EngineRequest:
    """Requirements of an engine.

    Attributes:
        model: The network: a `UNet`, or any callable.
        shape: (C, H, W) of the images.
        precision: A key of `DTYPES`.
        device: Device of the state.
        timesteps: Length of the noise schedule.
        calibration: Calibration of fp8 layers, or None.
    """

    model: Callable[..., Tensor]
    shape: tuple[int, int, int]
    precision: str
    device: torch.device
    timesteps: int
    calibration: Calibration | None = None


def choose(name: str, request: EngineRequest) -> Engine:
    """Returns the engine `name`; "auto" selects the fastest that supports the request.

    Raises:
        ValueError: The engine is unknown or does not support the request.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(ENGINES)}")
    if name != "auto":
        return _MAKERS[name](request, "as requested")
    model, device, precision = request.model, request.device.type, request.precision
    if not isinstance(model, UNet):
        return _reference(request, "the model is not a ddpm_fast UNet")
    if device == "cuda":
        if precision == "fp32":
            return _reference(request, "cuDNN is faster in fp32; use bf16, fp16 or fp8")
        if not _triton.PRESENT:
            return _reference(request, "Triton is not installed")
        return _or_reference(_fused, request, f"{precision} on a GPU")
    if device == "cpu" and precision == "fp32":
        return _or_reference(_cpu, request, "fp32 on a CPU")
    return _reference(request, f"{precision} on {device}")


Maker = Callable[[EngineRequest, str], Engine]


def _or_reference(maker: Maker, request: EngineRequest, reason: str) -> Engine:
    try:
        return maker(request, reason)
    except ValueError as error:
        return _reference(request, str(error))


def _reference(request: EngineRequest, reason: str, compile: bool = False) -> Engine:
    model, dtype = request.model, DTYPES[request.precision].activations
    if request.precision == "fp8":
        name = "compile" if compile else "reference"
        raise ValueError(
            f"fp8 needs engine 'fused'; this is engine {name!r} ({reason}): "
            "use another dtype or engine"
        )
    if isinstance(model, UNet) and model.dtype != dtype and model.dtype != torch.float64:
        model = channels_last(copy.deepcopy(model).to(dtype))
    return EagerEngine(model, dtype, reason, compile)


def _compiled(request: EngineRequest, reason: str) -> Engine:
    return _reference(request, reason, compile=True)


def _fused(request: EngineRequest, reason: str) -> Engine:
    from .fused.engine import FusedEngine  # imports every kernel

    r = request
    if not isinstance(r.model, UNet):
        raise ValueError(
            f"engine 'fused' takes a UNet; this model is {type(r.model).__name__}: "
            "use 'compile' or 'reference'"
        )
    return FusedEngine(
        r.model, r.shape, r.precision, r.device, r.timesteps, reason, calibration=r.calibration
    )


def _cpu(request: EngineRequest, reason: str) -> Engine:
    from .cpu.engine import CPUEngine

    r = request
    if not isinstance(r.model, UNet) or r.device.type != "cpu" or r.precision != "fp32":
        raise ValueError(
            f"engine 'cpu' takes a UNet in fp32 on a CPU; this is {r.precision} on {r.device}"
        )
    return CPUEngine(r.model, r.shape, r.timesteps)


_MAKERS: dict[str, Maker] = {
    "fused": _fused,
    "cpu": _cpu,
    "compile": _compiled,
    "reference": _reference,
}
