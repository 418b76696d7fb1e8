"""Detection of forks: the thread pools of PyTorch and of the CPU engine do not survive one.

A child that `os.fork()` starts after its parent has computed waits for threads that it does not
have. It raises an error instead.
"""

from __future__ import annotations

import os

import torch

_computed_in: int | None = None  # the process that has computed


def check() -> None:
    """Records that this process computes.

    Raises:
        RuntimeError: It was forked from a process that has computed with several threads.
    """
    global _computed_in
    process = os.getpid()
    if _computed_in not in (None, process) and torch.get_num_threads() > 1:
        raise RuntimeError(
            f"this process ({process}) was forked from process {_computed_in}, which has used a "
            "Sampler; PyTorch's threads do not survive a fork. Start processes with "
            "multiprocessing.get_context('spawn'), or call torch.set_num_threads(1) before the fork"
        )
    _computed_in = process
