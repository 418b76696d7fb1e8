"""Parts of `bench.gpu`: the device's ceilings, and the elementwise kernels and plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from bench.elementwise import DTYPES, LAYOUTS, SHAPES, Elementwise
from bench.gpu.context import Bench
from ddpm_fast.benchmark.kernels import ceilings as measured_ceilings
from ddpm_fast.benchmark.timer import Row, row_of


def ceilings(bench: Bench) -> Iterator[Row]:
    """Rates of a copy, bytes read plus written, and of large matrix products."""
    for dtype in bench.dtypes:
        for ceiling in measured_ceilings(bench.device, dtype, bench.tiny):
            row = dict(what=ceiling["what"], dtype=dtype, ms=1e3 * ceiling["seconds"])
            if ceiling["kind"] == "flops":
                yield row | dict(tflops=ceiling["per_s"] / 1e12)
            elif bench.copy_rate is None:
                bench.copy_rate = ceiling["per_s"]
                yield row | dict(tb_per_s=ceiling["per_s"] / 1e12)


def kernels(bench: Bench) -> Iterator[Row]:
    """noise, q_sample, ddpm_step and noise_mse, and plain PyTorch on the same tensors."""
    for shape in [(2, 3, 8, 8)] if bench.tiny else SHAPES:
        for layout_name, layout in LAYOUTS.items():
            for dtype in DTYPES.values():
                tensors = Elementwise(shape, layout, dtype, bench.device)
                name = str(dtype).removeprefix("torch.")
                where = dict(shape=list(shape), layout=layout_name, dtype=name, error=tensors.error)
                for case in tensors.cases():
                    timing = bench.measure(case.call, captured=True)
                    rate = case.bytes / timing.median
                    yield dict(
                        what=case.name,
                        **where,
                        **row_of(timing),
                        tb_per_s=rate / 1e12,
                        share_of_copy=rate / bench.copy_rate if bench.copy_rate else None,
                    )
