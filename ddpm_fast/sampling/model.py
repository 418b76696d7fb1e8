"""Validation of a sampler's network."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_model(
    model: Callable[..., Tensor], num_classes: int | None, parameter: Tensor, device: torch.device
) -> None:
    """Validates a network that is not a `UNet`.

    Args:
        model: The network.
        num_classes: Number of classes, or None.
        parameter: A parameter of the network, or a tensor on the CPU if it has none.
        device: Device of the state.

    Raises:
        ValueError: The network is not callable, takes other arguments than (x_t, t[, labels]), or
            its weights are on another device.
    """
    if not callable(model):
        raise ValueError(f"model is {type(model).__name__}; expected a callable (x_t, t)")
    _check_arguments(model, num_classes)
    if (
        isinstance(model, nn.Module)
        and any(True for _ in model.parameters())
        and parameter.device.type != device.type
    ):
        raise ValueError(
            f"device is {device} and the model is on {parameter.device}; expected the same: "
            f"move the model with model.to({str(device)!r})"
        )


def _check_arguments(model: Callable[..., Tensor], num_classes: int | None) -> None:
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # written in C
        return
    expected = ["x_t", "t"] + (["labels"] if num_classes is not None else [])
    try:
        signature.bind(*expected)
    except TypeError:
        try:
            signature.bind(*expected, "labels")
        except TypeError:
            fix = "wrap it in a function of these arguments"
        else:
            fix = "if the third argument is the class, give num_classes="
        if num_classes is not None:
            fix = "leave num_classes out if the model has no classes"
        raise ValueError(
            f"the model takes {signature}; expected ({', '.join(expected)}): {fix}"
        ) from None
