"""Resampling to half or double resolution, as in ADM's residual blocks, and copies of maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import TRITON_TYPE, cast, pixel_of
from ._launch import begin, launch_options
from ._triton import tl, triton

ROWS, LANES = 32, 64  # pixel rows and channels of a program's tile


def resample_reference(x: Tensor, to: str) -> Tensor:
    """x [N, C, H, W] -> "half": 2x2 average pooling; "double": nearest upsampling; "same": x."""
    if to == "half":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if to == "double" else x


@triton.jit(do_not_specialize=["COUNT", "H", "W"])
def _resample_kernel(
    x_ptr,
    y_ptr,
    COUNT,
    H,
    W,
    C: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    TO: tl.constexpr,
    BORDER: tl.constexpr,
    OUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """y: COUNT rows of [H, W] images; x: bordered [2 H, 2 W], [H, W] or [H / 2, W / 2] images."""
    begin(PDL)
    blocks = tl.cdiv(C, L)
    rows = tl.program_id(0) // blocks * R + tl.arange(0, R)
    c = tl.program_id(0) % blocks * L + tl.arange(0, L)
    image, y, x, inside = pixel_of(rows, COUNT, H, W, BORDER)
    in_channels = (c < C)[None, :]
    mask = inside[:, None] & in_channels
    if TO == "half":
        WP = 2 * W + 1
        offsets = (image.to(tl.int64) * ((2 * H + 1) * WP) + (2 * y + 1) * WP + 2 * x + 1)[
            :, None
        ] * C + c[None, :]
        v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v += tl.load(x_ptr + offsets + C, mask=mask, other=0.0).to(tl.float32)
        v += tl.load(x_ptr + offsets + WP * C, mask=mask, other=0.0).to(tl.float32)
        v += tl.load(x_ptr + offsets + (WP + 1) * C, mask=mask, other=0.0).to(tl.float32)
        v *= 0.25
    else:
        S: tl.constexpr = 2 if TO == "double" else 1
        WP = W // S + 1
        offsets = (image.to(tl.int64) * ((H // S + 1) * WP) + (y // S + 1) * WP + x // S + 1)[
            :, None
        ] * C + c[None, :]
        v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :],
        v.to(OUT),
        mask=(rows < COUNT)[:, None] & in_channels,
    )


@dataclass(frozen=True, eq=False)
class Resample:
    """Resampling of a bordered map into a bordered or dense map. See `resample_reference`.

    Args:
        to: "half", "double" or "same".
    """

    to: str
    name = "resample"

    def run(self, x: FeatureMap, out: FeatureMap) -> None:
        count, c = out.rows.shape
        with torch.cuda.device_of(x.rows):
            _resample_kernel[(triton.cdiv(count, ROWS) * triton.cdiv(c, LANES),)](
                x.rows,
                out.rows,
                count,
                out.height,
                out.width,
                C=c,
                R=ROWS,
                L=LANES,
                TO=self.to,
                BORDER=int(out.bordered),
                OUT=TRITON_TYPE[out.rows.dtype],
                **launch_options(4),
            )

    def fallback(self, x: FeatureMap, out: FeatureMap, compute: torch.dtype | None = None) -> None:
        out.write(resample_reference(cast(x.pixels, compute), self.to))

    def cost(self, x: FeatureMap, out: FeatureMap) -> tuple[int, int]:
        return 0, sum(fm.rows.numel() * fm.rows.element_size() for fm in (x, out))
