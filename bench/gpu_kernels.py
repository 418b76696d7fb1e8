"""The chip's ceilings, and the elementwise kernels beside plain PyTorch: parts of `bench.gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bench.elementwise import DTYPES, LAYOUTS, SHAPES, Elementwise
from ddpm_fast.benchmark import kernels as launches
from ddpm_fast.benchmark.timer import Row, row_of

if TYPE_CHECKING:
    from bench.gpu import Bench


def ceilings(bench: Bench) -> Iterator[Row]:
    """The rate at which the device copies its own memory, bytes read and written, and multiplies large matrices."""
    for dtype in bench.dtypes:
        for found in launches.ceilings(bench.device, dtype, bench.tiny):
            row = dict(what=found["what"], dtype=dtype, ms=1e3 * found["seconds"])
            if found["kind"] == "flops":
                yield row | dict(tflops=found["per_s"] / 1e12)
            elif bench.copy_rate is None:
                bench.copy_rate = found["per_s"]
                yield row | dict(tb_per_s=found["per_s"] / 1e12)


def kernels(bench: Bench) -> Iterator[Row]:
    """noise, q_sample, ddpm_step and noise_mse, each beside plain PyTorch on the same tensors."""
    for shape in [(2, 3, 8, 8)] if bench.tiny else SHAPES:
        for layout_name, layout in LAYOUTS.items():
            for dtype in DTYPES.values():
                found = Elementwise(shape, layout, dtype, bench.device)
                where = dict(shape=list(shape), layout=layout_name, dtype=str(dtype).removeprefix("torch."), error=found.error)
                for case in found.cases():
                    timing = bench.clock(case.call, captured=True)
                    rate = case.bytes / timing.median
                    share = rate / bench.copy_rate if bench.copy_rate else None
                    yield dict(what=case.name, **where, **row_of(timing), tb_per_s=rate / 1e12, share_of_copy=share)
