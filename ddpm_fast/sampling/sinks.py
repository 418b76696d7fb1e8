"""Sinks: where sampled images are written. A PNG grid, an array file, or a folder of PNG files.

A grid and an array are written at the end of a run; a folder keeps finished images after a kill.

with open_sink("samples.npz", indices=range(100), channels=3) as sink:
    for first, images in sampler.stream(range(100), seed=0):
        sink.write(first, images)
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.image_io import PNG_CHANNELS, Pixels, encode_png, save_grid
from ..utils.files import write_atomically
from .memory import check_fits
from .request import Indices, check_indices, indices_tensor

GRIDS, ARRAYS = (".png",), (".npy", ".npz")
INSTEAD = (
    "write a directory, which holds one batch in memory and keeps finished images after a kill"
)


class Sink:
    """Receives batches of images, as `Sampler.stream` yields them; a context manager.

    On a normal exit `close` writes what is still held. After an exception it is not called, so a file that
    holds all images is then not written.

    Attributes:
        path: the file or directory that is written.
        count: number of images received.
    """

    def __init__(self, path: str | Path, indices: Indices) -> None:
        self.path, self.count = Path(path), 0
        self._indices = check_indices(indices)

    def write(self, first: int, images: Tensor) -> None:
        """Adds uint8 [N, H, W, C] on the CPU, images of the next N indices.

        Args:
            first: index of the first image, as `Sampler.stream` yields it.
            images: a batch.

        Raises:
            ValueError: the batch does not follow the previous one.
        """
        indices = indices_tensor(self._indices[self.count : self.count + len(images)])
        if len(indices) < len(images) or (len(images) and int(indices[0]) != first):
            expected = int(indices[0]) if len(indices) else "no more images"
            raise ValueError(
                f"a batch of {len(images)} images from index {first}; expected {expected}"
            )
        self._write(indices.numpy(), images.numpy())
        self.count += len(images)

    def _write(self, indices: NDArray[np.int64], images: Pixels) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Writes what is still held; without any image, nothing."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()


class _Held(Sink):
    """Holds all images in memory until `close`."""

    def __init__(self, path: str | Path, indices: Indices) -> None:
        super().__init__(path, indices)
        self._batches: list[Tensor] = []

    def _write(self, indices: NDArray[np.int64], images: Pixels) -> None:
        self._batches.append(torch.from_numpy(images))

    def close(self) -> None:
        if self._batches:
            self._save(torch.cat(self._batches).numpy())

    def _save(self, images: Pixels) -> None:
        raise NotImplementedError


class GridSink(_Held):
    """One PNG file with a grid of all images."""

    def _save(self, images: Pixels) -> None:
        save_grid(self.path, images)


class ArraySink(_Held):
    """One array file. .npy: uint8 [N, H, W, C]; .npz: "images", and their "indices" int64 [N]."""

    def _save(self, images: Pixels) -> None:
        buffer = io.BytesIO()
        if self.path.suffix == ".npy":
            np.save(buffer, images)
        else:
            indices = indices_tensor(self._indices[: len(images)]).numpy()
            np.savez_compressed(buffer, images=images, indices=indices)
        write_atomically(self.path, buffer.getvalue())


class FolderSink(Sink):
    """A folder with one PNG file per image, named by its index and written as it arrives."""

    def __init__(self, path: str | Path, indices: Indices) -> None:
        super().__init__(path, indices)
        last = (
            max(self._indices[0], self._indices[-1])
            if isinstance(self._indices, range) and self._indices
            else 0
        )
        if isinstance(self._indices, Tensor) and len(self._indices):
            last = int(self._indices.max())
        self._digits = max(6, len(str(last)))

    def _write(self, indices: NDArray[np.int64], images: Pixels) -> None:
        self.path.mkdir(exist_ok=True)
        for index, image in zip(indices, images, strict=True):
            write_atomically(self.path / f"{index:0{self._digits}d}.png", encode_png(image))


def open_sink(
    path: str | Path,
    indices: Indices,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
) -> Sink:
    """The sink for a path: .png a grid, .npy or .npz an array, a name without a suffix a folder of
    PNG files.

    Grids and arrays are held in memory until `close`; a folder keeps finished images if the run is
    killed.

    Args:
        path: checked now rather than after sampling.
        indices: of the images that will be written, in this order.
        channels: of the images; checked if given.
        size: (H, W) of the images; if given with `channels`, images that memory cannot hold are
            refused.

    Raises:
        ValueError: the path cannot be written, or such images cannot be written there.
    """
    target = check_path(path)
    if target.suffix and channels is not None and size is not None:
        held = 3 * channels * math.prod(size)  # in batches, in one array, and encoded
        check_fits(len(check_indices(indices)), held, torch.device("cpu"), INSTEAD)
    if target.suffix in ARRAYS:
        return ArraySink(target, indices)
    if channels is not None and channels not in PNG_CHANNELS:
        raise ValueError(
            f"{path}: cannot write {channels}-channel images as PNG; write {' or '.join(ARRAYS)}"
        )
    return GridSink(target, indices) if target.suffix in GRIDS else FolderSink(target, indices)


def check_path(path: str | Path) -> Path:
    """A path that `open_sink` can write to. ValueError for any other."""
    text, path = str(path), Path(path)
    known = GRIDS + ARRAYS
    if not text or (text.endswith("/") and path.suffix):
        raise ValueError(f"path is {text!r}; expected the name of a file or of a directory")
    if path.suffix and path.suffix not in known and not path.is_dir():
        raise ValueError(
            f"{text}: unknown kind of file; expected {', '.join(known)}, or a directory"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"{text}: the directory {path.absolute().parent} does not exist; create it first"
        )
    if path.suffix in known and path.is_dir():
        raise ValueError(f"{text} is a directory; expected a file name")
    if not path.suffix and path.is_file():
        raise ValueError(
            f"{text} is a file; expected a directory, or a name ending in {', '.join(known)}"
        )
    writable = path if path.is_dir() else path.absolute().parent
    if not os.access(writable, os.W_OK):
        raise ValueError(f"{text}: the directory {writable} is not writable; choose another one")
    return path
