"""Compiles a plan's kernels beforehand, in processes side by side, into Triton's own cache; the plan then finds them there.

Triton compiles under Python's lock, so threads would wait for one another. The children need no GPU: they plan on the meta device
for the GPU that the parent names, and compile the launches that the plan would make without making them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ...kernels._gemm import Target
from ...models.config import UNetConfig
from ...models.unet import UNet
from ...testing import Launch, launch_key, record_launches
from .checks import config_of
from .verification import child_environment, python

MOST = 8  # processes; each takes some seconds to begin


def compile_in_parallel(config: UNetConfig, options: Mapping[str, Any], processes: int | None = None) -> list[int]:
    """Compiles what `FusedUNet` with these options (`FusedUNet.subject`) launches; returns the processes' exit codes.

    A process that fails leaves its share to be compiled when it is launched.
    """
    count = processes or max(1, min(MOST, (os.cpu_count() or 2) // 2))
    children, command = [], python("ddpm_fast.engines.fused.precompile")
    for i in range(count):
        spec = dict(config=asdict(config), options=dict(options), share=[i, count])
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment())
        assert child.stdin is not None
        child.stdin.write(json.dumps(spec).encode())
        child.stdin.close()
        children.append(child)
    try:
        return [child.wait() for child in children]
    finally:
        for child in children:
            child.kill()


def distinct_launches(config: UNetConfig, options: Mapping[str, Any]) -> list[Launch]:
    """Every launch that needs a compilation of its own, in the order of the plan."""
    from .unet import FusedUNet

    target = Target(**options["target"])
    with torch.device("meta"):
        unet = UNet(config)
    fused = FusedUNet(unet, **(dict(options) | dict(device="meta", target=target, check=False)))
    with record_launches() as launches:
        fused.plan().run()
    return list({launch_key(launch): launch for launch in launches}.values())


class _Device:
    """Stands for a GPU that is not here, as far as Triton's compiler asks for one."""

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


def compile_share(config: UNetConfig, options: Mapping[str, Any], share: tuple[int, int]) -> int:
    """Compiles every share[1]-th distinct launch from share[0] on, in this process, which must have no GPU in use; how many."""
    from triton.runtime import driver

    driver.set_active(_Device(Target(**options["target"])))
    mine = distinct_launches(config, options)[share[0] :: share[1]]
    for launch in mine:
        launch.kernel.warmup(**launch.args, grid=launch.grid, **launch.options)
    return len(mine)


if __name__ == "__main__":
    given = json.load(sys.stdin)
    compile_share(config_of(given["config"]), given["options"], tuple(given["share"]))
