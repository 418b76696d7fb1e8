"""CUDA graph of a step, captured once and replayed: one launch by the host instead of a hundred."""

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
    values into them. The step runs twice before it is captured (kernels compile, libraries choose),
    so its buffers are written before the first replay. During this warm-up no other thread may wait
    for a device.

    Args:
        step: A function without arguments.
        repeats: Calls per replay.
        pool: As of `torch.cuda.graph_pool_handle()`, shared by graphs that never run at once; None:
            a new pool.
        device: Whose graph it is; default: the current one.

    Raises:
        RuntimeError: The step cannot be captured: it waits for the device, or allocates without
            memory. The message names the line.
        OutOfMemoryError: As raised by the step.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        repeats: int = 1,
        pool: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.repeats, self.device = (
            repeats,
            torch.device("cuda", torch.cuda.current_device()) if device is None else device,
        )
        with torch.cuda.device(self.device):
            self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
            _warm_up(step)
            options = dict(pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
            with _named("could not be captured"), torch.cuda.graph(self._graph, **options):
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
    """Runs the step twice on a side stream: once to compile and choose, once to see that nothing
    waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with _named("cannot be captured: it waits for the device"):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Adds to an error of the driver or of torch the line of the step that it came from."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the step {what}, at {_origin(error)}: {str(error).splitlines()[0]}"
        ) from error


def _origin(error: BaseException) -> str:
    """The innermost line outside of torch."""
    torch_home = str(Path(torch.__file__).parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(torch_home)
    ]
    return (
        f"{frames[-1].filename}:{frames[-1].lineno}, {frames[-1].line}"
        if frames
        else "an unknown line"
    )
