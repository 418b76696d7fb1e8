"""Accelerated UNet2DModel: the signature of diffusers, computed by an engine."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.base import dtype_name
from ..engines.cpu.engine import CPUEngine
from ..engines.eager import EagerEngine, inference
from ..engines.select import EngineRequest, choose
from ..models.fingerprint import weights_fingerprint
from .diffusers_networks import (
    check_unmodified,
    identity,
    shared_unet,
    untouched_generators,
    unwrapped,
)
from .diffusers_tables import UnsupportedError

ACCELERATOR = "_ddpm_fast_accelerator"
TIMESTEPS = 1000  # rows of an engine's time table, or the next multiple


def accelerated_unet(
    network: nn.Module,
    engine: str,
    dtype: Any,
    otherwise: str,
    accelerate: Callable[..., Any] | None = None,
) -> Any:
    """Copy of a UNet2DModel that shares its modules and computes its output by an engine.

    The original forward runs where the engine does not apply: gradients, train mode, and timesteps
    that are not integers. `report` says so.

    Args:
        network: The network, or torch.compile of it.
        engine, dtype, otherwise: See `accelerate`.
        accelerate: That function, by which copies and unpickled networks are made.

    Raises:
        UnsupportedError: See `shared_unet`.
        ValueError: The engine does not support the network.
    """
    fast: Any = copy.copy(unwrapped(network))
    accelerator = NetworkAccelerator(network, engine, dtype, otherwise, accelerate)
    accelerator.prepare(fast, None)
    kind: Any = type(fast)
    object.__setattr__(fast, "__class__", _accelerated_class(kind))
    vars(fast)[ACCELERATOR] = accelerator
    return fast


@cache
def _accelerated_class(original: Any) -> type:
    def forward(
        self: Any,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        accelerator = vars(self).get(ACCELERATOR)
        if accelerator is None:  # constructed from this class, not by accelerate
            return original.forward(self, sample, timestep, class_labels, return_dict)
        return accelerator.forward(self, sample, timestep, class_labels, return_dict)

    def reduce(self: Any, protocol: int) -> Any:
        a = vars(self).get(ACCELERATOR)
        if a is None:
            return nn.Module.__reduce_ex__(self, protocol)
        return a.accelerate, (unwrapped(a.original), a.engine, a.dtype, a.otherwise)

    def report(self: Any) -> dict[str, Any]:
        """Engine, reason and dtype of the last call."""
        accelerator = vars(self).get(ACCELERATOR)
        return dict(engine="diffusers") if accelerator is None else accelerator.report()

    forward.computes = original.forward  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    namespace = dict(
        __module__=original.__module__,
        __qualname__=original.__qualname__,
        __doc__=original.__doc__,
        __reduce_ex__=reduce,
        forward=forward,
        report=property(report),
    )
    return type(original.__name__, (original,), namespace)


class NetworkAccelerator:
    """Engine of an accelerated network, built for the shape of its input."""

    def __init__(
        self,
        original: nn.Module,
        engine: str,
        dtype: Any,
        otherwise: str,
        accelerate: Callable[..., Any] | None,
    ) -> None:
        self.original, self.engine, self.dtype = original, engine, dtype
        self.otherwise, self.accelerate = otherwise, accelerate
        self._key: tuple[Any, ...] = ()
        self._weights, self._rows, self._last_t = b"", 0, -1
        self._versions: tuple[Any, ...] = ()
        self._engine: Any = None
        self._fused: Any = None  # the last `FusedUNet`
        self._reason = ""  # why the original forward ran in the last call

    def free(self) -> None:
        """Releases the engine."""
        if self._engine is not None:
            self._engine.free()
        self._engine, self._fused, self._key = None, None, ()

    def report(self) -> dict[str, Any]:
        """Engine, reason and dtype of the last call."""
        common = dict(noise="torch", dtype=self._precision())
        if self._reason or self._engine is None:
            return common | dict(engine="diffusers", reason=self._reason, invariant=False)
        e = self._engine
        return common | dict(engine=e.name, reason=e.reason, invariant=e.invariant)

    def _precision(self) -> str:
        dtype = next(self.original.parameters()).dtype if self.dtype is None else self.dtype
        return dtype_name(dtype)

    def prepare(self, network: Any, shape: tuple[int, ...] | None, highest_t: int = 0) -> None:
        """Builds the engine for inputs [B, C, H, W] and t up to `highest_t`, if it has changed."""
        check_unmodified(network, hooks_of_network=False)  # the call of the module runs those
        self._rows = max(self._rows, TIMESTEPS * (highest_t // TIMESTEPS + 1))
        size = network.config.sample_size if shape is None else shape[1:]
        if size is None:
            return  # the engine is built for the first input
        height, width = (size, size) if isinstance(size, int) else size
        key = (*identity(network), height, width, self._rows)
        if key == self._key and not self._weights_changed(network, highest_t):
            return
        self.free()
        with untouched_generators(network):
            unet = shared_unet(network)
            device = next(network.parameters()).device
            form = (unet.config.in_channels, height, width)
            request = EngineRequest(unet, form, self._precision(), device, self._rows, None)
            self._engine = choose(self.engine, request)
        self._key, self._weights = key, weights_fingerprint(network)

    def _weights_changed(self, network: nn.Module, t: int) -> bool:
        """Compares the weights at the start of a loop, where t rises, or if a version has changed.

        In a loop t falls from call to call, and reading all weights takes longer than a step.
        """
        versions = tuple((p._version, p.data_ptr()) for p in network.parameters())
        same_loop = t < self._last_t and versions == self._versions
        self._versions, self._last_t = versions, t
        return not same_loop and weights_fingerprint(network) != self._weights

    def forward(
        self,
        network: Any,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None,
        return_dict: bool,
    ) -> Any:
        """See UNet2DModel.forward."""
        t = torch.as_tensor(timestep)
        self._reason = self._not_applicable(network, sample, t)
        try:
            if not self._reason:
                highest_t = int(t.max()) if t.numel() else 0
                self.prepare(network, tuple(sample.shape[1:]), highest_t)
        except UnsupportedError as error:
            if self.otherwise == "error":
                raise ValueError(f"not accelerated: {error}") from None
            self._reason = str(error)
            warnings.warn(f"not accelerated: {error}", stacklevel=4)
        if self._reason:
            original = type(network).forward.computes
            return original(network, sample, timestep, class_labels, return_dict)
        with torch.no_grad():
            labels = None if class_labels is None else _integers(class_labels).to(sample.device)
            t = t.to(sample.device).long().expand(len(sample))
            out = self._output(sample, t, labels).to(sample.dtype)
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)

    def _not_applicable(self, network: Any, sample: Tensor, t: Tensor) -> str:
        if network.training:
            return "the network is in train mode"
        tensors = (sample, *network.parameters())
        if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
            return "gradients are needed"
        if t.is_complex() or bool((t != t.round()).any()) or bool((t < 0).any()):
            return "the timesteps are not integers"
        return ""

    def _output(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        arguments = (t,) if labels is None else (t, labels)
        engine = self._engine
        if isinstance(engine, CPUEngine):
            return engine(x, *arguments)
        if isinstance(engine, EagerEngine):
            with inference(engine.model):
                return engine.call(x.to(engine.dtype), *arguments)
        if self._fused is None:
            self._fused = engine.network(len(x))
        elif self._fused.batch_size != len(x):
            self._fused = self._fused.resized(len(x))
        return self._fused(x, *arguments).clone()


def _integers(labels: Any) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels is {labels.dtype}; expected integers [B]")
    return labels.long()
