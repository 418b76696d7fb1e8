"""Data loader of training; order, timesteps and flips are functions of the seed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.datasets import ImageData
from ..data.pixels import from_uint8
from ..kernels import noise
from ..utils.validation import seed_bits


class Batch(NamedTuple):
    """One batch of training images, on the device.

    Attributes:
        image: Index of each image, int64 [B].
        epoch: Epoch of each image, int64 [B].
        t: Timesteps, int64 [B].
        word: The 32-bit random words that t was computed from, int64 [B].
        x_0: Images in [-1, 1], fp32 [B, C, H, W].
        labels: Classes, int64 [B], or None.
    """

    image: Tensor
    epoch: Tensor
    t: Tensor
    word: Tensor
    x_0: Tensor
    labels: Tensor | None


class BatchLoader:
    """Data loader with random access to batch 0, 1, 2, ... of an endless sequence.

    Every epoch visits every image once, in a different order; a batch may span two epochs. The
    timestep, flip and noise of image i in epoch e come from the Philox streams of (seed, i, e) and
    depend neither on the batch size nor on earlier draws.

    The images stay on the GPU if they fit into half of its free memory. Otherwise the next batch is
    copied there while the device computes.

    Args:
        data: The images.
        seed: 0 to 2^64 - 1.
        batch_size: Images per batch.
        device: Device of the batches.
        random_flip: Mirrors half of the images.
        timesteps: T; t is drawn uniformly from 0 to T - 1.
    """

    def __init__(
        self,
        data: ImageData,
        seed: int,
        batch_size: int,
        device: torch.device,
        random_flip: bool = False,
        timesteps: int = 1000,
    ) -> None:
        self.data, self.seed = data, seed_bits(seed)
        self.batch_size, self.device = batch_size, device
        self.random_flip, self.timesteps = random_flip, timesteps
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._labels = None if data.labels is None else torch.from_numpy(data.labels).to(device)
        self._resident = self._copy_to_device()
        self._fetcher = ThreadPoolExecutor(1) if self._resident is None else None
        self._next: tuple[int, Future[tuple[Tensor, Tensor, Tensor]]] | None = None

    def batch(self, number: int) -> Batch:
        """Returns batch `number`."""
        image, epoch, x = self._fetched(number)
        seed = torch.full_like(image, self.seed)
        drawn = noise.words(seed, image, epoch, noise.TRAIN_T, 2)
        t = (drawn[:, 0] * self.timesteps) >> 32  # equal shares of 2^32
        x_0 = from_uint8(x)
        if self.random_flip:
            x_0 = torch.where((drawn[:, 1] >= 2**31)[:, None, None, None], x_0.flip(3), x_0)
        return Batch(image, epoch, t, drawn[:, 0], x_0, self.labels(image))

    def labels(self, image: Tensor) -> Tensor | None:
        """Classes of the images [B] on the device; None without labels."""
        return None if self._labels is None else self._labels[image]

    def visits(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(image, epoch), int64 [count] on the CPU, of `count` visits from number `first` on."""
        images, epochs = [], []
        while count:
            epoch, offset = divmod(first, len(self.data))
            images.append(self.order(epoch)[offset : offset + count])
            epochs.append(torch.full_like(images[-1], epoch))
            first, count = first + len(images[-1]), count - len(images[-1])
        return torch.cat(images), torch.cat(epochs)

    def order(self, epoch: int) -> Tensor:
        """Order of an epoch: the permutation int64 [N] that sorts one random word per image."""
        if epoch != self._epoch:
            image = torch.arange(len(self.data))
            seed, row = torch.full_like(image, self.seed), torch.full_like(image, epoch)
            self._order = noise.words(seed, image, row, noise.SHUFFLE, 1)[:, 0].argsort(stable=True)
            self._epoch = epoch
        return self._order

    # ---- copies to the device

    def _fetched(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._fetcher is None:
            return self._fetch(number)
        if self._next is not None and self._next[0] == number:
            fetched = self._next[1].result()
        else:
            fetched = self._fetcher.submit(self._fetch, number).result()
        self._next = number + 1, self._fetcher.submit(self._fetch, number + 1)
        return fetched

    def _fetch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        image, epoch = self.visits(number * self.batch_size, self.batch_size)
        index = _send(image, self.device)
        x = self._resident[index] if self._resident is not None else self._copy(image)
        return index, _send(epoch, self.device), x

    def _copy(self, image: Tensor) -> Tensor:
        return _send(torch.from_numpy(self.data.images[image.numpy()]), self.device)

    def _copy_to_device(self) -> Tensor | None:
        if self.device.type == "cpu":
            return None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.data.images.nbytes > free // 2:
                return None
        return torch.from_numpy(self.data.images).to(self.device)


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
