"""Accelerated UNet2DModel: the signature of diffusers, the function by an engine."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.base import dtype_name
from ..engines.cpu.engine import CPUEngine
from ..engines.eager import EagerEngine, inference
from ..engines.fused.unet import FusedUNet
from ..engines.select import EngineRequest, choose
from ..models.fingerprint import weights_fingerprint
from .diffusers_networks import identity, shared_unet, unwrapped

TIMESTEPS = 1000  # rows of an engine's time table; grows with what is asked for
_ACCELERATOR = "_ddpm_fast_accelerator"


def accelerated_unet(network: nn.Module, engine: str, dtype: Any) -> nn.Module:
    """Copy of a UNet2DModel that shares its parameters and computes its output by an engine.

    The original forward runs where the engine does not apply: gradients, train mode, and timesteps
    that are not integers.

    Raises:
        UnsupportedError: See `shared_unet`.
        ValueError: The engine does not support the network.
    """
    network = unwrapped(network)
    fast = copy.copy(network)
    accelerator = NetworkAccelerator(network, engine, dtype)
    accelerator.prepare(network, None)
    object.__setattr__(fast, "__class__", _accelerated_class(type(network)))
    vars(fast)[_ACCELERATOR] = accelerator
    return fast


@cache
def _accelerated_class(original: type) -> type:
    def forward(
        self: Any,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        return self._ddpm_fast_accelerator.forward(
            self, sample, timestep, class_labels, return_dict
        )

    forward.computes = original.forward  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__  # type: ignore[attr-defined]
    namespace = dict(
        __module__=original.__module__,
        __qualname__=original.__qualname__,
        __doc__=original.__doc__,
        forward=forward,
        report=property(lambda self: self._ddpm_fast_accelerator.report()),
    )
    return type(original.__name__, (original,), namespace)


class NetworkAccelerator:
    """Engine of an accelerated network, built for the shape of its input."""

    def __init__(self, original: nn.Module, engine: str, dtype: Any) -> None:
        self.original, self.engine, self.dtype = original, engine, dtype
        self._key: tuple[Any, ...] = ()
        self._weights = b""
        self._engine: Any = None
        self._fused: FusedUNet | None = None

    def free(self) -> None:
        """Releases the engine."""
        if self._engine is not None:
            self._engine.free()
        self._engine, self._fused, self._key = None, None, ()

    def report(self) -> dict[str, Any]:
        """Engine, reason and dtype of the last call."""
        name, reason = (
            ("diffusers", "") if self._engine is None else (self._engine.name, self._engine.reason)
        )
        return dict(engine=name, reason=reason, noise="torch", dtype=self._precision())

    def _precision(self) -> str:
        dtype = next(self.original.parameters()).dtype if self.dtype is None else self.dtype
        return dtype_name(dtype)

    def prepare(self, network: Any, shape: tuple[int, ...] | None, timesteps: int = 1) -> Any:
        """The engine for inputs [B, C, H, W] with integer t below `timesteps`."""
        rows = TIMESTEPS * -(-timesteps // TIMESTEPS)
        key = (*identity(network), shape, rows)
        if key != self._key or weights_fingerprint(network) != self._weights:
            self.free()
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                unet = shared_unet(network)
                size = unet.config.size if shape is None else shape[1:]
                if size is None:
                    return None
                device = next(network.parameters()).device
                form = (unet.config.in_channels, *size)
                request = EngineRequest(unet, form, self._precision(), device, rows, None)
                self._engine = choose(self.engine, request)
            self._unet = unet
            self._key, self._weights = key, weights_fingerprint(network)
        return self._engine

    def forward(
        self,
        network: Any,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None,
        return_dict: bool,
    ) -> Any:
        """See UNet2DModel.forward."""
        original = type(network).forward.computes
        t = torch.as_tensor(timestep)
        needs_grad = torch.is_grad_enabled() and (
            sample.requires_grad or any(p.requires_grad for p in network.parameters())
        )
        if network.training or needs_grad or t.is_floating_point() or t.is_complex():
            return original(network, sample, timestep, class_labels, return_dict)
        with torch.no_grad():
            highest = int(t.max()) if t.numel() else 0
            engine = self.prepare(network, tuple(sample.shape[1:]), highest + 1)
            labels = None if class_labels is None else class_labels.to(sample.device).long()
            t = t.to(sample.device).long().expand(len(sample))
            out = self._output(engine, sample, t, labels).to(sample.dtype)
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)

    def _output(self, engine: Any, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        given = () if labels is None else (labels,)
        if isinstance(engine, CPUEngine):
            return engine(x, t, *given)
        if isinstance(engine, EagerEngine):
            with inference(engine.model):
                return engine.call(x.to(engine.dtype), t, *given)
        if self._fused is None or self._fused.batch_size != len(x):
            self._fused = (
                engine.network(len(x)) if self._fused is None else self._fused.resized(len(x))
            )
        return self._fused(x, t, *given).clone()
