"""Cost of a forward pass, counted on the meta device."""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from .config import UNetConfig
from .unet import UNet


@dataclass(frozen=True)
class Cost:
    """Cost per image and forward pass, in fp32.

    Attributes:
        parameters: Number of parameters.
        flops: FLOPs of convolutions, matrix products and attention; a multiply-add is 2.
        weight_bytes: Size of the parameters.
        activation_bytes: Peak of the eager forward pass.
    """

    parameters: int
    flops: int
    weight_bytes: int
    activation_bytes: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class _PeakMemory(TorchDispatchMode):
    """Counts the bytes of live storages, by finalizers."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            id(t.untyped_storage())
            for t in tree_iter((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in tree_iter(result):
            if (
                isinstance(t, torch.Tensor)
                and id(storage := t.untyped_storage()) not in known | self._seen
            ):
                self._seen.add(id(storage))
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.alive -= nbytes


@torch.no_grad()
def unet_cost(config: UNetConfig, size: tuple[int, int] | None = None) -> Cost:
    """Returns the cost of one image of `size` (H, W); default: the configuration's size.

    Raises:
        ValueError: There is no size.
    """
    size = size or config.size
    if size is None:
        raise ValueError("the configuration names no sample_size; give size=(height, width)")
    with torch.device("meta"):
        unet = UNet(config).eval()
        x, t = torch.empty(1, config.in_channels, *size), torch.zeros(1, dtype=torch.int64)
        labels = None if config.num_classes is None else torch.zeros(1, dtype=torch.int64)
    parameters = sum(p.numel() for p in unet.parameters())
    # the counter does not support every fused attention kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(x, t, labels)
    with _PeakMemory() as memory:
        unet(x, t, labels)
    return Cost(parameters, counter.get_total_flops(), 4 * parameters, memory.peak)
