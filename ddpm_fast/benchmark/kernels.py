"""Time of every kernel, and the ceilings of the device.

A kernel is a launch of the plan on a GPU, an instruction of the compiled program on a CPU:
{what, times (per forward pass), flops, bytes, seconds, images}. A ceiling is
{what, dtype, kind ("flops" or "bytes"), per_s}. Bytes count each operand once. Operands that fit
into a cache can exceed the ceiling of the memory, so the second-level cache has a ceiling too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ..engines.base import DTYPES, Engine
from ..engines.cpu.engine import CPUEngine
from ..engines.fused.engine import FusedEngine
from ..engines.fused.plan import Launch, Plan
from ..engines.fused.roofline import Gpu, estimate
from .timer import Timing, measure
from .workload import Workload

Point = dict[str, Any]


def ceilings(device: torch.device, dtype: str, tiny: bool = False) -> list[Point]:
    """Measured rates of large matrix products and long copies; on a CPU of one core.

    Args:
        device: Device to measure.
        dtype: Precision of the products, a key of `engines.base.DTYPES`.
        tiny: Small operands, for tests.
    """
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)  # one core computes an image
        return list(_ceilings(device, dtype, tiny))
    finally:
        torch.set_num_threads(threads)


def _ceilings(device: torch.device, dtype: str, tiny: bool) -> Iterator[Point]:
    on_gpu = device.type == "cuda"
    timer = partial(measure, device=device, seconds=0.02 if tiny else 0.3, captured=True)
    n = 64 if tiny else 8192 if on_gpu else 1024
    kind = DTYPES[dtype]
    a, b = (torch.randn(n, n, device=device).to(kind.activations) for _ in range(2))
    product = partial(torch.matmul, a, b)
    if kind.operands != kind.activations:
        operands, one = (a.to(kind.operands), b.to(kind.operands).T), torch.ones((), device=device)
        product = partial(torch._scaled_mm, *operands, one, one, out_dtype=kind.activations)
    seconds = timer(product).median
    yield dict(what="matmul", dtype=dtype, kind="flops", per_s=2 * n**3 / seconds, seconds=seconds)
    sizes = {"copy": 2**20 if tiny else 2**32 if on_gpu else 2**28}
    if not on_gpu:
        sizes["copy in the second-level cache"] = 2**18
    for what, size in sizes.items():
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        seconds = timer(partial(target.copy_, source)).median
        yield dict(what=what, dtype="fp32", kind="bytes", per_s=2 * size / seconds, seconds=seconds)


def kernel_times(workload: Workload, batch: int) -> list[Point]:
    """Times the kernels of `Sampler`'s engine; empty for an engine that runs plain PyTorch."""
    engine: Engine = workload.sampler().engine
    if isinstance(engine, CPUEngine):
        return instructions(engine, workload)
    if isinstance(engine, FusedEngine) and workload.device.type == "cuda":
        plan = engine.network(batch).load(*workload.inputs(batch))
        plan.run()
        timer = partial(measure, device=workload.device, seconds=0.1, captured=True)
        return [point for _, point in launches(plan, batch, timer)]
    return []


def launches(
    plan: Plan, batch: int, timer: Callable[[Callable[[], object]], Timing]
) -> Iterator[tuple[Launch, Point]]:
    """Times each distinct launch of a plan that was loaded and run."""
    for launch, times in distinct(list(plan)):
        point = _point(launch, times, batch)
        yield launch, point | dict(seconds=timer(partial(plan.run_one, launch)).median)


def predicted_launches(plan: Plan, batch: int, gpu: Gpu) -> list[Point]:
    """Predicts the time of each distinct launch of a plan by the roofline model."""
    return [
        _point(launch, times, batch) | dict(seconds=estimate(launch, gpu).predicted)
        for launch, times in distinct(list(plan))
    ]


def _point(launch: Launch, times: int, batch: int) -> Point:
    flops, moved = launch.cost()
    what = dict(what=launch.op.name, first=launch.name, times=times)
    return dict(**what, flops=flops, bytes=moved, images=batch)


def distinct(plan: list[Launch]) -> Iterator[tuple[Launch, int]]:
    """Yields the first launch of each kind, and the number of launches of that kind."""
    kinds: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in plan:
        shapes = tuple(
            (k, b.height, b.width, b.channels, b.bordered, b.dtype)
            for k, b in launch.buffers.items()
        )
        kinds.setdefault((launch.op.name, shapes), []).append(launch)
    for group in kinds.values():
        yield group[0], len(group)


def instructions(engine: CPUEngine, workload: Workload) -> list[Point]:
    """Times each distinct instruction of the compiled program on one core.

    An instruction is repeated in a program, and the time of an empty program is subtracted.
    """
    from ..engines.cpu.cost import costs
    from ..engines.cpu.executor import COLUMN
    from ..engines.cpu.runtime import ITEM, JOB

    executor = engine._executor
    x, t, *labels = (v[:1] for v in workload.inputs(1))
    executor.forward(x, t, labels[0] if labels else None)  # fills its memory with finite values
    program = executor._programs[-1]
    rows = executor.times.rows(t, labels[0] if labels else None)
    item = np.zeros((1, len(ITEM)), dtype=np.int64)
    item[:, COLUMN["x"]], item[:, COLUMN["time_row"]] = x.data_ptr(), rows.addresses
    job = executor._job.copy()

    def seconds(repeated: np.ndarray[Any, Any]) -> float:
        def call() -> None:
            job[: JOB.index("yield_to_others")] = [0, 1, 1, item.ctypes.data, 0]
            executor._work(
                job.ctypes.data, repeated.ctypes.data, repeated.ctypes.data, len(repeated), 0, 1
            )

        return measure(call, torch.device("cpu"), 0.02).median

    idle = seconds(program[:1].copy())
    by_cost: dict[tuple[str, int, int], Point] = {}
    for row, cost in zip(program[1:], costs(executor.program), strict=True):
        what, flops, moved = cost
        if cost not in by_cost:
            repeats = max(1, min(200, 10**6 // max(flops // 20, moved, 1)))
            repeated = np.concatenate([program[:1], np.repeat(row[None], repeats, axis=0)])
            each = max(seconds(repeated) - idle, 1e-9) / repeats
            point = dict(what=what, times=0, flops=flops, bytes=moved, seconds=each, images=1)
            by_cost[cost] = point
        by_cost[cost]["times"] += 1
    return list(by_cost.values())
