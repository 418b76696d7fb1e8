"""Assertions that tests share: the accuracy criterion, and operations on feature maps; and the
numerics of Triton's interpreter.
"""

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
    """`fused` may be at most `slack` times as far from the fp64 truth `exact` as plain PyTorch is,
    plus one last-place unit.
    """
    ulp = torch.finfo(fused.dtype).eps * exact.abs().max()
    error = (fused.double() - exact).abs().max()
    allowed = slack * (plain.double() - exact).abs().max() + ulp
    assert error <= allowed, (
        f"max error {error:.3g} > {allowed:.3g} = {slack} x plain PyTorch + 1 ulp"
    )


# ---- the interpreter


def interpret_like_a_gpu() -> None:
    """Replaces the products and sums of Triton's interpreter by some whose rounding is like a GPU's.

    The interpreter passes `tl.dot` to BLAS. OpenBLAS's kernels for AVX2 round the products of one
    row differently by where the row is in the tile, so that an image's bits would depend on its
    position in the batch; on a GPU, as here, all rows are computed alike. `tl.sum` along any axis
    but the last adds one value after another, and its error grows with their number; a GPU's
    threads add as a tree, and so does numpy along a contiguous axis.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        numpy = ModuleType("numpy")
        numpy.__dict__.update(vars(np) | dict(matmul=_matmul, sum=_tree_sum))
        interpreter.np = numpy


def _matmul(a: Any, b: Any, dtype: Any = None) -> Any:
    """a [..., M, K] @ b [..., K, N], added in fp64 and rounded once."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    if a.dtype.itemsize < 4:  # fp64 holds these products and sums exactly, in whatever order
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

GUARD = 256  # rows on either side of a map, in no map


def operand_types() -> list[torch.dtype]:
    """What activations may be here. The interpreter multiplies bf16 wrongly and truncates where it
    should round to it.
    """
    return [
        torch.float32,
        torch.float16,
        *[torch.bfloat16] * (torch.cuda.is_available() and not INTERPRETED),
    ]


def spread(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of values of the axes, with every one of `operand_types`; or, as the
    interpreter takes its time, with one, in turn along every axis.
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
    """A map full of NaN with NaN around it: what is left unwritten, or read from outside, shows."""
    fm = FeatureMap.empty(images, height, width, channels, dtype, "meta", bordered)
    memory = torch.full(
        (len(fm.rows) + 2 * GUARD, channels * dtype.itemsize),
        0xFF,
        dtype=torch.uint8,
        device=device,
    )
    return replace(fm, rows=memory.view(dtype)[GUARD:-GUARD])  # 0xFF is NaN in every type


def map_of(x: Tensor, dtype: torch.dtype | None = None, bordered: bool = True) -> FeatureMap:
    """x [N, C, H, W] as a map with NaN around it."""
    n, c, h, w = x.shape
    fm = poisoned(n, h, w, c, dtype or x.dtype, x.device, bordered)
    fm.write(x)
    return fm


def assert_written(out: FeatureMap) -> None:
    """No NaN is left in a map that was `poisoned`, its border is zero, and nothing around it was
    touched.
    """
    rows, guard = out.rows.double(), GUARD * out.channels * out.rows.element_size()
    memory = torch.empty(0, dtype=torch.uint8, device=rows.device).set_(out.rows.untyped_storage())
    assert not rows.isnan().any(), f"NaN in {int(rows.isnan().any(1).sum())} of {len(rows)} rows"
    assert not out.border.double().any(), "the border is not zero"
    assert (memory[:guard] == 0xFF).all() and (memory[-guard:] == 0xFF).all(), (
        "something was written outside the map"
    )


def assert_same_bits(x: Tensor, y: Tensor, what: str) -> None:
    assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), (
        f"{what}: other bits"
    )


def run_twice(op: Any, out: FeatureMap, **arguments: Any) -> None:
    """Runs the kernel into `out`, which is `poisoned`, and into another such map: all is written,
    with the same bits.
    """
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
    """Kernel and fallback against `reference`, which computes in the type that it is given: fp64 is
    the truth, the type of `out` the yardstick. The fallback, in fp64, may be off by `fallback` of
    the largest value.
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
    """`run` gives the map of the images it is told (of 0 ... 4): image 2 has the same bits wherever
    and with whom it stands.
    """
    alone = run([2]).grid[0]
    for batch in ([2, 0, 1], [1, 0, 2], [2, 4, 1, 3, 0], [4, 3, 1, 0, 2]):
        assert_same_bits(run(batch).grid[batch.index(2)], alone, f"image 2 in the batch {batch}")


def _leave(part: Callable[[FeatureMap], Tensor], value: float) -> Callable[[FeatureMap], Any]:
    return lambda out: part(out).fill_(value)


# effect of a broken kernel -> what the assertion reports
DAMAGES: dict[str, tuple[Callable[[FeatureMap], Any], str]] = {
    "one pixel left out": (_leave(lambda out: out.pixels[0, :, 1, 2], float("nan")), "NaN"),
    "one pixel is zero": (_leave(lambda out: out.pixels[-1, :, 2, 1], 0.0), "error"),
    "one image is another": (lambda out: out.pixels[0].copy_(out.pixels[-1].clone()), "error"),
    "rows and columns swapped": (
        lambda out: out.pixels[0, :, :3, :3].copy_(out.pixels[0, :, :3, :3].mT.clone()),
        "error",
    ),
    "top border left out": (_leave(lambda out: out.grid[0, 0, 1:], float("nan")), "NaN"),
    "left border left out": (_leave(lambda out: out.grid[-1, 1:, 0], float("nan")), "NaN"),
    "border of ones": (_leave(lambda out: out.grid[0, 0, -1, :1], 1.0), "border"),
    "a row before the first": (
        _leave(lambda out: out.rows.as_strided((1,), (1,), out.rows.storage_offset() - 1), 0.0),
        "outside",
    ),
    "a row after the last": (
        _leave(
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
