"""Matrix products of the network's kernels: tiles, operand types, packed weights, descriptors, costs, and loads of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ._feature_map import FeatureMap
from ._launch import launch_options
from ._triton import PRESENT, tl, triton

E4M3_MAX = 448.0
# fp32 operands would be rounded to TF32 unless told otherwise; the others have one precision
PRECISION = {
    torch.float32: "ieee",
    torch.float16: "tf32",
    torch.bfloat16: "tf32",
    torch.float8_e4m3fn: "tf32",
}
TRITON_TYPE: dict[torch.dtype, Any] = (
    {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float8_e4m3fn: tl.float8e4nv,
    }
    if PRESENT
    else {}
)


@dataclass(frozen=True)
class Target:
    """Hardware that a launch is configured for: compute capability (80, 90, 100 ...) and multiprocessors."""

    sm: int = 90
    processors: int = 132

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """Target of `device`; an H100 where it is no GPU, so that a CPU tests the launches that matter most."""
        if device.type != "cuda":
            return cls()
        properties = torch.cuda.get_device_properties(device)
        return cls(10 * properties.major + properties.minor, properties.multi_processor_count)

    @property
    def tma(self) -> bool:
        """Operands by TMA into large shared memory: data-centre GPUs. sm_120 has TMA, but 99 KiB, so it goes as sm_89 does."""
        return 90 <= self.sm < 120

    @property
    def small(self) -> bool:
        """99 KiB of shared memory a program."""
        return self.sm in (86, 89) or self.sm >= 120


H100 = Target()


@dataclass(frozen=True)
class Tiles:
    """Tiles of a matrix product: block_m rows by block_n outputs per tile, block_k channels per step.

    programs   of a persistent grid: one per multiprocessor
    tma        operands through TMA descriptors (sm_90 and newer) or pointers

    An image's result depends on block_k and on the instruction family, not on block_m and block_n. So block_k never follows the
    batch, and block_m, which may, stays at 64 rows or more (below, sm_90 would take another family).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int
    tma: bool


def choose_tiles(
    target: Target,
    dtype: torch.dtype,
    c: int,
    k: int,
    rows: int,
    *,
    tma: bool,
    warps: int,
    small_rounds: float = 0,
) -> Tiles:
    """Tiles for a product of `rows` rows, c channels (a tap) and k outputs; tma, warps: on a GPU that has TMA.

    128 rows and the outputs as `outputs_of` says; or 64 by 32, if `shrinks` rounds of those do it all: few images wait for
    operands, so more programs with less each are faster, and more steps of them on their way. (Every form costs a compilation.)
    The largest step that divides c, up to 128 bytes; eight warps where four would spill. fp32 goes without tensor cores, in small
    tiles.
    """
    if dtype == torch.float32:
        return Tiles(
            64,
            min(64, choose_block_n(k)),
            divisor(c, 32),
            8,
            2,
            target.processors,
            tma and target.tma,
        )
    block_n, modern, stages = choose_block_n(k), target.tma, 3
    small = (
        triton.cdiv(rows, 64) * triton.cdiv(k, min(32, block_n)) <= small_rounds * target.processors
    )
    block_m, block_n = (64, min(32, block_n)) if small else (128, block_n)
    block_k = divisor(c, 128 // dtype.itemsize)
    if target.sm != 90 or k % block_n:
        warps = 8
    if block_m == 64 or (modern and block_n < 128):
        warps = (
            8 if (modern and k % block_n and block_n > 64) or (modern and target.sm >= 100) else 4
        )
    if tma and modern:
        stages = (
            4
            if block_m == 128
            else min(8, 96 * 1024 // ((block_m + block_n) * block_k * dtype.itemsize))
        )
    return Tiles(block_m, block_n, block_k, warps, stages, target.processors, tma and modern)


def choose_block_n(k: int) -> int:
    """Outputs a tile for k of them: what takes the least time, where fewer than 64 are no faster than 64; of equals the one
    that pads least, then the largest.
    """
    return min(
        (128, 64, 32, 16),
        key=lambda block_n: (
            triton.cdiv(k, block_n) * max(block_n, 64),
            triton.cdiv(k, block_n) * block_n,
            -block_n,
        ),
    )


def divisor(n: int, most: int) -> int:
    """The largest power of two that divides n, at most `most`."""
    return min(n & -n, most)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def box(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """x [R, C] as a kernel argument: a TMA descriptor of boxes [rows, columns], or the tensor."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def launch_conv(kernel: Any, t: Tiles, tiles: int, *args: Any, **constants: Any) -> None:
    """Launches `kernel` over `tiles` tiles: all at once, or, where operands come by TMA, in a persistent grid."""
    padded = "DEPTH" in constants
    if not padded and any(constants.get(name, 0) % t.block_k for name in ("C", "C2")):
        raise ValueError(
            f"{constants['C']} channels; tiles of {t.block_k} channels a step need a multiple of them"
        )
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[(min(tiles, t.programs) if t.tma else tiles,)](
            *args,
            BLOCK_M=t.block_m,
            BLOCK_N=t.block_n,
            BLOCK_K=t.block_k,
            PROGRAMS=t.programs,
            **constants,
            **launch_options(t.warps, num_stages=t.stages),
        )


def quantise(
    weight: Tensor, dtype: torch.dtype, x_scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """weight [K, ...] in `dtype`; for e4m3 each output channel fills the type's range, and [K] fp32 says what a unit of the
    product with an input of scale `x_scale` is worth.
    """
    if dtype != torch.float8_e4m3fn:
        return weight.to(dtype).contiguous(), None
    unit = weight.double().abs().amax(1).clamp(min=1e-30) / E4M3_MAX
    return (weight.double() / unit[:, None]).clamp(-E4M3_MAX, E4M3_MAX).float().to(
        dtype
    ).contiguous(), (unit * x_scale).float()


def pack(weight: Tensor) -> Tensor:
    """Packed filters of a product: [K, C, h, w] -> [K, h * w * C]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def unpack(packed: Tensor, side: int) -> Tensor:
    """Inverse of `pack`: [K, side * side * C] -> [K, C, side, side]."""
    return packed.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


@overload
def cast(x: Tensor, compute: torch.dtype | None) -> Tensor: ...
@overload
def cast(x: None, compute: torch.dtype | None) -> None: ...
def cast(x: Tensor | None, compute: torch.dtype | None) -> Tensor | None:
    """x in the type that a fallback computes in; None: the type of x, or bf16 for e4m3, which holds every e4m3 value exactly."""
    if x is None:
        return None
    if compute is None:
        compute = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    return x.to(compute)


def cost_of_conv(
    weight: Tensor, maps: tuple[FeatureMap | None, ...], out: FeatureMap
) -> tuple[int, int]:
    """FLOP of a convolution with packed weights over the output's real pixels, and the bytes that must move. others: the maps that
    it reads or writes besides.
    """
    pixels = out.images * out.height * out.width
    moved = sum(
        t.numel() * t.element_size()
        for t in (weight, *(fm.rows for fm in (*maps, out) if fm is not None))
    )
    return 2 * pixels * weight.numel(), moved


# ---- inside kernels


@triton.jit
def load_rows(x_ptr, row0, c0, ROWS, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile [BLOCK_M, BLOCK_K] of x [ROWS, C] from row row0 and channel c0; zero for rows that do not exist."""
    rows = row0 + tl.arange(0, BLOCK_M)
    offsets = rows.to(tl.int64)[:, None] * C + (c0 + tl.arange(0, BLOCK_K))[None, :]
    return tl.load(x_ptr + offsets, mask=((rows >= 0) & (rows < ROWS))[:, None], other=0.0)


@triton.jit
def pixel_of(rows, ROWS, H, W, BORDER: tl.constexpr):
    """(image, y, x, inside) of the rows of a map of [H, W] images; y or x is -1 on the border."""
    IMAGE = (H + BORDER) * (W + BORDER)
    image = rows // IMAGE
    r = rows - image * IMAGE
    y = r // (W + BORDER) - BORDER
    x = r % (W + BORDER) - BORDER
    return image, y, x, (rows < ROWS) & (y >= 0) & (x >= 0)
