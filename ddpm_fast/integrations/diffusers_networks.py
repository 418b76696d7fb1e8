"""Networks of diffusers as `UNet` on the same parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from ..models.config import UNetConfig
from ..models.unet import UNet
from ..utils.numerics import relative_error
from .diffusers_tables import UnsupportedError

# relative errors of outputs by bytes per weight
SAME_FUNCTION = {8: 1e-3, 4: 1e-3, 2: 0.1}
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")


def unwrapped(network: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    return getattr(network, "_orig_mod", network)


def is_diffusers_unet(network: Any) -> bool:
    """Whether the object is a UNet2DModel, compiled or not."""
    from diffusers import UNet2DModel

    return isinstance(network, nn.Module) and isinstance(unwrapped(network), UNet2DModel)


def shared_unet(network: nn.Module) -> UNet:
    """`UNet` that computes the function of a UNet2DModel with the same `Parameter` objects.

    Args:
        network: A UNet2DModel, or torch.compile of one.

    Raises:
        UnsupportedError: See `check_unmodified`; or its output differs from that of the `UNet`.
    """
    network = unwrapped(network)
    if not is_diffusers_unet(network):
        raise UnsupportedError(
            f"the network is {type(network).__name__}; expected diffusers' UNet2DModel"
        )
    check_unmodified(network, hooks_of_network=False)
    try:
        config = UNetConfig.from_diffusers(_config(network))
    except ValueError as error:
        raise UnsupportedError(f"the network is unsupported: {error}") from None
    with torch.device("meta"):
        unet = UNet(config)
    parameters = network.state_dict(keep_vars=True)
    expected = {name: v.shape for name, v in unet.state_dict().items()}
    if {name: v.shape for name, v in parameters.items()} != expected:
        raise UnsupportedError(
            "the network has parameters that its configuration does not describe; "
            "unload adapters, or convert deprecated attention weights by saving and loading it"
        )
    unet.load_state_dict(parameters, assign=True)
    _check_same_function(network, unet.eval())
    return unet


@torch.no_grad()
def _check_same_function(network: Any, unet: UNet) -> None:
    """Compares the outputs for a small input: layers may have changed attributes."""
    parameter = next(network.parameters())
    side = 8 * 2 ** (len(unet.config.channels) - 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
    x, t = x.to(parameter), torch.tensor([17], device=parameter.device)
    labels = None if unet.config.num_classes is None else torch.zeros_like(t)
    training = [module for module in network.modules() if module.training]
    for module in training:  # dropout is random
        module.training = False
    try:
        forward = getattr(type(network).forward, "computes", type(network).forward)
        expected = forward(network, x, t, labels).sample
    finally:
        for module in training:
            module.training = True
    error = relative_error(unet(x, t, labels).float(), expected.float())
    if not error < SAME_FUNCTION[parameter.dtype.itemsize]:
        raise UnsupportedError(
            f"the output of the network differs by {error:.1e} from that of its configuration: "
            "attributes of its layers were changed, or its weights contain NaN"
        )


@contextmanager
def untouched_generators(network: nn.Module) -> Iterator[None]:
    """Context that restores torch's generators of the CPU and of the network's device."""
    device = next(network.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def identity(network: nn.Module) -> tuple[Any, ...]:
    """Key that changes when a network is replaced, moved, cast or reconfigured."""
    network = unwrapped(network)
    parameters = tuple((id(p), p.device, p.dtype) for p in network.parameters())
    return (id(network), repr(sorted(_config(network).items(), key=str)), parameters)


def attributes(network: nn.Module) -> int:
    """Hash of the plain attributes of all layers, such as the eps of a norm."""
    plain = (bool, int, float, str, tuple, type(None))
    items = (
        (name, key, value)
        for name, module in unwrapped(network).named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and key != "training"
    )
    return hash(tuple(items))


def _config(network: Any) -> dict[str, Any]:
    return dict(network.config)


def check_unmodified(network: Any, hooks_of_network: bool = True) -> None:
    """Checks that nothing changes what the configuration and the parameters say; cheap.

    Args:
        network: A UNet2DModel.
        hooks_of_network: Refuse forward hooks of the network itself, not only of its layers.

    Raises:
        UnsupportedError: The network has forward hooks, offloading, PEFT layers, quantized layers,
            fused projections, other attention processors, exchanged layers, or parameters on
            several devices or of several dtypes.
    """
    if reason := next(_modifications(unwrapped(network), hooks_of_network), None):
        raise UnsupportedError(reason)


def _modifications(network: Any, hooks_of_network: bool) -> Iterator[str]:
    from diffusers import UNet2DModel

    forward = type(network).forward
    if getattr(forward, "computes", forward) is not UNet2DModel.forward:
        yield f"{type(network).__name__} overrides forward; expected that of UNet2DModel"
    if getattr(network, "_hf_peft_config_loaded", False) or hasattr(network, "peft_config"):
        yield "the network has PEFT adapters; merge them with fuse_lora, then unload them"
    if getattr(network, "is_quantized", False) or getattr(network, "hf_quantizer", None):
        yield "the network is quantized; expected fp32, fp16 or bf16 weights"
    expected = _layer_types(repr(sorted(_config(network).items(), key=str)), network)
    for name, module in network.named_modules():
        where = name or "the network"
        if hasattr(module, "_hf_hook") or getattr(module, "_diffusers_hook", None) is not None:
            yield f"{where} has a hook of accelerate or diffusers (offloading); remove the hook"
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if (any(hooks) and (name or hooks_of_network)) or "forward" in vars(module):
            yield f"{where} has a forward hook; remove the hook"
        if nn.utils.parametrize.is_parametrized(module):
            yield f"{where} is parametrized; remove the parametrization"
        if getattr(module, "fused_projections", False):
            yield f"{where} has fused projections; call unfuse_qkv_projections"
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ not in PROCESSORS:
            kind = type(processor).__name__
            yield f"{where} has the attention processor {kind}; expected {PROCESSORS[1]}"
        if name and type(module) is not expected.get(name):
            yield f"{name} is a {type(module).__name__}, which the configuration does not describe"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        yield "a global forward hook is registered; remove the hook"
    yield from _mixed(network)


_LAYER_TYPES: dict[str, dict[str, type]] = {}


def _layer_types(key: str, network: Any) -> dict[str, type]:
    """Types of the layers that the configuration describes, by name; cached by configuration."""
    from diffusers import UNet2DModel

    if key not in _LAYER_TYPES:
        with torch.device("meta"):
            original = UNet2DModel.from_config(network.config)
        _LAYER_TYPES[key] = {name: type(m) for name, m in original.named_modules()}
    return _LAYER_TYPES[key]


def _mixed(network: nn.Module) -> Iterator[str]:
    """Reasons about the parameters' devices and dtypes."""
    devices = sorted({str(p.device) for p in network.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        yield f"the parameters are on {', '.join(devices)}; move all to one device"
    dtypes = sorted({str(p.dtype) for p in network.parameters()})
    if len(dtypes) > 1:
        yield f"the parameters are {', '.join(dtypes)}; cast all to one dtype"
