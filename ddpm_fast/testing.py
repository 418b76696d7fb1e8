"""Assertions shared by tests: accuracy, and operations on feature maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels._feature_map import FeatureMap
from .kernels._triton import INTERPRETED
from .utils.numerics import relative_error


def assert_as_accurate(fused: Tensor, plain: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """Asserts that the error of `fused` is at most `slack` times that of plain PyTorch plus 1 ulp.

    Args:
        fused: The result.
        plain: The result of plain PyTorch at the same precision.
        exact: The fp64 truth. Errors are the largest absolute ones.
        slack: Factor.
    """
    ulp = torch.finfo(fused.dtype).eps * exact.abs().max()
    error = (fused.double() - exact).abs().max()
    allowed = slack * (plain.double() - exact).abs().max() + ulp
    assert error <= allowed, (
        f"max error {error:.3g} > {allowed:.3g} = {slack} x plain PyTorch + 1 ulp"
    )


# ---- the interpreter


def interpret_like_a_gpu() -> None:
    """Replaces products and sums of Triton's interpreter by ones with the rounding of a GPU.

    The interpreter computes `tl.dot` by BLAS. OpenBLAS's kernels for AVX2 round a row differently
    depending on its position in the tile, so an image would depend on its position in the batch. On
    a GPU, all rows are rounded equally. `tl.sum` along any axis but the last adds sequentially,
    with an error that grows with the length. GPUs add pairwise, as does numpy along a contiguous
    axis.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        numpy = ModuleType("numpy")
        numpy.__dict__.update(vars(np) | dict(matmul=_matmul, sum=_tree_sum))
        interpreter.np = numpy


def _matmul(a: Any, b: Any, dtype: Any = None) -> Any:
    """a [..., M, K] @ b [..., K, N], accumulated in fp64 and rounded once."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    if a.dtype.itemsize < 4:  # exact in fp64, in any order
        product = np.matmul(x, y)
    else:
        product = x[..., :1] * y[..., :1, :]
        for k in range(1, x.shape[-1]):
            product += x[..., k : k + 1] * y[..., k : k + 1, :]
    return product.astype(dtype or a.dtype)


def _tree_sum(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    if axis is None:
        return np.sum(x, keepdims=keepdims)
    total = np.sum(np.ascontiguousarray(np.moveaxis(x, axis, -1)), axis=-1)
    return np.expand_dims(total, axis) if keepdims else total


# ---- operations on feature maps

GUARD = 256  # rows before and after a map that no kernel may touch


def operand_types() -> list[torch.dtype]:
    """Testable dtypes of activations. In the interpreter, products and casts of bf16 are wrong."""
    bf16 = torch.cuda.is_available() and not INTERPRETED
    return [torch.float32, torch.float16, *[torch.bfloat16] * bf16]


def spread(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All combinations of the axes with `operand_types`.

    In the interpreter, which is slow, each combination has one dtype, alternating along every axis.
    """
    types = operand_types()
    points = [list(zip(*point, strict=True)) for point in itertools.product(*map(enumerate, axes))]
    return [
        (*v, t)
        for at, v in points
        for j, t in enumerate(types)
        if not INTERPRETED or j == sum(at) % len(types)
    ]


def poisoned(
    images: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    device: Any,
    bordered: bool = True,
) -> FeatureMap:
    """A map filled and surrounded with NaN: it reveals missing writes and out-of-bounds reads."""
    fm = FeatureMap.empty(images, height, width, channels, dtype, "meta", bordered)
    memory = torch.full(
        (len(fm.rows) + 2 * GUARD, channels * dtype.itemsize),
        0xFF,
        dtype=torch.uint8,
        device=device,
    )
    return replace(fm, rows=memory.view(dtype)[GUARD:-GUARD])  # 0xFF is NaN in every type


def map_of(x: Tensor, dtype: torch.dtype | None = None, bordered: bool = True) -> FeatureMap:
    """x [N, C, H, W] as a map surrounded with NaN."""
    n, c, h, w = x.shape
    fm = poisoned(n, h, w, c, dtype or x.dtype, x.device, bordered)
    fm.write(x)
    return fm


def assert_written(out: FeatureMap) -> None:
    """Asserts that a `poisoned` map has no NaN, a zero border, and unchanged rows around it."""
    rows, guard = out.rows.double(), GUARD * out.channels * out.rows.element_size()
    memory = torch.empty(0, dtype=torch.uint8, device=rows.device).set_(out.rows.untyped_storage())
    assert not rows.isnan().any(), f"NaN in {int(rows.isnan().any(1).sum())} of {len(rows)} rows"
    assert not out.border.double().any(), "the border is not zero"
    assert (memory[:guard] == 0xFF).all() and (memory[-guard:] == 0xFF).all(), (
        "something was written outside the map"
    )


def assert_same_bits(x: Tensor, y: Tensor, what: str) -> None:
    """Asserts that x and y are bit-exact."""
    assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), (
        f"{what}: other bits"
    )


def run_twice(op: Any, out: FeatureMap, **arguments: Any) -> None:
    """Runs the kernel into `out` and into another `poisoned` map; asserts bit-exact results."""
    again = poisoned(
        out.images,
        out.height,
        out.width,
        out.channels,
        out.rows.dtype,
        out.rows.device,
        out.bordered,
    )
    for fm in (out, again):
        op.run(out=fm, **arguments)
        assert_written(fm)
    assert_same_bits(out.rows, again.rows, "a second run")


def assert_operation(
    op: Any,
    out: FeatureMap,
    reference: Callable[[torch.dtype], Tensor],
    slack: float = 2.0,
    fallback: float = 1e-11,
    **arguments: Any,
) -> None:
    """Asserts that the kernel and the fallback of an operation agree with a reference.

    Args:
        op: The operation.
        out: A `poisoned` map for its result.
        reference: Computes the result in a given dtype: in fp64 the truth, in the dtype of `out`
            plain PyTorch.
        slack: As in `assert_as_accurate`.
        fallback: Allowed error of the fallback in fp64, relative to the largest value.
        **arguments: Of the operation.
    """
    exact, plain = reference(torch.float64), reference(out.rows.dtype)
    run_twice(op, out, **arguments)
    assert_as_accurate(out.pixels, plain, exact, slack)
    error, allowed = relative_error(out.pixels, exact), slack * relative_error(plain, exact)
    assert error <= allowed, f"relative error {error:.3g} > {allowed:.3g} = {slack} x plain PyTorch"
    wide = poisoned(
        out.images,
        out.height,
        out.width,
        out.channels,
        torch.float64,
        out.rows.device,
        out.bordered,
    )
    op.fallback(out=wide, compute=torch.float64, **arguments)
    assert_written(wide)
    torch.testing.assert_close(
        wide.pixels,
        exact,
        rtol=0,
        atol=fallback * float(exact.abs().max()),
        msg=lambda m: f"fallback: {m}",
    )


def assert_same_in_any_batch(run: Callable[[list[int]], FeatureMap]) -> None:
    """Asserts that image 2 is bit-exact in any batch. `run` computes a batch of images 0 ... 4."""
    alone = run([2]).grid[0]
    for batch in ([2, 0, 1], [1, 0, 2], [2, 4, 1, 3, 0], [4, 3, 1, 0, 2]):
        assert_same_bits(run(batch).grid[batch.index(2)], alone, f"image 2 in the batch {batch}")


def _fill(part: Callable[[FeatureMap], Tensor], value: float) -> Callable[[FeatureMap], Any]:
    return lambda out: part(out).fill_(value)


# planted fault -> (its effect on the output, part of the assertion's message)
DAMAGES: dict[str, tuple[Callable[[FeatureMap], Any], str]] = {
    "one pixel left out": (_fill(lambda out: out.pixels[0, :, 1, 2], float("nan")), "NaN"),
    "one pixel is zero": (_fill(lambda out: out.pixels[-1, :, 2, 1], 0.0), "error"),
    "one image is another": (lambda out: out.pixels[0].copy_(out.pixels[-1].clone()), "error"),
    "rows and columns swapped": (
        lambda out: out.pixels[0, :, :3, :3].copy_(out.pixels[0, :, :3, :3].mT.clone()),
        "error",
    ),
    "top border left out": (_fill(lambda out: out.grid[0, 0, 1:], float("nan")), "NaN"),
    "left border left out": (_fill(lambda out: out.grid[-1, 1:, 0], float("nan")), "NaN"),
    "border of ones": (_fill(lambda out: out.grid[0, 0, -1, :1], 1.0), "border"),
    "a row before the first": (
        _fill(lambda out: out.rows.as_strided((1,), (1,), out.rows.storage_offset() - 1), 0.0),
        "outside",
    ),
    "a row after the last": (
        _fill(
            lambda out: out.rows.as_strided(
                (1,), (1,), out.rows.storage_offset() + out.rows.numel()
            ),
            0.0,
        ),
        "outside",
    ),
    "chance": (lambda out: out.pixels[0, 0, 0, 0].copy_(torch.rand(())), "other bits"),
}


@dataclass(frozen=True, eq=False)
class Damaged:
    """An operation whose kernel damages its output."""

    op: Any
    damage: Callable[[FeatureMap], Any]

    def run(self, out: FeatureMap, **arguments: Any) -> None:
        self.op.run(out=out, **arguments)
        self.damage(out)
