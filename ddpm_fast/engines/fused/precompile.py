"""Compilation of a plan's kernels in parallel processes, into Triton's cache.

Triton compiles under Python's lock, so threads would not run in parallel. The workers need no GPU:
they plan on the meta device for the parent's GPU, record the plan's launches, and compile them.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import torch

from ...kernels._gemm import Target
from ...models.unet import UNet
from ...utils.subprocess import JsonWorker, WorkerTimeout, json_stdio
from ...utils.triton_tools import RecordedLaunch, launch_key, record_launches
from .model import PlanSpec

TIMEOUT = 600.0  # seconds per process
MAX_PROCESSES = 8  # each takes some seconds to start


def compile_in_parallel(spec: PlanSpec, processes: int | None = None) -> list[int]:
    """Compiles the kernels of a plan and returns the processes' exit codes.

    If a process fails, its remaining kernels are compiled at their first launch.
    """
    count = processes or max(1, min(MAX_PROCESSES, (os.cpu_count() or 2) // 2))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(JsonWorker("ddpm_fast.engines.fused.precompile"))
            for _ in range(count)
        ]
        for i, worker in enumerate(workers):
            worker.send(dict(spec=spec.to_json(), share=[i, count]))
            worker.finish()
        return [_end_of(worker) for worker in workers]


def _end_of(worker: JsonWorker) -> int:
    """Exit code of a worker; kills it after the timeout."""
    try:
        return worker.wait(TIMEOUT)
    except WorkerTimeout:
        return worker.kill()


def distinct_launches(spec: PlanSpec) -> list[RecordedLaunch]:
    """Returns the launches of a plan that are compiled separately, in order."""
    with torch.device("meta"):
        unet = UNet(spec.config)
    plan = spec.network(unet, device="meta").plan()
    with record_launches() as launches:
        plan.run()
    return list({launch_key(launch): launch for launch in launches}.values())


class _Device:
    """Triton driver of a GPU that this machine does not have, for compilation only."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target.sm, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def compile_share(spec: PlanSpec, share: tuple[int, int]) -> int:
    """Compiles every share[1]-th distinct launch from share[0] on and returns their number.

    Replaces Triton's driver, so this process cannot use a GPU afterwards.
    """
    from triton.runtime import driver

    driver.set_active(_Device(spec.target))
    launches = distinct_launches(spec)[share[0] :: share[1]]
    for launch in launches:
        launch.kernel.warmup(**launch.args, grid=launch.grid, **launch.options)
    return len(launches)


def main() -> None:
    """Entry point of a worker: compiles the share of one request."""
    requests, send = json_stdio()
    request = next(requests)
    send(dict(compiled=compile_share(PlanSpec.from_json(request["spec"]), tuple(request["share"]))))


if __name__ == "__main__":
    main()
