"""Requirements of the kernels, and the validation of a network's arguments."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ...kernels._gemm import Target
from ...models.config import UNetConfig
from ...models.unet import UNet
from ...utils.validation import is_count
from .calibration import Calibration, e4m3_convolutions

ACCUMULATIONS = ("bounded", "unbounded")


def check_fp8(
    unet: UNet, calibration: Calibration | None, keep_bf16: Collection[str], accumulation: str
) -> None:
    if accumulation not in ACCUMULATIONS:
        raise ValueError(
            f"accumulation {accumulation!r}; expected one of {', '.join(ACCUMULATIONS)}"
        )
    candidates = e4m3_convolutions(unet)
    unknown = (
        keep_bf16
        if isinstance(keep_bf16, str)
        else [name for name in keep_bf16 if name not in candidates]
    )
    if unknown:
        raise ValueError(
            f"keep_bf16 is {unknown!r}; expected a list of convolutions' names, of {', '.join(list(candidates)[:3])} ..."
        )
    if calibration is not None:
        calibration.expect(unet)


def check_network(
    c: UNetConfig,
    batch_size: int,
    timesteps: int,
    dtype: str,
    target: Target,
    overlap: bool = False,
) -> None:
    if not (is_count(batch_size) and is_count(timesteps)):
        raise ValueError(
            f"batch_size = {batch_size}, timesteps = {timesteps}; expected integers of at least 1"
        )
    if target.sm < 80:
        raise ValueError(
            f"the kernels need compute capability 8.0 or newer; this GPU has {target.sm / 10}: run the reference UNet"
        )
    if overlap and target.sm < 90:
        raise ValueError(
            f"overlap needs a GPU of compute capability 9.0 or newer; this one has {target.sm / 10}"
        )
    if dtype == "fp8" and target.sm < 89:
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 or newer; this one has {target.sm / 10}: use bf16"
        )
    odd = [n for n in c.channels if n % 16]
    if odd:
        raise ValueError(
            f"levels of {odd} channels; the kernels take multiples of 16: run the reference UNet"
        )
    heads = [
        level.channels // level.heads
        for level, attends in zip(c.levels, c.attends, strict=True)
        if attends
    ]
    if max(heads, default=0) > 512:
        raise ValueError(
            f"attention heads of {max(heads)} channels; the kernels take up to 512: run the reference UNet"
        )


def check_call(
    c: UNetConfig,
    batch_size: int,
    timesteps: int,
    device: torch.device,
    x_t: Tensor,
    t: Tensor | int,
    labels: Tensor | None,
) -> tuple[int, Tensor, Tensor]:
    """Validates the arguments of a call. Returns (batch size, t [B] int64, labels [B] int64)."""
    coarsest = 2 ** (len(c.channels) - 1)
    if (
        x_t.ndim != 4
        or x_t.shape[1] != c.in_channels
        or x_t.shape[2] % coarsest
        or x_t.shape[3] % coarsest
    ):
        raise ValueError(
            f"x_t has shape {tuple(x_t.shape)}; expected [B, {c.in_channels}, H, W] with H and W divisible by {coarsest}"
        )
    b = len(x_t)
    if not 1 <= b <= batch_size:
        raise ValueError(
            f"x_t has {b} images; expected 1 to {batch_size}: give a larger batch_size at construction"
        )
    classes = c.num_classes or 1
    if (labels is None) != (c.num_classes is None):
        expected = "no labels: the network is unconditional"
        if c.num_classes is not None:
            expected = f"labels [B] in 0..{classes - 1}"
        state = "missing" if labels is None else "given"
        raise ValueError(f"labels {state}; expected {expected}")
    t = torch.as_tensor(t, device=device)
    t = t.expand(b) if t.ndim == 0 else t
    labels = torch.zeros(b, dtype=torch.int64, device=device) if labels is None else labels
    for name, v, most in (("t", t, timesteps), ("labels", labels, classes)):
        wrong = v.shape != (b,) or v.is_floating_point() or v.is_complex()
        if wrong or bool(((v < 0) | (v.long() >= most)).any()):
            values = f"{v.min()}..{v.max()}" if v.numel() else "nothing"
            raise ValueError(
                f"{name} is {v.dtype} {tuple(v.shape)} of {values}; expected integers [{b}] in 0..{most - 1}"
            )
    return b, t.long(), labels.long().to(device)
