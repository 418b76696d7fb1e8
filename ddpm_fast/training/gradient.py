"""Parts of a gradient computation: inputs, precision, repeatable dropout, split over CPU cores."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.unet import UNet
from .config import TrainConfig

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_SMALLEST_PART = 8  # images per thread; with fewer, a thread costs more than it saves


class Noised(NamedTuple):
    """A noised batch: the arguments of `Objective.losses`, the labels and the losses' weights."""

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    row: Tensor
    seed: Tensor
    image: Tensor
    labels: Tensor | None
    weight: Tensor | None


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """Autocast context of the network for a configuration; a null context for fp32."""
    dtype = AUTOCAST[config.mixed_precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def dropout_rng(unet: UNet, seed: int, number: int) -> Iterator[None]:
    """Seeds torch's generator, which only dropout uses, for batch `number` and restores it."""
    if not unet.config.dropout:
        yield
        return
    device = next(unet.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + number) % 2**63)
        yield


def split_over_cores(
    unet: UNet, config: TrainConfig, device: torch.device
) -> tuple[int, ThreadPoolExecutor | None]:
    """Number of equal parts of a batch and the threads for them; (1, None) without a split."""
    threads, batch = torch.get_num_threads(), config.train_batch_size
    counts = [n for n in range(1, threads + 1) if batch % n == 0 and batch // n >= _SMALLEST_PART]
    parts = max(counts, default=1)
    if device.type != "cpu" or parts == 1 or unet.config.dropout or config.compile:
        return 1, None
    return parts, ThreadPoolExecutor(
        parts, initializer=torch.set_num_threads, initargs=(threads // parts,)
    )


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory.

    Mapping and zeroing every activation again takes a tenth of the time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 2**26)
