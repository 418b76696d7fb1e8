"""Every kernel beside the machine's ceilings: on a GPU each launch of the plan, on a CPU each instruction of the native program.

A point is {what, times (in a forward pass), flops, bytes, seconds, images}; a ceiling {what, dtype, kind, per_s},
its kind "flops" or "bytes". Bytes
count each operand once; what fits into a cache may pass the memory's ceiling, so a cache has one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ..engines.base import Engine
from ..engines.cpu.engine import CPUEngine
from ..engines.fused.plan import Launch
from .baselines import Subject
from .timer import measure

Point = dict[str, Any]


def ceilings(device: torch.device, dtype: str, tiny: bool = False) -> list[Point]:
    """What the device does with large matrices and long copies, now. On a CPU of one core, which is what an image gets."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        return list(_ceilings(device, dtype, tiny))
    finally:
        torch.set_num_threads(threads)


def _ceilings(device: torch.device, dtype: str, tiny: bool) -> Iterator[Point]:
    on_gpu = device.type == "cuda"
    clock = partial(measure, device=device, seconds=0.02 if tiny else 0.3, captured=True)
    n = 64 if tiny else 8192 if on_gpu else 1024
    kind = {"fp32": torch.float32, "fp16": torch.float16}.get(dtype, torch.bfloat16)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    if dtype == "fp8":
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device=device)
        seconds = clock(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)).median
    else:
        seconds = clock(lambda: a @ b).median
    yield dict(what="matmul", dtype=dtype, kind="flops", per_s=2 * n**3 / seconds, seconds=seconds)
    sizes = {"copy": 2**20 if tiny else 2**32 if on_gpu else 2**28}
    if not on_gpu:
        sizes["copy in the second-level cache"] = 2**18
    for what, size in sizes.items():
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        seconds = clock(partial(target.copy_, source)).median
        yield dict(what=what, dtype="fp32", kind="bytes", per_s=2 * size / seconds, seconds=seconds)


def points(subject: Subject, batch: int) -> list[Point]:
    """Of our engine for this subject, timed; nothing where it is neither our kernels nor our machine code."""
    engine: Engine = subject.sampler().engine
    if isinstance(engine, CPUEngine):
        return instructions(engine, subject)
    return launches(engine, subject, batch) if engine.name == "fused" and subject.device.type == "cuda" else []


def launches(engine: Any, subject: Subject, batch: int) -> list[Point]:
    """Each distinct launch of the network's plan, captured."""
    fused = engine.network(batch)
    plan = fused.load(*subject.inputs(batch))
    plan.run()
    found = []
    for launch, times in distinct(list(plan)):
        flops, moved = launch.cost()
        seconds = measure(partial(plan.run_one, launch), subject.device, 0.1, captured=True).median
        what = dict(what=launch.op.name, first=launch.name, times=times)
        found.append(dict(**what, flops=flops, bytes=moved, seconds=seconds, images=batch))
    return found


def distinct(plan: list[Launch]) -> Iterator[tuple[Launch, int]]:
    """The first of each kind of launch, and how many there are of it."""
    seen: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in plan:
        shapes = tuple((k, b.height, b.width, b.channels, b.bordered, b.dtype) for k, b in launch.buffers.items())
        seen.setdefault((launch.op.name, shapes), []).append(launch)
    for group in seen.values():
        yield group[0], len(group)


def instructions(engine: CPUEngine, subject: Subject) -> list[Point]:
    """Each distinct instruction of the native program on one core: a row of it, again and again."""
    from ..engines.cpu.cost import costs
    from ..engines.cpu.executor import COLUMN
    from ..engines.cpu.runtime import ITEM, JOB

    executor = engine._executor
    x, t, *labels = (v[:1] for v in subject.inputs(1))
    executor.forward(x, t, labels[0] if labels else None)  # values as they come, in all of its memory
    program = executor._programs[-1]
    rows = executor.times.rows(t, labels[0] if labels else None)
    item = np.zeros((1, len(ITEM)), dtype=np.int64)
    item[:, COLUMN["x"]], item[:, COLUMN["time_row"]] = x.data_ptr(), rows.addresses
    job = executor._job.copy()

    def seconds(repeated: np.ndarray[Any, Any]) -> float:
        def call() -> None:
            job[: JOB.index("yield_to_others")] = [0, 1, 1, item.ctypes.data, 0]
            executor._work(job.ctypes.data, repeated.ctypes.data, repeated.ctypes.data, len(repeated), 0, 1)

        return measure(call, torch.device("cpu"), 0.02).median

    idle = seconds(program[:1].copy())
    found: dict[tuple[str, int, int], Point] = {}
    for row, cost in zip(program[1:], costs(executor.program), strict=True):
        what, flops, moved = cost
        if cost not in found:
            repeats = max(1, min(200, 10**6 // max(flops // 20, moved, 1)))
            each = max(seconds(np.concatenate([program[:1], np.repeat(row[None], repeats, axis=0)])) - idle, 1e-9) / repeats
            found[cost] = dict(what=what, times=0, flops=flops, bytes=moved, seconds=each, images=1)
        found[cost]["times"] += 1
    return list(found.values())
