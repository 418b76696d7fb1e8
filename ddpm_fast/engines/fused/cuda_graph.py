"""CUDA graph of a step: one launch by the host instead of a hundred."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Graphed:
    """CUDA graph of `repeats` calls of a step. A call replays it.

    A replay reads and writes the tensors of the capture at their addresses: keep them, and copy new
    values into them. The step runs twice before the capture, to compile kernels and let libraries
    choose algorithms. So its buffers are written before the first replay. No other thread may wait
    for a device during this warm-up.

    Args:
        step: A function without arguments.
        repeats: Calls per replay.
        pool: A `torch.cuda.graph_pool_handle()` that is shared by graphs that never run at the same
            time; None: a new pool.
        device: Device of the graph; default: the current one.

    Raises:
        RuntimeError: The step cannot be captured, because it waits for the device, for example. The
            message contains the line.
        OutOfMemoryError: The step runs out of memory.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        repeats: int = 1,
        pool: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.repeats = repeats
        self.device = torch.cuda.current_device() if device is None else device
        with torch.cuda.device(self.device):
            self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
            _warm_up(step)
            options = dict(pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
            with _with_line("cannot be captured"), torch.cuda.graph(self._graph, **options):
                for _ in range(repeats):
                    step()

    def __call__(self) -> None:
        """Enqueues one replay and returns at once. RuntimeError after `free`."""
        if self._graph is None:
            raise RuntimeError("this graph was freed; capture the step again")
        with torch.cuda.device(self.device):
            self._graph.replay()

    def free(self) -> None:
        """Releases the graph's memory. The caller's buffers stay."""
        if self._graph is not None:
            torch.cuda.synchronize(self.device)
            self._graph.reset()
            self._graph = None


def _warm_up(step: Callable[[], Any]) -> None:
    """Runs the step twice on a side stream; the second time raises if it waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with _with_line("cannot be captured: it waits for the device"):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def _with_line(what: str) -> Iterator[None]:
    """Context that adds the line of the step to an error of the driver or of torch."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the step {what}, at {_origin(error)}: {str(error).splitlines()[0]}"
        ) from error


def _origin(error: BaseException) -> str:
    """The innermost line outside torch."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(torch_folder):
            return f"{frame.filename}:{frame.lineno}, {frame.line}"
    return "an unknown line"
