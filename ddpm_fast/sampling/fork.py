"""Fork detection: the thread pools of PyTorch and of the CPU engine do not survive a fork.

After `os.fork()`, a child of a process that has computed would wait forever for threads that it
does not have. `check` raises an error instead.
"""

from __future__ import annotations

import os

import torch

_computed_in: int | None = None  # id of the process that has computed


def check() -> None:
    """Records that this process computes.

    Raises:
        RuntimeError: This process was forked from one that has computed with several threads.
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
