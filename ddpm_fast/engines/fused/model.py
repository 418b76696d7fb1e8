"""Planned UNet: a `UNet` as a fixed list of kernel launches over packed weights.

Differences from the reference, all exact except for rounding:

- the time embedding, its projections in all blocks and the biases of the first convolutions are
  rows of one table
- GroupNorm, SiLU, concatenation of the skip and addition of the time embedding are one pass
- bias, residual and the division by `mid_scale` are part of the convolutions
- nearest 2x and 3x3 are four 2x2 convolutions; single-head attention is folded
  (`kernels.attention`)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels._gemm import Target
from ...kernels._triton import launches_kernel
from ...models.config import UNetConfig
from ...models.unet import UNet
from ...utils.validation import is_count
from ..base import DTYPES, dtype_name
from .builder import PlanBuilder
from .calibration import Calibration
from .packing import PackedUNet, check_tiles
from .plan import Plan, exactly
from .requirements import check_fp8, check_network


class PlannedUNet:
    """Computes eps_theta(x_t, t) of a `UNet` by kernels, which only `FusedUNet` verifies.

    `plan()` is the list of launches for an image size. On a GPU, or by Triton's interpreter,
    launches run by their kernels; otherwise by their fallbacks (`plan.fallbacks`). Memory is
    allocated once per image size.

    Args:
        unet: The network. Its weights are copied.
        batch_size: Largest number of images per call.
        dtype: "fp32", "fp16", "bf16" (or the torch dtype), or "fp8": e4m3 operands in 3x3
            convolutions, bf16 elsewhere.
        device: Default: the network's; "meta" plans without memory.
        size: (H, W); default: the configuration's. Other sizes are planned at their first call.
        timesteps: t runs from 0 to timesteps - 1.
        target: GPU that launches are configured for; default: the device.
        tiles: Overrides of launch configurations, by `packing.tile_key`.
        overlap: Launches start while the previous ones finish (`kernels._launch`; sm_90 and newer),
            for small batches. Not yet run on a GPU.
        calibration: For fp8, the network's calibration (`load_calibration`): activation ranges, and
            the convolutions that stay in bf16. Default: ranges of eight deviations, computed from
            the norms' parameters.
        keep_bf16: For fp8, names of further convolutions that stay in bf16.
        accumulation: For fp8. Tensor cores of sm_90 add fp8 products with fewer bits than fp32.
            "bounded": each K step's sum is added in fp32; "unbounded": only the total, which may be
            faster and is less accurate.
        count_saturated: For fp8, count activations outside the range (`saturated`). This adds a
            tenth to the instructions of norms before e4m3.

    Raises:
        ValueError: The kernels do not support the channels or, in e4m3, the GPU. Or tiles name
            unknown launches, the calibration is of other weights, or `keep_bf16` contains a name
            that is not a convolution's.
    """

    def __init__(
        self,
        unet: UNet,
        batch_size: int,
        dtype: str | torch.dtype = "bf16",
        device: torch.device | str | None = None,
        size: tuple[int, int] | None = None,
        timesteps: int = 1000,
        *,
        target: Target | None = None,
        tiles: Mapping[str, Mapping[str, Any]] | None = None,
        overlap: bool = False,
        calibration: Calibration | None = None,
        keep_bf16: Collection[str] = (),
        accumulation: str = "bounded",
        count_saturated: bool = False,
    ) -> None:
        self.config, self.batch_size, self.timesteps = unet.config, batch_size, timesteps
        device = torch.device(device if device is not None else unet.conv_in.weight.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        target = target or Target.of(device)
        dtype = dtype_name(dtype)
        check_network(self.config, batch_size, timesteps, dtype, target, overlap)
        check_tiles(tiles or {})
        check_fp8(unet, calibration, keep_bf16, accumulation)
        self.dtype, self.device, self.target, self.tiles = dtype, device, target, tiles or {}
        self.activations, operands = DTYPES[dtype]
        self.overlap = overlap
        size = size or self.config.size
        if size is None:
            raise ValueError("sample_size is None in the configuration; give size=(height, width)")
        self.size = self._check_size(size)
        self.accumulation, self.count_saturated = accumulation, count_saturated
        self.keep_bf16 = sorted(
            {*keep_bf16, *(() if calibration is None else calibration.keep_bf16)}
        )
        self._plans: dict[tuple[int, int], Plan] = {}
        with exactly(device):
            self._packed = PackedUNet(
                unet,
                device,
                self.activations,
                operands,
                target,
                timesteps,
                self.tiles,
                units={} if calibration is None else calibration.units,
                keep_bf16=self.keep_bf16,
                bounded=accumulation == "bounded",
                count_saturated=count_saturated,
            )
            self.inputs = self._packed.inputs(batch_size)
        self.plan()
        # all weights are packed: later plans read the structure of the network only
        self._packed.keep_structure(copy.deepcopy(unet).to("meta"))

    def resized(self, batch_size: int) -> PlannedUNet:
        """Returns a network for another batch size, with the same packed weights.

        Raises:
            ValueError: The batch size is not an integer of at least 1.
        """
        if not is_count(batch_size):
            raise ValueError(f"batch_size = {batch_size}; expected an integer of at least 1")
        other = copy.copy(self)
        other.batch_size, other._plans = batch_size, {}
        with exactly(self.device):
            other.inputs = self._packed.inputs(batch_size)
        other.plan()
        return other

    @staticmethod
    def check_config(config: UNetConfig, dtype: str | torch.dtype, device: torch.device) -> None:
        """Raises ValueError if the kernels do not support the network or the device."""
        check_network(config, 1, 1, dtype_name(dtype), Target.of(device))

    def plan(self, size: tuple[int, int] | None = None) -> Plan:
        """Returns the launches for images of `size` (H, W), by default `self.size`."""
        size = self.size if size is None else self._check_size(size)
        if size not in self._plans:
            with exactly(self.device):
                self._plans[size] = self._make_plan(size)
        return self._plans[size]

    def _make_plan(self, size: tuple[int, int]) -> Plan:
        builder = PlanBuilder(self._packed, self.inputs, self.batch_size, size)
        plan = Plan(builder.launches, self.device, builder.x, builder.out, builder.external)
        plan.overlap = self.overlap
        if self.device.type != "meta" and not launches_kernel(self.inputs.t):
            plan.fallbacks = {launch.name for launch in plan}
        return plan

    def spec(self, size: tuple[int, int] | None = None, plan: Plan | None = None) -> PlanSpec:
        """Returns the description of a plan, by default of the plan for `self.size`."""
        options = dict(
            batch_size=self.batch_size,
            dtype=self.dtype,
            device=str(self.device),
            size=list(size or self.size),
            timesteps=self.timesteps,
            target=asdict(self.target),
            tiles={k: dict(v) for k, v in self.tiles.items()},
            overlap=self.overlap,
            keep_bf16=self.keep_bf16,
            accumulation=self.accumulation,
            count_saturated=self.count_saturated,
        )
        return PlanSpec(self.config, options, [launch.name for launch in plan or self.plan(size)])

    @property
    def invariant(self) -> bool:
        """Whether an image has the same bits in every batch. False if a launch runs by its
        fallback, because libraries choose algorithms by batch size.
        """
        return not any(plan.fallbacks for plan in self._plans.values())

    def saturated(self, clear: bool = False) -> dict[str, int]:
        """Convolution -> number of values of its e4m3 input that were clamped or NaN.

        Counts accumulate until a call with `clear`, and include unused images of a batch. Zero
        counts are not listed. Waits for the device.

        Raises:
            ValueError: The network was constructed without `count_saturated`.
        """
        if not self.count_saturated:
            raise ValueError("nothing was counted; construct the network with count_saturated=True")
        counts = self._packed.saturated.tolist()
        if clear:
            self._packed.saturated.zero_()
        return {
            name: n for name, n in zip(self._packed.e4m3_convolutions, counts, strict=True) if n
        }

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Computes the network's output.

        Args:
            x_t: [B, C, H, W] floating, B at most `batch_size`.
            t: int, or integer [B].
            labels: Integer [B] if the network has classes.

        Returns:
            [B, C_out, H, W] fp32, channels-last.

        Raises:
            ValueError: A shape is wrong, or a t or label out of range.
        """
        plan = self.load(x_t, t, labels)
        plan.run()
        return plan.maps[plan.out].pixels[: len(x_t)].clone(memory_format=torch.channels_last)

    @torch.no_grad()
    def load(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Plan:
        """Validates a call's arguments, copies them to the plan's inputs, and returns the plan."""
        t = torch.as_tensor(t, device=self.device)
        t = t.expand(x_t.shape[:1]) if t.ndim == 0 else t
        self.config.check_call(x_t, labels, t, self.timesteps)
        b = len(x_t)
        if not 1 <= b <= self.batch_size:
            raise ValueError(
                f"x_t has {b} images; expected 1 to {self.batch_size}: "
                "give a larger batch_size at construction"
            )
        plan = self.plan((int(x_t.shape[2]), int(x_t.shape[3])))
        plan.maps[plan.x].pixels[:b].copy_(x_t)
        i = self.inputs
        i.t[:b], i.label[:b] = t, 0 if labels is None else labels
        if i.time_rows is None:
            i.time_row[:b] = i.t[:b] * (self.config.num_classes or 1) + i.label[:b]
        return plan

    def _check_size(self, size: Any) -> tuple[int, int]:
        coarsest = 2 ** (len(self.config.channels) - 1)
        if (
            not isinstance(size, (tuple, list))
            or len(size) != 2
            or any(not is_count(n) or n % coarsest for n in size)
        ):
            raise ValueError(f"size is {size!r}; expected (H, W), both divisible by {coarsest}")
        return int(size[0]), int(size[1])


@dataclass(frozen=True)
class PlanSpec:
    """Description of a plan as JSON values, from which another process builds the same plan.

    Attributes:
        config: Configuration of the network.
        options: Options of `PlannedUNet`.
        launches: Names of the plan's launches.
    """

    config: UNetConfig
    options: Mapping[str, Any]
    launches: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return dict(
            config=asdict(self.config), options=dict(self.options), launches=list(self.launches)
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PlanSpec:
        config: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields["config"].items()
        }
        return cls(UNetConfig(**config), fields["options"], fields["launches"])

    @property
    def target(self) -> Target:
        return Target(**self.options["target"])

    def network(self, unet: UNet, **changes: Any) -> PlannedUNet:
        """Returns the network with the weights of `unet`; `changes` override options."""
        return PlannedUNet(unet, **(dict(self.options) | dict(target=self.target) | changes))
