"""What takes a batch of images through a step table, and which of them a sampler takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..diffusion.solvers import StepTable
from ..kernels import _triton
from ..kernels.ddpm_step import ddpm_step
from ..models.unet import UNet, channels_last
from ..utils.numerics import full_fp32

if TYPE_CHECKING:
    from .fused.calibration import Calibration

ENGINES = ("auto", "fused", "compile", "cpu", "reference")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass
class State:
    """A batch on its way: everything a step reads and writes, on the device."""

    x: Tensor  # [B, C, H, W] fp32, channels-last
    row: Tensor  # [B] int32, each image's own place in the step table
    seed: Tensor  # [B] int64, the seed's 64 bits
    image: Tensor  # [B] int64
    labels: Tensor | None  # [B] int64
    x_0: Tensor | None = None  # like x: what the last step took x_0 to be, if that is kept


class Engine(Protocol):
    """name        as in `ENGINES`
    reason      a line for people: why this one
    invariant   does it give an image the same bits in every batch?
    """

    name: str
    reason: str

    @property
    def invariant(self) -> bool: ...

    def prepare(self, images: int) -> None:
        """Gets ready for batches of up to `images`."""
        ...

    def steps(self, state: State, table: StepTable, watched: bool = True) -> Generator[int, None, None]:
        """Takes the state through the table in place and yields how many steps are done: after every step where somebody watches,
        else as often as it likes. An image whose row is behind the table's last rests.

        Nothing here waits for the device. After the last step the state's tensors are the caller's.
        """
        ...

    def free(self) -> None:
        """Gives back what it holds on the device; it takes it anew when it is needed."""
        ...


class ModelEngine:
    """Any network, called step by step: the reference, or torch.compile of it."""

    invariant = False  # libraries choose their order of summation by the batch

    def __init__(self, model: Callable[..., Tensor], dtype: torch.dtype, name: str = "reference", reason: str = "") -> None:
        self.model, self.dtype, self.name, self.reason = model, dtype, name, reason
        self.call = model if name == "reference" else _compiled(model)

    def prepare(self, images: int) -> None:
        pass

    def steps(self, state: State, table: StepTable, watched: bool = True) -> Generator[int, None, None]:
        t, coef = (v.to(state.x.device) for v in table.padded(len(table) + 1))
        if table.multistep and state.x_0 is None:
            state.x_0 = torch.zeros_like(state.x)
        for i in range(len(table)):
            with torch.inference_mode(False), torch.no_grad(), inference(self.model):
                self.step(state, t, coef, table.learned)
            yield i + 1

    def step(self, state: State, t: Tensor, coef: Tensor, learned: bool) -> None:
        """x_t -> x_{t-1} for every image at its own row of the padded table; nothing here looks at a device value from the host."""
        labels = () if state.labels is None else (state.labels,)
        version, channels = state.x._version, state.x.shape[1]
        out = self.call(state.x.to(self.dtype), t[state.row], *labels)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"the model returned {type(out).__name__}; expected a tensor: for diffusers' networks, `.sample` of it"
            )
        if state.x._version != version:
            raise ValueError("the model changed its input x_t in place; let it return a new tensor")
        ddpm_step(state.x, mean_of(out, channels, learned), coef, state.row, state.seed, state.image, learned, state.x_0)
        state.row.add_(1).clamp_(max=len(coef) - 1)

    def free(self) -> None:
        pass


def mean_of(out: Tensor, channels: int, learned: bool) -> Tensor:
    """A network that predicts its variance, under a solver that sets its own: the first half of its channels."""
    return out[:, :channels] if not learned and out.shape[1] == 2 * channels else out


def _compiled(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of the network, held against the network itself at its first batch."""
    on_gpu = isinstance(model, nn.Module) and any(p.is_cuda for p in model.parameters())
    fast = torch.compile(model, mode="reduce-overhead" if on_gpu else None)
    checked: set[torch.Size] = set()

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        out = fast(x, *rest)
        if x.shape not in checked:
            want = model(x, *rest).double()
            error = float((out.double() - want).norm() / want.norm())
            allowed = 64 * torch.finfo(out.dtype).eps if out.dtype.itemsize == 2 else 1e-5
            if not error <= allowed:
                raise RuntimeError(f"torch.compile gives another result, off by {error:.1e}; take another engine")
            checked.add(x.shape)
        return out

    return call


@contextmanager
def inference(model: Callable[..., Tensor]) -> Iterator[None]:
    """A module in eval mode, and fp32 that is fp32."""
    training = model if isinstance(model, nn.Module) and model.training else None
    if training is not None:
        training.eval()
    try:
        with full_fp32():
            yield
    finally:
        if training is not None:
            training.train()


# ---- which one


@dataclass(frozen=True)
class Wanted:
    """What a sampler knows of itself when it chooses."""

    model: Callable[..., Tensor]
    shape: tuple[int, int, int]
    precision: str
    device: torch.device
    timesteps: int
    calibration: Calibration | None = None  # of fp8 layers


def choose(name: str, wanted: Wanted) -> Engine:
    """The engine of that name; for "auto" the fastest that is known to be right here. ValueError where it cannot be had."""
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}; expected one of {', '.join(ENGINES)}")
    if name != "auto":
        return _MAKERS[name](wanted, "as asked for")
    model, device, precision = wanted.model, wanted.device.type, wanted.precision
    if not isinstance(model, UNet):
        return _model(wanted, "the network is none of ours")
    if device == "cuda":
        if precision == "fp32":
            return _model(wanted, "in fp32 the library's convolutions are the faster ones; take bf16, fp16 or fp8")
        if not _triton.PRESENT:
            return _model(wanted, "Triton is not installed")
        return _or_model("fused", wanted, f"{precision} on a GPU")
    if device == "cpu" and precision == "fp32":
        return _or_model("cpu", wanted, "fp32 on a CPU")
    return _model(wanted, f"{precision} on {device}")


def _or_model(name: str, wanted: Wanted, reason: str) -> Engine:
    try:
        return _MAKERS[name](wanted, reason)
    except ValueError as error:
        return _model(wanted, str(error))


def _model(wanted: Wanted, reason: str, name: str = "reference") -> Engine:
    model, dtype = wanted.model, PRECISIONS[wanted.precision]
    if wanted.precision == "fp8":
        raise ValueError(f"fp8 is for our own kernels, and they cannot be had: {reason}")
    if isinstance(model, UNet) and model.dtype != dtype and model.dtype != torch.float64:
        model = channels_last(copy.deepcopy(model).to(dtype))
    return ModelEngine(model, dtype, name, reason)


def _fused(wanted: Wanted, reason: str) -> Engine:
    from .fused.engine import FusedEngine

    if not isinstance(wanted.model, UNet):
        raise ValueError(f"engine 'fused' takes a UNet; this model is {type(wanted.model).__name__}: take 'compile' or 'reference'")
    w = wanted
    return FusedEngine(wanted.model, w.shape, w.precision, w.device, w.timesteps, reason, calibration=w.calibration)


def _cpu(wanted: Wanted, reason: str) -> Engine:
    from .cpu.engine import CPUEngine

    if not isinstance(wanted.model, UNet) or wanted.device.type != "cpu" or wanted.precision != "fp32":
        raise ValueError(f"engine 'cpu' takes a UNet in fp32 on a CPU; this is {wanted.precision} on {wanted.device}")
    return CPUEngine(wanted.model, wanted.shape, wanted.timesteps)


_MAKERS: dict[str, Any] = {
    "fused": _fused,
    "cpu": _cpu,
    "compile": lambda wanted, reason: _model(wanted, reason, "compile"),
    "reference": _model,
}
