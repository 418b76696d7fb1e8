"""Generated images as an `IterableDataset` for PyTorch's DataLoader, sharded by image index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..sampling.request import Indices, Labels, SamplingParams, check_indices, check_labels
from ..sampling.sampler import Sampler
from ..utils.validation import integer

OUTPUTS = ("uint8", "float")


class GeneratedImages(IterableDataset):  # type: ignore[type-arg]
    """Dataset of images that a `Sampler` draws on the fly: dicts of image, index and label.

    Blocks of `batch_size` consecutive images are dealt out to all workers of all ranks, so every
    image is drawn exactly once, and it is the image that `Sampler.sample` draws. Start workers with
    `multiprocessing_context="spawn"`. With a GPU use `num_workers=0`.

    Args:
        sampler: Draws the images.
        indices: A count (images 0 ... N-1), or a range or list of image indices.
        params: Seed, solver, steps ...; default: those of `Sampler.sample`.
        labels: One class, or one per image; default: each image draws its class.
        batch_size: Images per block, which are drawn together.
        output: "uint8": image is uint8 [H, W, C]; "float": fp32 [C, H, W] in [-1, 1].
        shard: False yields all images in every rank. Hugging Face Accelerate needs it: its data
            loader iterates the dataset in rank 0 only and distributes the batches.
        rank, world_size: Of this process; default: those of torch.distributed if it is initialized,
            else the environment variables RANK and WORLD_SIZE, else 0 of 1.
        drop_uneven: Leave out the last blocks that not every rank gets, and the last incomplete
            block, so that all ranks see the same number of images. DistributedDataParallel waits
            forever otherwise.

    `state_dict` and `load_state_dict` hold the position, for the StatefulDataLoader of torchdata;
    resume with the same arguments, ranks and workers.

    Raises:
        ValueError: An argument is invalid; at iteration, a sampler on a GPU in a worker process.
    """

    def __init__(
        self,
        sampler: Sampler,
        indices: Indices,
        params: SamplingParams | None = None,
        *,
        labels: Labels = None,
        batch_size: int = 64,
        output: str = "uint8",
        shard: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        drop_uneven: bool = False,
    ) -> None:
        self.sampler, self.params = sampler, params or SamplingParams()
        self.indices = check_indices(indices)
        classes = check_labels(labels, len(self.indices), sampler.num_classes)
        self.labels = None if classes is None else classes.clone()
        self.batch_size = integer("batch_size", batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size belong together; give both or neither")
        self.output, self.shard, self.drop_uneven = output, shard, drop_uneven
        self.rank, self.world_size = rank, world_size
        self.process()
        sampler.table(self.params)  # refuses invalid parameters here
        self._position = 0  # images that this worker has yielded

    def process(self) -> tuple[int, int]:
        """(rank, world size) that the images are divided among.

        Raises:
            ValueError: They contradict each other.
        """
        if not self.shard:
            return 0, 1
        rank, world = self.rank, self.world_size
        if rank is None or world is None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            else:
                texts = [os.environ.get(name, default) for name, default in _ENVIRONMENT]
                if not all(text.isdigit() for text in texts):
                    raise ValueError(f"RANK and WORLD_SIZE are {texts}; expected integers")
                rank, world = (int(text) for text in texts)
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world_size {world}; expected 0..{world - 1}")
        return rank, world

    def _share(self) -> range:
        """The blocks of this worker."""
        rank, world = self.process()
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        total = len(self.indices)
        blocks = -(-total // self.batch_size)
        if self.drop_uneven:
            blocks = total // self.batch_size // world * world
        return range(rank + world * worker, blocks, world * workers)

    def __len__(self) -> int:
        """Images of this rank, over all its workers."""
        rank, world = self.process()
        total, size = len(self.indices), self.batch_size
        blocks = total // size // world * world if self.drop_uneven else -(-total // size)
        return sum(min(size, total - size * block) for block in range(rank, blocks, world))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None and self.sampler.device.type != "cpu":
            raise ValueError(
                f"the sampler is on {self.sampler.device} in a worker process; "
                "use DataLoader(num_workers=0) with a GPU"
            )
        position, self._position = self._position, 0  # a next epoch starts at the beginning
        done = 0
        for block in self._share():
            first = block * self.batch_size
            count = min(self.batch_size, len(self.indices) - first)
            if done + count <= position:
                done += count
                continue
            for row in self._block(first, count, max(position - done, 0)):
                done += 1
                self._position = done
                yield row
            position = done
        self._position = 0

    def _block(self, first: int, count: int, skip: int) -> Iterator[dict[str, Any]]:
        indices = self.indices[first : first + count]
        labels = None if self.labels is None else self.labels[first : first + count]
        images: Tensor = self.sampler.sample(
            indices, self.params, labels=labels, batch_size=count, output=self.output
        )
        if labels is None and self.sampler.num_classes is not None:
            labels = self.sampler.labels(indices, self.params.seed)
        for i in range(skip, count):
            row: dict[str, Any] = dict(image=images[i], index=int(indices[i]))
            yield row if labels is None else row | dict(label=int(labels[i]))

    def state_dict(self) -> dict[str, int]:
        """The number of images that this worker has yielded in the current epoch."""
        return dict(position=self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration continue at a position of `state_dict`."""
        position = integer("position", state["position"])
        if position < 0:
            raise ValueError(f"position is {position}; expected at least 0")
        self._position = position


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"))
