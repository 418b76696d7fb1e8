"""Loop over the batches of a request; finished batches are transferred during the next one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.image_io import check_channels
from ..diffusion.solvers import StepTable
from ..engines.base import default_numerics
from ..utils.memory import check_fits
from ..utils.validation import integer, seed_bits
from .batch_sampler import BatchSampler
from .callbacks import Callback, Trajectory, progress_bar, without_padding
from .keywords import check_keywords
from .output import OUTPUTS, Batch, HostTransfer, completed
from .request import (
    Indices,
    Labels,
    SamplingOptions,
    SamplingParams,
    StreamOptions,
    as_params,
    check_indices,
    check_labels,
    indices_tensor,
    rows_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


INSTEAD = (
    "draw them batch by batch with Sampler.stream, or write them to a directory (ddpm-fast sample "
    "--out DIRECTORY), which also keeps finished images if the run is killed"
)


@dataclass(eq=False)
class BatchStream:
    """A validated request. Iteration yields a `Batch` (index of the first image, images) per batch.

    Attributes:
        sampler: Computes the batches.
        table: Step table.
        indices: Image indices, a range or int64 [N].
        seed: The seed's 64 bits as int64.
        labels: int64 [N], or None.
        x_start: Start images [N, C, H, W], or None.
        output, batch_size, pad, progress, callback, stop: As in `Sampler.sample`.
        preset: Determines the rounding to uint8.
    """

    sampler: BatchSampler
    table: StepTable
    indices: range | Tensor
    seed: int
    labels: Tensor | None
    x_start: Tensor | None
    output: str
    preset: str
    batch_size: int
    pad: bool
    progress: bool
    callback: Callback | None
    stop: Callable[[], bool] | None

    @classmethod
    def of(
        cls,
        sampler: BatchSampler,
        method: str,
        indices: Indices,
        params: SamplingParams | None = None,
        *,
        labels: Labels = None,
        output: str = "uint8",
        batch_size: int = 64,
        start: tuple[Tensor, int] | None = None,
        pad: bool = False,
        progress: bool = False,
        callback: Callback | None = None,
        stop: Callable[[], bool] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> BatchStream:
        """Validates the arguments of `Sampler.sample` or of another `method`."""
        check_keywords(method, options, [*StreamOptions.__annotations__, "output"])
        params, checked = as_params(params, options, method), check_indices(indices)
        if integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size}; expected at least 1")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        if output == "pil":
            check_channels(sampler.shape[0])
        x, t = (None, None) if start is None else sampler.check_start(start, len(checked))
        table = sampler.table(params, start=t)
        classes = check_labels(labels, len(checked), sampler.num_classes)
        request = (checked, seed_bits(params.seed), classes, x, output, params.preset)
        return cls(sampler, table, *request, batch_size, pad, progress, callback, stop)

    def collect(self) -> Any:
        """Returns all images in one tensor, or, for output "pil", in one list.

        Raises:
            ValueError: The images do not fit in memory.
        """
        c, h, w = self.sampler.shape
        shape, dtype, device = (h, w, c), torch.uint8, torch.device("cpu")
        if self.output == "float":
            shape, dtype, device = (c, h, w), torch.float32, self.sampler.device
        total = len(self.indices)
        check_fits(total, c * h * w * dtype.itemsize, device, INSTEAD)
        if self.output == "pil":
            return [image for _, images in self for image in images]
        result, count = torch.empty(total, *shape, dtype=dtype, device=device), 0
        for _, images in self:
            result[count : count + len(images)] = images
            count += len(images)
        return result if count == total else result[:count].clone()

    def __iter__(self) -> Iterator[Batch]:
        sampler, total = self.sampler, len(self.indices)
        sampler.refresh()
        if isinstance(self.callback, Trajectory):
            self.callback.begin_run()
        first, size = 0, self.batch_size if self.pad else min(self.batch_size, total)
        transfers: list[HostTransfer] = []
        with progress_bar(self.progress, len(self.table) * total) as bar:
            while first < total and not (self.stop is not None and self.stop()):
                rows = torch.arange(first, min(first + size, total), device="cpu")
                image, count = indices_tensor(self.indices[first : first + size]), len(rows)
                if self.pad:
                    rows, image = (
                        torch.cat([v, v[-1:].expand(size - count)]) for v in (rows, image)
                    )
                out_of_memory = False
                try:
                    with default_numerics(sampler.device):
                        sampler.engine.prepare(size)
                    labels, x = rows_of(self.labels, rows), rows_of(self.x_start, rows)
                    with sampler.begin(image, self.seed, labels, x) as state:
                        step = 0
                        callback = without_padding(self.callback, count)
                        for steps in sampler.steps(state, self.table, callback, self.stop):
                            bar.update(count * (steps - step))
                            step = steps
                            yield from completed(transfers)
                        if step == len(self.table):
                            result = (state.x[:count], image[:count], self.output, self.preset)
                            transfers.append(HostTransfer.start(*result, sampler.precision))
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    out_of_memory = True
                # after the except clause, because the exception keeps the tensors alive
                if out_of_memory:
                    size = self._halve(size)
                    continue
                if step < len(self.table):  # stopped
                    break
                yield from completed(transfers)
                first += count
        yield from completed(transfers, wait=True)

    def _halve(self, size: int) -> int:
        """Frees the engine's memory and returns half the batch size."""
        self.sampler.engine.free()
        message = f"out of memory with a batch of {size} images; continuing with {size // 2}"
        warnings.warn(message, stacklevel=3)
        return size // 2
