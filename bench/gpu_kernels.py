"""The chip's ceilings, and the elementwise kernels beside plain PyTorch: parts of `bench.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule
from ddpm_fast.benchmark.clock import Row, row_of
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.ddpm_step import ddpm_step, ddpm_step_reference
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_gradient, noise_mse_reference
from ddpm_fast.kernels.q_sample import q_sample, q_sample_reference
from ddpm_fast.objective import target_table
from ddpm_fast.profile import EXACT
from ddpm_fast.testing import relative_error
from ddpm_fast.timesteps import choose_timesteps

if TYPE_CHECKING:
    from bench.gpu import Bench


def ceilings(bench: Bench) -> Iterator[Row]:
    """The rate at which the device copies its own memory, bytes read and written, and multiplies large matrices."""
    yield _copy(bench)
    n = 128 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    timing = bench.clock(lambda: a @ b, captured=True)
    yield dict(what="matmul", dtype="bf16", size=n, **row_of(timing), tflops=2 * n**3 / timing.median / 1e12)
    if "fp8" in bench.dtypes:
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device=bench.device)
        timing = bench.clock(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16), captured=True)
        yield dict(what="matmul", dtype="fp8", size=n, **row_of(timing), tflops=2 * n**3 / timing.median / 1e12)


def _copy(bench: Bench) -> Row:
    source = torch.empty(2**20 if bench.tiny else 2**30, device=bench.device)
    target = torch.empty_like(source)
    timing = bench.clock(lambda: target.copy_(source), captured=True)
    bench.copy_rate = 2 * source.nbytes / timing.median
    return dict(what="copy", bytes=2 * source.nbytes, **row_of(timing), tb_per_s=bench.copy_rate / 1e12)


def kernels(bench: Bench) -> Iterator[Row]:
    """noise, q_sample, ddpm_step and noise_mse, each beside plain PyTorch on the same tensors."""
    shapes = [(2, 3, 8, 8)] if bench.tiny else [(2048, 3, 128, 128), (32768, 3, 32, 32)]  # far beyond any cache
    for shape in shapes:
        for layout in (torch.channels_last, torch.contiguous_format):
            for dtype in (torch.float32, torch.bfloat16):
                yield from _on(bench, shape, layout, dtype)


def _on(bench: Bench, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> Iterator[Row]:
    b, c, h, w = shape
    schedule = NoiseSchedule.linear()
    image, seed = torch.arange(b, device=bench.device), torch.zeros(b, dtype=torch.int64, device=bench.device)
    row = torch.zeros(b, dtype=torch.int32, device=bench.device)
    t = torch.full((b,), 500, device=bench.device)
    table = EXACT.table(schedule, "ddpm", choose_timesteps(1000, None)).to(bench.device)[1]
    coef = schedule.q_sample_table(bench.device)
    x = torch.randn(shape, device=bench.device).contiguous(memory_format=layout)
    out = torch.randn(shape, device=bench.device, dtype=dtype).contiguous(memory_format=layout)
    x_0 = x.to(dtype)
    few = slice(0, 2)  # the check needs two images, not all of them

    z = N.noise_reference(seed[few], image[few], row[few], N.Q_SAMPLE, (c, h, w))
    want = q_sample_reference(x_0[few], z, coef, t[few])
    wrong = relative_error(q_sample(x_0[few], coef, t[few], row[few], seed[few], image[few]), want)
    z = N.noise_reference(seed[few], image[few], row[few], N.REVERSE, (c, h, w))
    want = ddpm_step_reference(x[few], out[few], z, table, row[few])
    got = x[few].clone(memory_format=torch.preserve_format)
    ddpm_step(got, out[few], table, row[few], seed[few], image[few])
    wrong = max(wrong, relative_error(got, want))
    target = target_table(schedule, "eps", bench.device)
    z = N.noise_reference(seed[few], image[few], row[few], N.Q_SAMPLE, (c, h, w))
    want = noise_mse_reference(out[few], z, None, target, t[few])
    wrong = max(wrong, relative_error(noise_mse(out[few], None, target, t[few], row[few], seed[few], image[few]), want))
    if not wrong < 1e-6:
        raise AssertionError(f"kernels differ from their references by {wrong:.1e}: nothing timed")

    signal, sigma = (float(v) for v in coef[500])
    c0, c1, clip, m0, m1, _, _, s, *_ = (float(v) for v in table[500])

    def plain_q_sample() -> Tensor:
        return x_0 * signal + torch.randn_like(x_0) * sigma

    def plain_step() -> Tensor:
        return m0 * (c0 * x + c1 * out).clamp(-clip, clip) + m1 * x + s * torch.randn_like(x)

    ones, old, eps = torch.ones(b, device=bench.device), torch.zeros_like(x), torch.randn_like(x)

    def plain_mse() -> Tensor:  # with the noise that q_sample had to store
        return (out.float() - eps).square().mean((1, 2, 3))

    calls: dict[str, tuple[Callable[[], object], int]] = {
        "noise": (lambda: N.noise(seed, image, row, N.X_T, c, h, w), 4),
        "q_sample": (lambda: q_sample(x_0, coef, t, row, seed, image), 4 + dtype.itemsize),
        "q_sample, plain PyTorch": (plain_q_sample, 4 + dtype.itemsize),
        "ddpm_step": (lambda: ddpm_step(x, out, table, row, seed, image), 8 + dtype.itemsize),
        "ddpm_step, plain PyTorch": (plain_step, 8 + dtype.itemsize),
        "ddpm_step, history": (lambda: ddpm_step(x, out, table, row, seed, image, False, old), 16 + dtype.itemsize),
        "noise_mse": (lambda: noise_mse(out, None, target, t, row, seed, image), dtype.itemsize),
        "noise_mse gradient": (
            lambda: noise_mse_gradient(ones, out, None, target, t, row, seed, image),
            2 * dtype.itemsize,
        ),
        "noise_mse, plain PyTorch": (plain_mse, dtype.itemsize + 4),
    }
    where = dict(shape=list(shape), layout=str(layout).removeprefix("torch."), dtype=str(dtype).removeprefix("torch."))
    for name, (call, per_element) in calls.items():
        timing = bench.clock(call, captured=True)
        rate = per_element * x.numel() / timing.median
        share = rate / bench.copy_rate if bench.copy_rate else None
        yield dict(what=name, **where, **row_of(timing), tb_per_s=rate / 1e12, share_of_copy=share, error=wrong)
