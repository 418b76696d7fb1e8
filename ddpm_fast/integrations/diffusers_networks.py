"""Networks of diffusers as `UNet` on the same parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.config import UNetConfig
from ..models.unet import UNet
from .diffusers_tables import UnsupportedError

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
        UnsupportedError: The network is of another class or was modified: forward hooks, offloading,
            PEFT layers, quantized layers, fused projections, other attention processors, or
            parameters on several devices or of several dtypes.
    """
    network = unwrapped(network)
    if not is_diffusers_unet(network):
        raise UnsupportedError(
            f"the network is {type(network).__name__}; expected diffusers' UNet2DModel"
        )
    if reason := next(_modifications(network), None):
        raise UnsupportedError(reason)
    try:
        config = UNetConfig.from_diffusers(dict(network.config))
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
    return unet.eval()


def identity(network: nn.Module) -> tuple[Any, ...]:
    """Key that changes when a network is replaced, moved, cast or reconfigured."""
    network = unwrapped(network)
    parameters = tuple((id(p), p.device, p.dtype) for p in network.parameters())
    return (id(network), repr(sorted(dict(network.config).items(), key=str)), parameters)


def _modifications(network: nn.Module) -> Iterator[str]:
    from diffusers import UNet2DModel

    if type(network).forward is not UNet2DModel.forward and not hasattr(
        type(network).forward, "computes"
    ):
        yield f"{type(network).__name__} overrides forward; expected that of UNet2DModel"
    if getattr(network, "_hf_peft_config_loaded", False) or hasattr(network, "peft_config"):
        yield "the network has PEFT adapters; merge them with fuse_lora, then unload them"
    if getattr(network, "is_quantized", False) or getattr(network, "hf_quantizer", None):
        yield "the network is quantized; expected fp32, fp16 or bf16 weights"
    for name, module in network.named_modules():
        where = name or "the network"
        if hasattr(module, "_hf_hook") or getattr(module, "_diffusers_hook", None) is not None:
            yield f"{where} has a hook of accelerate or diffusers (offloading); remove the hook"
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            yield f"{where} has a forward hook; remove the hook"
        if nn.utils.parametrize.is_parametrized(module):
            yield f"{where} is parametrized; remove the parametrization"
        if getattr(module, "fused_projections", False):
            yield f"{where} has fused projections; call unfuse_qkv_projections"
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ not in PROCESSORS:
            yield f"{where} has the attention processor {type(processor).__name__}; expected {PROCESSORS[1]}"
    yield from _mixed(network)
    yield from _exchanged(network)


def _mixed(network: nn.Module) -> Iterator[str]:
    """Reasons about the parameters' devices and dtypes."""
    devices = sorted({str(p.device) for p in network.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        yield f"the parameters are on {', '.join(devices)}; move all to one device"
    dtypes = sorted({str(p.dtype) for p in network.parameters()})
    if len(dtypes) > 1:
        yield f"the parameters are {', '.join(dtypes)}; cast all to one dtype"


def _exchanged(network: nn.Module) -> Iterator[str]:
    """Layers that the configuration does not describe."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        original = UNet2DModel.from_config(network.config)
    expected = {name: type(m) for name, m in original.named_modules()}
    for name, module in network.named_modules():
        if name and type(module) is not expected.get(name):
            yield f"{name} is a {type(module).__name__}, which the configuration does not describe"
