"""Faster CPU operations for training, installed in one instance of a `UNet`.

GroupNorm, the time row added before it, SiLU after it and the gradient of the residual path are one
operation of the CPU engine. Without llvmlite, PyTorch computes them separately.

In half precision some of PyTorch's CPU kernels take five to ten times as long as in fp32. These
operations are computed in fp32 and their results are cast back:

- attention;
- the backward pass of GroupNorm (measured with torch 2.13 on [64, 32, 32, 32], channels-last:
  7.4 ms in bf16, 1.3 ms in fp32);
- convolutions and linear layers, if the CPU has no instructions for the dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.unet import Attention, ResBlock, UNet, norm_silu

try:
    from ..engines.cpu import group_norm_silu as cpu_norm
except (ImportError, OSError):
    cpu_norm = None  # type: ignore[assignment]


def use_fused_norms(unet: UNet) -> str:
    """Fuses every GroupNorm of this instance with the operations around it.

    Returns:
        The reason for the fallback to PyTorch; "" if the operations are fused.
    """
    if cpu_norm is None:
        return "llvmlite is missing: pip install 'ddpm-fast[cpu]'"
    try:
        cpu_norm.prepare()
    except (OSError, RuntimeError) as error:
        return f"LLVM does not support this machine ({error})"
    for module in unet.modules():
        if isinstance(module, (UNet, ResBlock, Attention)):
            module.norm_silu = _norm_silu
    return ""


def _norm_silu(
    norm: nn.GroupNorm, x: Tensor, time: Tensor | None = None, silu: bool = True
) -> tuple[Tensor, Tensor]:
    if cpu_norm is None or not cpu_norm.fits(x, norm.weight):
        return norm_silu(norm, x, time, silu)
    return cpu_norm.group_norm_silu(
        x, time, norm.weight, norm.bias, norm.num_groups, norm.eps, silu
    )


def use_fp32_for_slow_ops(unet: UNet, dtype: torch.dtype = torch.bfloat16) -> None:
    """Computes the operations that are slow under autocast to `dtype` in fp32, in this instance."""
    slow_products = not is_native(dtype)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(_group_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, Attention):
            module.mix = _attention
        elif slow_products and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.forward = partial(_product, module)  # type: ignore[method-assign]


class _GroupNorm(torch.autograd.Function):
    """F.group_norm of a half-precision x [B, C, ...]; the gradient is computed in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        b, c, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
        x = x.contiguous(memory_format=_layout(x))
        y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, b, c, pixels, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
        # the kernel assumes that the gradient has x's layout
        gradient = gradient.float().contiguous(memory_format=_layout(x))
        tensors = (v.float() for v in (x, mean, rstd, weight))
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            gradient, *tensors, b, c, pixels, ctx.groups, [True, True, True]
        )
        return dx.to(x.dtype), dweight, dbias, None, None


def _layout(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def _product(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    forward: Any = type(layer).forward
    if not torch.is_autocast_enabled("cpu"):
        return forward(layer, x)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return forward(layer, x.float()).to(dtype)


def is_native(dtype: torch.dtype) -> bool:
    """Whether the CPU has product instructions for this dtype; else they are up to 10x slower."""
    mkldnn = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    return mkldnn._is_mkldnn_fp16_supported()
