"""Eager engine: calls any network step by step, as it is or compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..diffusion.solvers import StepTable
from ..kernels.ddpm_step import ddpm_step
from ..utils.numerics import full_fp32, relative_error
from .base import SamplingState, engine_repr, mean_of

COMPILED_ERROR = 1e-5  # allowed relative L2 difference of torch.compile from the network in fp32,
VARIATIONS = 2  # or this multiple of the network's difference between batch sizes
SMALL, LARGE = 4, 16  # images for that difference: each alone, and in one batch
COMPILED_ULPS = 64  # allowed difference in half precision, in units in the last place


class EagerEngine:
    """Engine for any network that is a function (x_t, t[, labels]) -> tensor.

    Args:
        model: The network.
        dtype: The dtype of its input x_t.
        reason: Why this engine was chosen.
        compile: Call the network compiled by torch.compile. At the first batch of each shape, the
            result is compared with that of the network.
    """

    invariant = False  # libraries choose the order of summation by batch size

    def __init__(
        self,
        model: Callable[..., Tensor],
        dtype: torch.dtype,
        reason: str = "",
        compile: bool = False,
    ) -> None:
        self.model, self.dtype, self.reason = model, dtype, reason
        self.name = "compile" if compile else "reference"
        self.call = compiled(model) if compile else model

    def __repr__(self) -> str:
        return engine_repr(self, dtype=self.dtype)

    def prepare(self, batch_size: int) -> None:
        """Does nothing: memory is allocated in every step."""

    def new_state(
        self,
        batch_size: int,
        shape: tuple[int, int, int],
        device: torch.device,
        labelled: bool,
        given_noise: bool = False,
    ) -> SamplingState:
        """See `Engine.new_state`; allocates new memory."""
        return SamplingState.empty(batch_size, shape, device, labelled, given_noise)

    def steps(
        self, state: SamplingState, table: StepTable, every_step: bool = True
    ) -> Generator[int, None, None]:
        """See `Engine.steps`; yields after every step."""
        t, coef = (v.to(state.x.device) for v in table.padded(len(table) + 1))
        if table.multistep and state.x_0 is None:
            state.x_0 = torch.zeros_like(state.x)
        for i in range(len(table)):
            with torch.inference_mode(False), torch.no_grad(), inference(self.model):
                self.step(state, t, coef, table.learned)
            yield i + 1

    def step(self, state: SamplingState, t: Tensor, coef: Tensor, learned: bool) -> None:
        """Computes x_t -> x_{t-1} of every image, at its row of the padded table, in place.

        Raises:
            ValueError: The model does not return a tensor, or changes its input.
        """
        labels = () if state.labels is None else (state.labels,)
        version, channels = state.x._version, state.x.shape[1]
        out = self.call(state.x.to(self.dtype), t[state.step_index], *labels)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"the model returned {type(out).__name__}; expected a tensor: "
                "of diffusers' networks, return `.sample`"
            )
        if state.x._version != version:
            raise ValueError("the model changed its input x_t in place; return a new tensor")
        mean = mean_of(out, channels, learned)
        index = (state.step_index, state.seed, state.image)
        ddpm_step(state.x, mean, coef, *index, learned, state.x_0, state.z)
        state.step_index.add_(1).clamp_(max=len(coef) - 1)

    def free(self) -> None:
        """Does nothing: memory is released after every step."""


def compiled(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles a network; compares it with the network at the first batch of each shape.

    The returned function raises RuntimeError if the results differ by more than rounding. In fp32
    this is a relative L2 difference of `COMPILED_ERROR`, or of `VARIATIONS` times
    `batch_variation`: for large batches, libraries may choose an algorithm whose error exceeds that
    of the compiled network.
    """
    on_gpu = isinstance(model, nn.Module) and any(p.is_cuda for p in model.parameters())
    fast = torch.compile(model, mode="reduce-overhead" if on_gpu else None)
    checked: set[torch.Size] = set()

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        out = fast(x, *rest)
        if x.shape not in checked:
            expected = model(x, *rest).double()
            error = float((out.double() - expected).norm() / expected.norm())
            allowed = (
                COMPILED_ULPS * torch.finfo(out.dtype).eps
                if out.dtype.itemsize == 2
                else COMPILED_ERROR
            )
            if not error <= allowed and out.dtype.itemsize > 2:
                allowed = max(allowed, VARIATIONS * batch_variation(model, x, *rest))
            if not error <= allowed:
                raise RuntimeError(
                    f"the relative error of torch.compile is {error:.1e}; expected at most "
                    f"{allowed:.1e}: use another engine"
                )
            checked.add(x.shape)
        return out

    return call


def batch_variation(model: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> float:
    """Relative L2 difference of a network's results between batch sizes.

    Compares the first images of a batch, up to `SMALL`, with batch size 1 and in the whole batch,
    which is repeated if it has fewer than `LARGE` images.

    Args:
        model: The network.
        x: [B, C, H, W].
        rest: Further arguments of the network, [B] each.
    """
    count, arguments = min(len(x), SMALL), (x, *rest)
    alone = [model(*(v[i : i + 1] for v in arguments)) for i in range(count)]
    if len(x) < LARGE:
        index = torch.arange(LARGE, device=x.device) % len(x)
        arguments = tuple(v[index] for v in arguments)
    return relative_error(torch.cat(alone), model(*arguments)[:count])


@contextmanager
def inference(model: Callable[..., Tensor]) -> Iterator[None]:
    """Context in which a module is in eval mode and TF32 is disabled."""
    training = model if isinstance(model, nn.Module) and model.training else None
    if training is not None:
        training.eval()
    try:
        with full_fp32():
            yield
    finally:
        if training is not None:
            training.train()
