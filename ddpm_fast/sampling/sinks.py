"""Sinks: write sampled images to a PNG grid, an array file, or a folder of PNG files.

A grid and an array file are written at the end, from images in memory. A folder contains every
finished image, also if the process is killed.

with open_sink("samples.npz", indices=range(100), shape=(3, 32, 32)) as sink:
    for first, images in sampler.stream(range(100), seed=0):
        sink.write(first, images)
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.image_io import PNG_CHANNELS, Pixels, encode_png, save_grid
from ..utils.files import write_atomically
from ..utils.memory import check_fits
from .paths import ARRAYS, GRIDS, KNOWN, check_path, kind_of
from .request import Indices, check_indices, indices_tensor

COPIES = 3  # of all images in memory while a file is written: batches, concatenated, encoded
INSTEAD = "write a directory, which needs memory for one batch and keeps finished images"


class SinkError(RuntimeError):
    """Raised if images cannot be written, for example on a full disk."""


class Sink:
    """Writer of batches that `Sampler.stream` yields; a context manager.

    A normal exit calls `close`, which writes the images in memory. After an exception, `close` is
    not called, so a grid or an array file is not written.

    Attributes:
        path: The output file or directory.
        count: Number of images received.
    """

    def __init__(self, path: str | Path, indices: Indices) -> None:
        self.path, self.count = Path(path), 0
        self._indices = check_indices(indices)

    def write(self, first: int, images: Tensor) -> None:
        """Adds the images of the next N indices.

        Args:
            first: Index of the first image, as `Sampler.stream` yields it.
            images: uint8 [N, H, W, C] on the CPU.

        Raises:
            ValueError: The batch does not follow the previous one.
            SinkError: An image cannot be written.
        """
        indices = indices_tensor(self._indices[self.count : self.count + len(images)])
        if len(indices) < len(images) or (len(images) and int(indices[0]) != first):
            expected = int(indices[0]) if len(indices) else "no more images"
            raise ValueError(
                f"the batch is {len(images)} images from index {first}; expected {expected}"
            )
        self._write(indices.numpy(), images.numpy())
        self.count += len(images)

    def _write(self, indices: NDArray[np.int64], images: Pixels) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Writes the images in memory, if any. SinkError if that fails."""

    @contextmanager
    def _writing(self, path: Path, complete: int) -> Iterator[None]:
        """Converts an OSError to a SinkError that reports how many images are complete."""
        try:
            yield
        except OSError as error:
            raise SinkError(
                f"{path}: {error.strerror or error}; {complete} of {len(self._indices)} images "
                f"are in {self.path}"
            ) from error

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()


class _BufferedSink(Sink):
    """Stores all images in memory until `close`."""

    def __init__(self, path: str | Path, indices: Indices) -> None:
        super().__init__(path, indices)
        self._batches: list[Tensor] = []

    def _write(self, indices: NDArray[np.int64], images: Pixels) -> None:
        self._batches.append(torch.from_numpy(images))

    def close(self) -> None:
        if not self._batches:
            return
        with self._writing(self.path, 0):
            self._save(torch.cat(self._batches).numpy())

    def _save(self, images: Pixels) -> None:
        raise NotImplementedError


class GridSink(_BufferedSink):
    """One PNG file with a grid of all images."""

    def _save(self, images: Pixels) -> None:
        save_grid(self.path, images)


class ArraySink(_BufferedSink):
    """One array file. .npy: uint8 [N, H, W, C]; .npz: "images" and their "indices", int64 [N]."""

    def _save(self, images: Pixels) -> None:
        buffer = io.BytesIO()
        if kind_of(self.path) == ".npy":
            np.save(buffer, images)
        else:
            indices = indices_tensor(self._indices[: len(images)]).numpy()
            np.savez_compressed(buffer, images=images, indices=indices)
        write_atomically(self.path, buffer.getvalue())


class FolderSink(Sink):
    """A folder with one PNG file per image, named by its index and written immediately."""

    def __init__(self, path: str | Path, indices: Indices) -> None:
        super().__init__(path, indices)
        largest = 0
        if isinstance(self._indices, Tensor) and len(self._indices):
            largest = int(self._indices.max())
        elif isinstance(self._indices, range) and self._indices:
            largest = max(self._indices[0], self._indices[-1])
        self._digits = max(6, len(str(largest)))

    def _write(self, indices: NDArray[np.int64], images: Pixels) -> None:
        with self._writing(self.path, self.count):
            self.path.mkdir(exist_ok=True)
        for i, (index, image) in enumerate(zip(indices, images, strict=True)):
            path = self.path / f"{index:0{self._digits}d}.png"
            with self._writing(path, self.count + i):
                write_atomically(path, encode_png(image))


def open_sink(
    path: str | Path, indices: Indices, shape: tuple[int, int, int] | None = None
) -> Sink:
    """Returns the sink for a path; validates the path now, not after sampling.

    Args:
        path: .png: a grid; .npy or .npz: an array; no suffix: a folder of PNG files.
        indices: Indices of the images that will be written, in this order.
        shape: (C, H, W) of the images; validated if given.

    Raises:
        ValueError: The path cannot be written, PNG does not support C channels, or a grid or array
            needs more memory than is available.
    """
    target = check_path(path)
    kind, count = kind_of(target), len(check_indices(indices))
    if shape is not None:
        if kind not in ARRAYS and shape[0] not in PNG_CHANNELS:
            raise ValueError(
                f"{path}: cannot write {shape[0]}-channel images as PNG; use {' or '.join(ARRAYS)}"
            )
        if kind in KNOWN:
            check_fits(count, COPIES * math.prod(shape), torch.device("cpu"), INSTEAD)
    if kind in ARRAYS:
        return ArraySink(target, indices)
    return GridSink(target, indices) if kind in GRIDS else FolderSink(target, indices)
