"""Requirements of the kernels: networks, GPUs and fp8 options that they support."""

from __future__ import annotations

from collections.abc import Collection

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
            f"accumulation is {accumulation!r}; expected one of {', '.join(ACCUMULATIONS)}"
        )
    candidates = e4m3_convolutions(unet)
    unknown = (
        keep_bf16
        if isinstance(keep_bf16, str)
        else [name for name in keep_bf16 if name not in candidates]
    )
    if unknown:
        raise ValueError(
            f"keep_bf16 is {unknown!r}; expected a list of convolutions' names, "
            f"of {', '.join(list(candidates)[:3])} ..."
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
    capability = target.sm / 10
    if target.sm < 80:
        raise ValueError(
            f"compute capability is {capability}; the kernels need 8.0 or newer: "
            "run the reference UNet"
        )
    if overlap and target.sm < 90:
        raise ValueError(f"compute capability is {capability}; overlap needs 9.0 or newer")
    if dtype == "fp8" and target.sm < 89:
        raise ValueError(f"compute capability is {capability}; fp8 needs 8.9 or newer: use bf16")
    unsupported = [n for n in c.channels if n % 16]
    if unsupported:
        raise ValueError(
            f"levels of {unsupported} channels; the kernels take multiples of 16: "
            "run the reference UNet"
        )
    widest = max(
        (level.channels // level.heads for level, a in zip(c.levels, c.attends, strict=True) if a),
        default=0,
    )
    if widest > 512:
        raise ValueError(
            f"attention heads of {widest} channels; the kernels take up to 512: "
            "run the reference UNet"
        )
