"""Elementwise kernels and plain PyTorch on the same tensors: `bench_kernels.py`, `bench.gpu`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.losses import target_table
from ddpm_fast.diffusion.presets import EXACT
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.ddpm_step import ddpm_step, ddpm_step_reference
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_gradient, noise_mse_reference
from ddpm_fast.kernels.q_sample import q_sample, q_sample_reference
from ddpm_fast.utils.numerics import relative_error

TOLERANCE = 1e-6  # relative error against the references
SHAPES = [(2048, 3, 128, 128), (32768, 3, 32, 32)]  # larger than any cache
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# operation -> (call, fewest bytes to read and write per element)
Calls = dict[str, tuple[Callable[[], object], int]]
CACHE = 64 * 2**20  # bytes: more than the last-level cache of current GPUs and CPUs


class Implementation(Enum):
    KERNEL = "kernel"
    PLAIN = "plain PyTorch"
    COMPILED = "torch.compile"


@dataclass(frozen=True)
class Case:
    """call: one operation over all images; bytes: fewest bytes to read and write."""

    operation: str
    by: Implementation
    call: Callable[[], object]
    bytes: int

    @property
    def name(self) -> str:
        return (
            self.operation
            if self.by is Implementation.KERNEL
            else f"{self.operation}, {self.by.value}"
        )


class Elementwise:
    """Tensors of one shape, layout and dtype.

    Calls cycle through enough sets of operands that no operand is in a cache.

    Raises:
        AssertionError: A kernel differs from its reference, so nothing may be timed.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: torch.memory_format,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        b = shape[0]
        self.shape, self.dtype, self.device = shape, dtype, device
        self.image = torch.arange(b, device=device)
        self.seed = torch.zeros(b, dtype=torch.int64, device=device)
        self.row = torch.zeros(b, dtype=torch.int32, device=device)
        self.t = torch.full((b,), 500, device=device)
        schedule = NoiseSchedule.linear()
        table = EXACT.table(schedule, "ddpm", choose_timesteps(1000, None))
        self.table = table.padded(len(table) + 1)[1].to(device)
        self.coef = schedule.q_sample_table(device)
        self.target = target_table(schedule, "eps", device)
        self.elements = elements = b * shape[1] * shape[2] * shape[3]
        sets = min(16, 1 + 4 * CACHE // (4 * elements)) if elements > 2**16 else 1

        def tensors(kind: torch.dtype) -> itertools.cycle[Tensor]:
            sets_of_one = [
                torch.randn(shape, device=device).to(kind).contiguous(memory_format=layout)
                for _ in range(sets)
            ]
            return itertools.cycle(sets_of_one)

        self.sets = sets
        self.x, self.out, self.x_0, self.eps, self.old = map(
            tensors, (torch.float32, dtype, dtype, torch.float32, torch.float32)
        )
        self.error = self._error()
        if not self.error <= TOLERANCE:
            raise AssertionError(
                f"kernels differ from their references by {self.error:.1e}: nothing timed"
            )

    def _error(self) -> float:
        """Largest relative error of the kernels, on two images."""
        few, chw = slice(0, 2), self.shape[1:]
        seed, image, row, t = (v[few] for v in (self.seed, self.image, self.row, self.t))
        x, out, x_0 = next(self.x)[few], next(self.out)[few], next(self.x_0)[few]
        z = N.noise_reference(seed, image, row, N.Q_SAMPLE, chw)
        errors = [
            relative_error(
                q_sample(x_0, self.coef, t, row, seed, image),
                q_sample_reference(x_0, z, self.coef, t),
            )
        ]
        expected = noise_mse_reference(out, z, None, self.target, t)
        errors.append(
            relative_error(noise_mse(out, None, self.target, t, row, seed, image), expected)
        )
        expected = ddpm_step_reference(
            x, out, N.noise_reference(seed, image, row, N.REVERSE, chw), self.table, row
        )
        x_next = x.clone(memory_format=torch.preserve_format)
        ddpm_step(x_next, out, self.table, row, seed, image)
        return max(*errors, relative_error(x_next, expected))

    def cases(self) -> list[Case]:
        """The kernels and plain PyTorch, whose loss reads stored noise."""
        c, h, w = self.shape[1:]
        item, index = self.dtype.itemsize, (self.row, self.seed, self.image)
        ones = torch.ones(self.shape[0], device=self.device)
        calls: Calls = {
            "noise": (lambda: N.noise(self.seed, self.image, self.row, N.X_T, c, h, w), 4),
            "q_sample": (lambda: q_sample(next(self.x_0), self.coef, self.t, *index), 4 + item),
            "ddpm_step": (
                lambda: ddpm_step(next(self.x), next(self.out), self.table, *index),
                8 + item,
            ),
            "ddpm_step, history": (
                lambda: ddpm_step(
                    next(self.x), next(self.out), self.table, *index, False, next(self.old)
                ),
                16 + item,
            ),
            "noise_mse": (
                lambda: noise_mse(next(self.out), None, self.target, self.t, *index),
                item,
            ),
            "noise_mse gradient": (
                lambda: noise_mse_gradient(ones, next(self.out), None, self.target, self.t, *index),
                2 * item,
            ),
        }
        return self._cases(Implementation.KERNEL, calls) + self._cases(
            Implementation.PLAIN, self._plain()
        )

    def compiled(self) -> list[Case]:
        """Plain PyTorch by torch.compile, compiled at the first call."""
        return self._cases(Implementation.COMPILED, self._plain(torch.compile))

    def _cases(self, by: Implementation, calls: Calls) -> list[Case]:
        return [
            Case(operation, by, call, size * self.elements)
            for operation, (call, size) in calls.items()
        ]

    def _plain(self, wrap: Callable[..., Callable[..., Tensor]] = lambda f: f) -> Calls:
        signal, sigma = (float(v) for v in self.coef[500])
        c0, c1, clip, m0, m1, _, _, s, *_ = (float(v) for v in self.table[500])
        item = self.dtype.itemsize
        forward = wrap(lambda x_0: x_0 * signal + torch.randn_like(x_0) * sigma)
        reverse = wrap(
            lambda x, out: (
                m0 * (c0 * x + c1 * out).clamp(-clip, clip) + m1 * x + s * torch.randn_like(x)
            )
        )
        loss = wrap(lambda out, eps: (out.float() - eps).square().mean((1, 2, 3)))
        return {
            "q_sample": (lambda: forward(next(self.x_0)), 4 + item),
            "ddpm_step": (lambda: reverse(next(self.x), next(self.out)), 8 + item),
            # reads the noise that q_sample stored
            "noise_mse": (lambda: loss(next(self.out), next(self.eps)), item + 4),
        }
