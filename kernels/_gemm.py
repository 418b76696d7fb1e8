"""Matrix products of the network's kernels: tile sizes, packed weights, descriptors, costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ._feature_map import FeatureMap
from ._launch import launch_options
from ._triton import PRESENT, tl, triton

E4M3_MAX = 448.0
# "ieee" keeps Triton from rounding fp32 operands to TF32; it has no effect on the other types
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
    """GPU that a launch is configured for.

    Args:
        sm: Compute capability: 80, 90, 100 ...
        processors: Number of multiprocessors.
    """

    sm: int = 90
    processors: int = 132

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """Returns the target of `device`; an H100 if it is not a GPU, for tests on a CPU."""
        if device.type != "cuda":
            return cls()
        properties = torch.cuda.get_device_properties(device)
        return cls(10 * properties.major + properties.minor, properties.multi_processor_count)

    @property
    def tma(self) -> bool:
        """Whether operands are loaded by TMA. sm_120 has TMA but only 99 KiB of shared memory."""
        return 90 <= self.sm < 120

    @property
    def small(self) -> bool:
        """Whether a program has only 99 KiB of shared memory."""
        return self.sm in (86, 89) or self.sm >= 120


H100 = Target()


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch parameters of a matrix product.

    An image's result depends on block_k and on the instruction family, not on block_m and block_n.
    So block_k does not depend on the batch size. block_m may, but is at least 64: below that, sm_90
    uses another instruction family.

    Args:
        block_m: Rows per tile.
        block_n: Outputs per tile.
        block_k: Channels per step.
        warps: Warps per program.
        stages: Stages of the software pipeline.
        programs: Size of a persistent grid: one program per multiprocessor.
        tma: Loads operands through TMA descriptors (sm_90 and newer), otherwise through pointers.
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
    """Chooses tile sizes for a matrix product.

    A tile has 128 rows by `choose_block_n(k)` outputs. Small batches, which wait for operands, use
    64 by 32: more programs and more pipeline stages. Each size is compiled separately. A step is
    the largest power of two that divides c, up to 128 bytes. Eight warps are used where four would
    spill. fp32 runs without tensor cores, in tiles of 64 by at most 64.

    Args:
        target: GPU.
        dtype: Type of the operands.
        c: Channels per tap.
        k: Outputs.
        rows: Rows of the product.
        tma: Allows TMA, if the GPU has it.
        warps: Warps per program on sm_90, for tiles of full size.
        small_rounds: Uses the small tiles if they fit in this many rounds of all multiprocessors.
    """
    tma, block_m, block_n, stages = tma and target.tma, 128, choose_block_n(k), 3
    if dtype == torch.float32:
        return Tiles(64, min(64, block_n), divisor(c, 32), 8, 2, target.processors, tma)
    small_n = min(32, block_n)
    if triton.cdiv(rows, 64) * triton.cdiv(k, small_n) <= small_rounds * target.processors:
        block_m, block_n = 64, small_n
    block_k = divisor(c, 128 // dtype.itemsize)
    if target.sm != 90 or k % block_n:
        warps = 8
    if block_m == 64 or (target.tma and block_n < 128):
        padded = k % block_n and block_n > 64
        warps = 8 if target.tma and (padded or target.sm >= 100) else 4
    if tma:
        step_bytes = (block_m + block_n) * block_k * dtype.itemsize
        stages = 4 if block_m == 128 else min(8, 96 * 1024 // step_bytes)
    return Tiles(block_m, block_n, block_k, warps, stages, target.processors, tma)


def choose_block_n(k: int) -> int:
    """Returns the outputs per tile for k outputs: the fastest, then least padded, then largest.

    A tile of fewer than 64 outputs takes as long as one of 64.
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
    """Returns the largest power of two that divides n, at most `most` (a power of two)."""
    return min(n & -n, most)


def next_power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def box(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Returns x [R, C] as a kernel argument: a TMA descriptor of [rows, columns], or x itself."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def launch_conv(kernel: Any, t: Tiles, tiles: int, *args: Any, **constants: Any) -> None:
    """Launches `kernel` with one program per tile, or as a persistent grid if operands use TMA."""
    padded = "DEPTH" in constants
    if not padded and any(constants.get(name, 0) % t.block_k for name in ("C", "C2")):
        raise ValueError(
            f"the convolution has {constants['C']} channels; expected a multiple of {t.block_k}, "
            "the tile's channels per step; choose a smaller block_k"
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
    """Casts weight [K, ...] to `dtype`; for e4m3 scales each output channel to the type's range.

    Returns the weight and, for e4m3, the scale [K] of a product with inputs of scale `x_scale`.
    """
    if dtype != torch.float8_e4m3fn:
        return weight.to(dtype).contiguous(), None
    unit = weight.double().abs().amax(1).clamp(min=1e-30) / E4M3_MAX
    scaled = (weight.double() / unit[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.float().to(dtype).contiguous(), (unit * x_scale).float()


def pack(weight: Tensor) -> Tensor:
    """Packs the filters of a product: [K, C, h, w] -> [K, h * w * C]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def unpack(packed: Tensor, side: int) -> Tensor:
    """Inverse of `pack`: [K, side * side * C] -> [K, C, side, side]."""
    return packed.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


@overload
def cast(x: Tensor, compute: torch.dtype | None) -> Tensor: ...
@overload
def cast(x: None, compute: torch.dtype | None) -> None: ...
def cast(x: Tensor | None, compute: torch.dtype | None) -> Tensor | None:
    """Casts x to a fallback's compute type; None: that of x, or bf16 for e4m3, which is exact."""
    if x is None:
        return None
    if compute is None:
        compute = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    return x.to(compute)


def cost_of_conv(
    weight: Tensor, maps: tuple[FeatureMap | None, ...], out: FeatureMap
) -> tuple[int, int]:
    """FLOP of a convolution without its border, and the bytes of its weights, `maps` and `out`."""
    tensors = [weight, *(fm.rows for fm in (*maps, out) if fm is not None)]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    return 2 * out.images * out.height * out.width * weight.numel(), moved


# ---- device functions


@triton.jit
def load_rows(x_ptr, row0, c0, ROWS, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads [BLOCK_M, BLOCK_K] of x [ROWS, C] at row row0, channel c0; zeros for missing rows."""
    rows = row0 + tl.arange(0, BLOCK_M)
    offsets = rows.to(tl.int64)[:, None] * C + (c0 + tl.arange(0, BLOCK_K))[None, :]
    return tl.load(x_ptr + offsets, mask=((rows >= 0) & (rows < ROWS))[:, None], other=0.0)


@triton.jit
def pixel_of(rows, ROWS, H, W, BORDER: tl.constexpr):
    """Returns (image, y, x, inside) of rows of a map [H, W]; y or x is -1 on the border."""
    IMAGE = (H + BORDER) * (W + BORDER)
    image = rows // IMAGE
    r = rows - image * IMAGE
    y = r // (W + BORDER) - BORDER
    x = r % (W + BORDER) - BORDER
    return image, y, x, (rows < ROWS) & (y >= 0) & (x >= 0)
