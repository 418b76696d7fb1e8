"""FusedUNet: the function of a `UNet`, from our own kernels. Weights are packed once; a forward pass is a fixed list of launches.

What it does differently from the reference, all of it exact but for rounding:

- the time embedding, its projections for every block and the first convolutions' biases are rows of one table
- GroupNorm, SiLU, the skip's concatenation and the time embedding's addition are one pass over memory
- bias, residual and the division by `mid_scale` ride on the convolutions
- nearest 2x and 3x3 are four 2x2 convolutions; single-head attention is folded (`kernels.attention`)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.checkpoint import load_pretrained
from ...kernels._gemm import Target
from ...kernels._triton import launches_kernel
from ...models.config import UNetConfig
from ...models.unet import UNet
from ...utils.validation import is_count
from .builder import Walk
from .calibration import Calibration, e4m3_convolutions, load_calibration
from .packing import E4M3, Network, check_tiles
from .plan import Plan, exactly
from .precompile import compile_in_parallel
from .verification import Subject, fallbacks_of, verdicts

# name -> type of the activations, type of what 3x3 convolutions multiply
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp8": (torch.bfloat16, E4M3),
}
ACCUMULATIONS = ("bounded", "unbounded")


class FusedUNet:
    """eps_theta(x_t, t) of a trained `UNet`, for batches of up to `batch_size`.

    `plan()` is the list of launches for an image size. On a GPU, or by Triton's interpreter, they run by their kernels,
    elsewhere by their fallbacks (`plan.fallbacks` says which); memory is taken once for each image size.
    """

    def __init__(
        self,
        unet: UNet,
        batch_size: int,
        dtype: str = "bf16",
        device: torch.device | str | None = None,
        size: tuple[int, int] | None = None,
        timesteps: int = 1000,
        target: Target | None = None,
        tiles: Mapping[str, Mapping[str, Any]] | None = None,
        check: bool | None = None,
        overlap: bool = False,
        calibration: Calibration | None = None,
        wide: Collection[str] = (),
        accumulation: str = "bounded",
        count_saturated: bool = False,
    ) -> None:
        """
        batch_size  the most images that one call takes
        dtype       "fp32", "fp16", "bf16", or "fp8": e4m3 operands in 3x3 convolutions, bf16 elsewhere
        device      default: where the network is; "meta" plans without memory
        size        (H, W); default: the configuration's. Images of another size are planned for when they come
        timesteps   t runs from 0 to timesteps - 1
        target      the GPU to configure launches for; default: the device's own
        tiles       overrides of launch configurations, by `fused_network.tile_key`
        overlap     launches begin while those before them finish (`kernels._launch`; sm_90 and newer), for small batches; no GPU
                    has run it yet
        check       hold every launch against its fallback before it is trusted (`self_check`); default: on a GPU

        of fp8 alone:
        calibration      this network's, of `load_calibration`: the ranges of its activations, and which convolutions stay bf16;
                         without one ranges follow from the norms' parameters, eight deviations
        wide             further convolutions that stay bf16, by name
        accumulation     "bounded": sm_90's tensor cores, which add fp8 products with fewer bits than fp32 has, hand a sum over
                         after every step; "unbounded": only at the end, which may be faster and is less exact
        count_saturated  count activations that do not fit (`saturated`): a tenth more instructions in the norms before e4m3

        ValueError for what no launch can do: channels that are no multiples of 16, e4m3 on a GPU that has none; for tiles of
        unknown launches; for a calibration of other weights; for names that are no convolutions.
        RuntimeError where the self-check cannot be made.
        """
        self.config, self.batch_size, self.timesteps = unet.config, batch_size, timesteps
        device = torch.device(device if device is not None else unet.conv_in.weight.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        target = target or Target.of(device)
        _check(self.config, batch_size, timesteps, dtype, target, overlap)
        check_tiles(tiles or {})
        _check_fp8(unet, calibration, wide, accumulation)
        self.dtype, self.device, self.target, self.tiles = dtype, device, target, tiles or {}
        self.activations, operand = DTYPES[dtype]
        self.overlap = overlap
        self.check = device.type == "cuda" if check is None else check
        size = size or self.config.size
        if size is None:
            raise ValueError("the configuration names no sample_size; give size=(height, width)")
        self.size = self._check_size(size)
        self.accumulation, self.count_saturated = accumulation, count_saturated
        units = {} if calibration is None else calibration.units
        self.wide = sorted({*wide, *(() if calibration is None else calibration.wide)})
        bounded = accumulation == "bounded"
        numerics = (units, self.wide, bounded, count_saturated)
        self._plans: dict[tuple[int, int], Plan] = {}
        with exactly(device):
            self._network = Network(unet, device, self.activations, operand, target, timesteps, self.tiles, *numerics)
            self.inputs = self._network.inputs(batch_size)
        self.plan()
        # everything is packed now: what later plans need of the network is its structure
        self._network.keep_structure(copy.deepcopy(unet).to("meta"))

    @classmethod
    def from_unet(cls, unet: UNet, batch_size: int, **options: Any) -> FusedUNet:
        """See the class."""
        return cls(unet, batch_size, **options)

    def resized(self, batch_size: int) -> FusedUNet:
        """The same packed weights for another number of images. ValueError unless it is at least 1."""
        if not is_count(batch_size):
            raise ValueError(f"batch_size = {batch_size}; expected an integer of at least 1")
        other = copy.copy(self)
        other.batch_size, other._plans = batch_size, {}
        with exactly(self.device):
            other.inputs = self._network.inputs(batch_size)
        other.plan()
        return other

    @staticmethod
    def check_config(config: UNetConfig, dtype: str, device: torch.device) -> None:
        """ValueError for what no launch on `device` can do."""
        _check(config, 1, 1, dtype, Target.of(device))

    @classmethod
    def from_pretrained(cls, directory: str | Path, batch_size: int, dtype: str = "bf16", **options: Any) -> FusedUNet:
        """From a diffusers folder; in fp8 with the folder's calibration, if it has one."""
        unet = load_pretrained(directory).unet
        if dtype == "fp8":
            options = dict(calibration=load_calibration(directory, unet)) | options
        return cls(unet, batch_size, dtype, **options)

    def plan(self, size: tuple[int, int] | None = None) -> Plan:
        """The launches for images of `size` (H, W), by default the size that was named first."""
        size = self.size if size is None else self._check_size(size)
        if size not in self._plans:
            with exactly(self.device):
                self._plans[size] = self._make_plan(size)
        return self._plans[size]

    def _make_plan(self, size: tuple[int, int]) -> Plan:
        walk = Walk(self._network, self.inputs, self.batch_size, size)
        plan = Plan(walk.launches, self.device, walk.x, walk.out, walk.given)
        plan.overlap = self.overlap
        if not (self.device.type == "meta" or launches_kernel(self.inputs.t)):
            plan.fallbacks = {launch.name for launch in plan}
        elif self.check:  # before the plan takes its memory: the child needs as much
            subject = self.subject(size, plan)
            if subject.kept() is None and self.device.type == "cuda":
                compile_in_parallel(self.config, subject.options)
            plan.fallbacks = fallbacks_of(verdicts(subject))
        return plan

    def subject(self, size: tuple[int, int], plan: Plan) -> Subject:
        """What a self-check is told of this network's plan for an image size."""
        options = dict(
            batch_size=self.batch_size,
            dtype=self.dtype,
            device=str(self.device),
            size=list(size),
            timesteps=self.timesteps,
            target=asdict(self.target),
            tiles={k: dict(v) for k, v in self.tiles.items()},
            overlap=self.overlap,
            wide=self.wide,
            accumulation=self.accumulation,
            count_saturated=self.count_saturated,
        )
        return Subject(self.config, options, [launch.name for launch in plan])

    @property
    def invariant(self) -> bool:
        """Is an image the same to the bit in every batch and place? Not where a fallback runs: libraries choose by batch size."""
        return not any(plan.fallbacks for plan in self._plans.values())

    def saturated(self, clear: bool = False) -> dict[str, int]:
        """Convolution -> how many values of its e4m3 input were clamped or NaN, in all calls so far or since they were last
        cleared; those where all fitted are not listed. All places of a batch count, filled or not. Waits for the device.

        ValueError where nothing is counted.
        """
        if not self.count_saturated:
            raise ValueError("this network was planned without count_saturated=True, so nothing was counted")
        found = self._network.saturated.tolist()
        if clear:
            self._network.saturated.zero_()
        return {name: n for name, n in zip(self._network.narrow, found, strict=True) if n}

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W] floating, t int or integer [B], labels integer [B] where there are classes ->
        fp32 [B, C_out, H, W], channels-last in memory. B is `batch_size` or less.

        ValueError for wrong shapes, and for a t or a label that is not in the table.
        """
        plan = self.load(x_t, t, labels)
        plan.run()
        return plan.maps[plan.out].pixels[: len(x_t)].clone(memory_format=torch.channels_last)

    @torch.no_grad()
    def load(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Plan:
        """Checks a call's arguments, puts them where the plan reads them, and returns that plan."""
        b, t, labels = self._check_call(x_t, t, labels)
        plan = self.plan((int(x_t.shape[2]), int(x_t.shape[3])))
        plan.maps[plan.x].pixels[:b].copy_(x_t)
        i = self.inputs
        i.t[:b], i.label[:b] = t, labels
        if i.rows_of is None:
            i.row[:b] = t * (self.config.num_classes or 1) + labels
        return plan

    def _check_size(self, size: Any) -> tuple[int, int]:
        coarsest = 2 ** (len(self.config.channels) - 1)
        if not isinstance(size, (tuple, list)) or len(size) != 2 or any(not is_count(n) or n % coarsest for n in size):
            raise ValueError(f"size {size!r}; expected (H, W), both divisible by {coarsest}")
        return int(size[0]), int(size[1])

    def _check_call(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None) -> tuple[int, Tensor, Tensor]:
        c, coarsest = self.config, 2 ** (len(self.config.channels) - 1)
        if x_t.ndim != 4 or x_t.shape[1] != c.in_channels or x_t.shape[2] % coarsest or x_t.shape[3] % coarsest:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}; expected [B, {c.in_channels}, H, W] with H and W divisible by {coarsest}"
            )
        b = len(x_t)
        if not 1 <= b <= self.batch_size:
            raise ValueError(f"{b} images at once; this network was planned for 1 to {self.batch_size}: give a larger batch_size")
        if (labels is None) != (c.num_classes is None):
            wanted = "no labels: the network is unconditional" if c.num_classes is None else f"labels [B] in 0..{c.num_classes - 1}"
            raise ValueError(f"labels {'missing' if labels is None else 'given'}; expected {wanted}")
        t = torch.as_tensor(t, device=self.device)
        found = {"t": (t.expand(b) if t.ndim == 0 else t, self.timesteps)}
        found["labels"] = (torch.zeros(b, dtype=torch.int64, device=self.device) if labels is None else labels, c.num_classes or 1)
        for name, (v, most) in found.items():
            if v.shape != (b,) or v.is_floating_point() or v.is_complex() or bool(((v < 0) | (v.long() >= most)).any()):
                seen = f"{v.min()}..{v.max()}" if v.numel() else "nothing"
                raise ValueError(f"{name} is {v.dtype} {tuple(v.shape)} of {seen}; expected integers [{b}] in 0..{most - 1}")
        return b, found["t"][0].long(), found["labels"][0].long().to(self.device)


def _check_fp8(unet: UNet, calibration: Calibration | None, wide: Collection[str], accumulation: str) -> None:
    if accumulation not in ACCUMULATIONS:
        raise ValueError(f"accumulation {accumulation!r}; expected one of {', '.join(ACCUMULATIONS)}")
    may = e4m3_convolutions(unet)
    unknown = wide if isinstance(wide, str) else [name for name in wide if name not in may]
    if unknown:
        raise ValueError(f"wide = {unknown!r}; expected a list of convolutions' names, of {', '.join(list(may)[:3])} ...")
    if calibration is not None:
        calibration.expect(unet)


def _check(c: UNetConfig, batch_size: int, timesteps: int, dtype: str, target: Target, overlap: bool = False) -> None:
    if not (is_count(batch_size) and is_count(timesteps)):
        raise ValueError(f"batch_size = {batch_size}, timesteps = {timesteps}; expected integers of at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if target.sm < 80:
        raise ValueError(f"the kernels need compute capability 8.0 or newer; this GPU has {target.sm / 10}: run the reference UNet")
    if overlap and target.sm < 90:
        raise ValueError(f"overlap needs a GPU of compute capability 9.0 or newer; this one has {target.sm / 10}")
    if dtype == "fp8" and target.sm < 89:
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or newer; this one has {target.sm / 10}: take bf16")
    odd = [n for n in c.channels if n % 16]
    if odd:
        raise ValueError(f"levels of {odd} channels; the kernels take multiples of 16: run the reference UNet")
    heads = [level.channels // level.heads for level, attends in zip(c.levels, c.attends, strict=True) if attends]
    if max(heads, default=0) > 512:
        raise ValueError(f"attention heads of {max(heads)} channels; the kernels take up to 512: run the reference UNet")
