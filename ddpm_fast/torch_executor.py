"""The network on a CPU by PyTorch alone: one image per call, a thread for every core, the time embedding looked up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.ddpm_step import COLUMNS, ddpm_step_reference, x_0_reference
from .kernels.noise import REVERSE, noise_reference
from .solver import StepTable
from .time_table import TimeTable
from .unet import Level, ResBlock, UNet, channels_last

if TYPE_CHECKING:
    from .engine import State

NOISE_AT_ONCE = 2**20  # normals of several steps that are drawn in one call: as many as stay in the cache


class _Slice(nn.Module):
    """In a residual block instead of its projection: its part of the row that was looked up."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.part = slice(first, first + count)

    def forward(self, row: Tensor) -> Tensor:
        return row[:, self.part]


class TorchExecutor:
    """Plain PyTorch, channels-last. One image per call, on one thread: so its bits do not depend on what else is in the batch."""

    name = "torch"

    def __init__(self, unet: UNet, shape: tuple[int, int, int], timesteps: int, threads: int, why: str) -> None:
        self._unet = channels_last(copy.deepcopy(unet)).eval()
        blocks = [m for m in self._unet.modules() if isinstance(m, ResBlock)]
        weight, bias = (torch.cat([getattr(m.time_emb_proj, n).detach() for m in blocks]) for n in ("weight", "bias"))
        self.times = TimeTable(self._unet, weight, bias, timesteps)
        first = 0
        for m in blocks:
            count = m.time_emb_proj.out_features
            m.time_emb_proj = cast(nn.Linear, _Slice(first, count))
            first += count
        self.threads, self._shape = threads, shape
        self._pool = ThreadPoolExecutor(threads, "ddpm-fast", torch.set_num_threads, (1,))
        self.reason = f"PyTorch, one image per core on {threads} threads: {why}"

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        rows = self.times.rows(t, labels)
        parts = self._pool.map(lambda b: self._image(x[b : b + 1], rows[b][None]), range(len(x)))
        return torch.cat(list(parts)).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _image(self, x: Tensor, row: Tensor) -> Tensor:
        """As `UNet.forward`, of one image whose row is known."""
        unet = self._unet
        x = x.float().clone(memory_format=torch.channels_last)
        x = unet.conv_in(2 * x - 1 if unet.config.center_input else x)
        skips = [x]
        for level in cast("list[Level]", unet.down_blocks):
            x = level.down(x, row, skips)
        x = unet.mid_block(x, row)
        for level in cast("list[Level]", unet.up_blocks):
            x = level.up(x, row, skips)
        return unet.conv_out(F.silu(unet.conv_norm_out(x)))

    @torch.no_grad()
    def steps(self, state: State, table: StepTable) -> Iterator[int]:
        """Takes the state through the table; yields how many steps are done, after every step."""
        t, coef = table.padded(len(table) + 1)
        noise = _Noise(state, coef, len(table))
        channels = state.x.shape[1]
        for i in range(len(table)):
            out = self.forward(state.x, t[state.row.long()], state.labels)
            out = out if table.learned else out[:, :channels]
            x = ddpm_step_reference(state.x, out, noise.next(), coef, state.row, table.learned, state.x_0)
            if state.x_0 is not None:
                state.x_0.copy_(x_0_reference(state.x, out, coef, state.row))
            state.x.copy_(x)
            state.row.add_(1).clamp_(max=len(table))
            yield i + 1


class _Noise:
    """The batch's noise, drawn for several steps at once."""

    def __init__(self, state: State, coef: Tensor, steps: int) -> None:
        self._state, self._steps = state, steps
        self._any = bool(coef[:, COLUMNS.index("sigma")].any())
        self._drawn: list[Tensor] = []

    def next(self) -> Tensor:
        """z [B, C, H, W] of the step that the images are at."""
        s = self._state
        if not self._any:
            return torch.zeros((), dtype=s.x.dtype)
        if not self._drawn:
            ahead = max(1, min(self._steps - int(s.row.min()), NOISE_AT_ONCE // s.x.numel()))
            rows = (s.row[None] + torch.arange(ahead)[:, None]).clamp(max=self._steps).flatten()
            z = noise_reference(s.seed.repeat(ahead), s.image.repeat(ahead), rows, REVERSE, tuple(s.x.shape[1:]))
            self._drawn = list(z.split(len(s.x)))[::-1]
        return self._drawn.pop()
