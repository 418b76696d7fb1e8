"""Data loader of training: order, timesteps, flips and noise are functions of the seed."""

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
    """image, epoch, t int64 [B]; the word of which t was made; x_0 fp32 [B, C, H, W] in [-1, 1]; labels int64 [B] or None."""

    image: Tensor
    epoch: Tensor
    t: Tensor
    word: Tensor
    x_0: Tensor
    labels: Tensor | None


class BatchLoader:
    """Batches of a data set, number 0, 1, 2 ... of an endless run through it.

    Every epoch visits every image once, in a different order; batches run across its end. Image i in epoch e has its timestep,
    flip and noise from the Philox streams of (seed, i, e): they depend neither on the batch size nor on what was drawn before.
    Where the images fit into half of a GPU's free memory they are held there; else the next batch is fetched meanwhile.
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
        self.data, self.seed, self.batch_size, self.device = (
            data,
            seed_bits(seed),
            batch_size,
            device,
        )
        self.random_flip, self.timesteps = random_flip, timesteps
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._labels = None if data.labels is None else torch.from_numpy(data.labels).to(device)
        self._resident = self._copy_to_device()
        self._fetcher = ThreadPoolExecutor(1) if self._resident is None else None
        self._next: tuple[int, Future[tuple[Tensor, Tensor, Tensor]]] | None = None

    def batch(self, number: int) -> Batch:
        """Batch `number`."""
        image, epoch, x = self._fetched(number)
        seed = torch.full_like(image, self.seed)
        drawn = noise.words(seed, image, epoch, noise.TRAIN_T, 2)
        t = (drawn[:, 0] * self.timesteps) >> 32  # equal shares of 2^32
        x_0 = from_uint8(x)
        if self.random_flip:
            x_0 = torch.where((drawn[:, 1] >= 2**31)[:, None, None, None], x_0.flip(3), x_0)
        return Batch(image, epoch, t, drawn[:, 0], x_0, self.labels(image))

    def labels(self, image: Tensor) -> Tensor | None:
        """The classes of images [B] on the device."""
        return None if self._labels is None else self._labels[image]

    def visits(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(image, epoch) int64 [count] of the visits `first`, `first` + 1, ... of the run, on the CPU."""
        images, epochs = [], []
        while count:
            epoch, place = divmod(first, len(self.data))
            images.append(self.order(epoch)[place : place + count])
            epochs.append(torch.full_like(images[-1], epoch))
            first, count = first + len(images[-1]), count - len(images[-1])
        return torch.cat(images), torch.cat(epochs)

    def order(self, epoch: int) -> Tensor:
        """The order of one epoch: a permutation int64 [N], by sorting one random word for each image."""
        if epoch != self._epoch:
            image = torch.arange(len(self.data))
            seed, row = torch.full_like(image, self.seed), torch.full_like(image, epoch)
            self._order = noise.words(seed, image, row, noise.SHUFFLE, 1)[:, 0].argsort(stable=True)
            self._epoch = epoch
        return self._order

    # ---- from memory to the device

    def _fetched(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._fetcher is None:
            return self._fetch(number)
        fetching = (
            self._next[1]
            if self._next is not None and self._next[0] == number
            else self._fetcher.submit(self._fetch, number)
        )
        fetched = fetching.result()
        self._next = number + 1, self._fetcher.submit(self._fetch, number + 1)
        return fetched

    def _fetch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        image, epoch = self.visits(number * self.batch_size, self.batch_size)
        place = _send(image, self.device)
        x = self._resident[place] if self._resident is not None else self._copy(image)
        return place, _send(epoch, self.device), x

    def _copy(self, image: Tensor) -> Tensor:
        return _send(torch.from_numpy(self.data.images[image.numpy()]), self.device)

    def _copy_to_device(self) -> Tensor | None:
        if self.device.type == "cpu":
            return None
        if (
            self.device.type == "cuda"
            and self.data.images.nbytes > torch.cuda.mem_get_info(self.device)[0] // 2
        ):
            return None
        return torch.from_numpy(self.data.images).to(self.device)


def _send(x: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
