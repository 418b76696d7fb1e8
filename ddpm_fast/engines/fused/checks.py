"""Each launch of a plan held against its fallback: the rule, and the process that applies it.

An illegal access poisons the process that made it, and a deadlock never returns. So this runs as a process of its own (`verdicts`
starts it), judges launch by launch, and says before each which it is about to run.

What a launch must show, on the first, the middle and the last image of a batch, its output full of NaN before:

- relative L2 error at most twice that of the same operation by plain PyTorch in the launch's own precision
  (or one unit in the last place)
- no pixel that is off by more than twice what plain PyTorch's worst pixel is, and one unit in the last place of the output's
  largest value: a GPU's exp and rsqrt are off by as much
- a border of exact zeros, and the same bits in a second run
- where it keeps statistics: those of what it stored, to `STATISTICS`

The truth is the fallback in fp32, or fp64 where the plan is fp32. Then the whole forward is held against the reference network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import noise
from ...kernels._feature_map import FeatureMap
from ...kernels._gemm import Target
from ...kernels._tile_statistics import Tiling, tile_statistics
from ...kernels.ddpm_step import COLUMNS, ddpm_step, ddpm_step_reference
from ...kernels.step_index import advance, advance_reference
from ...models.config import UNetConfig
from ...models.unet import UNet
from .plan import Launch, Plan

if TYPE_CHECKING:
    from .unet import FusedUNet

STEP_LAUNCHES = ("noise", "ddpm_step", "advance")  # what a step runs besides the network
FORWARD = "forward"
LATE = "no answer "  # how the reason begins where a time limit ran out
STATISTICS = 1e-5  # relative error of statistics, which are sums of some dozens of values in fp32
FP8_FORWARD = 0.15  # relative error of an fp8 forward: plain PyTorch has none to compare with


@dataclass(frozen=True)
class Verdict:
    """reason: empty where the launch passed. error, allowed: relative L2; pixel, pixel_allowed: the worst pixel's, relative to the
    largest value.
    """

    reason: str = ""
    error: float = 0.0
    allowed: float = 0.0
    pixel: float = 0.0
    pixel_allowed: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.reason

    @property
    def late(self) -> bool:
        return self.reason.startswith(LATE)


# ---- one launch


def judge(kernel: FeatureMap, exact: FeatureMap, plain: FeatureMap) -> Verdict:
    """The rule above, for three maps of the same images; exact in fp32 or fp64, plain in the kernel's type."""
    ulp = torch.finfo(kernel.rows.dtype).eps
    if not bool((kernel.border.double() == 0).all()):
        return Verdict("the border is not zero")
    truth = exact.pixels.double()
    errors = []
    for fm in (kernel, plain):
        off = fm.pixels.double() - truth
        errors.append(
            (float(off.norm() / truth.norm().clamp(min=1e-30)), float(off.abs().max() / truth.abs().max().clamp(min=1e-30)))
        )
    (error, pixel), (plain_error, plain_pixel) = errors
    allowed, pixel_allowed = max(2 * plain_error, ulp), 2 * plain_pixel + ulp
    reason = ""
    if not error <= allowed:
        reason = f"relative error {error:.1e}, {allowed:.1e} allowed"
    elif not pixel <= pixel_allowed:
        reason = f"worst pixel off by {pixel:.1e}, {pixel_allowed:.1e} allowed"
    return Verdict(reason, error, allowed, pixel, pixel_allowed)


def judge_statistics(stats: FeatureMap, out: FeatureMap, tiling: Tiling) -> Verdict:
    """Means and squared deviations that a launch kept of `out`, each against fp64."""
    truth, errors, worst = tile_statistics(out.pixels.double(), tiling), [], []
    for found, exact in zip(stats.grid.double().unbind(2), truth.unbind(2), strict=True):
        errors.append(float((found - exact).norm() / exact.norm().clamp(min=1e-30)))
        worst.append(float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-30)))
    right = all(e <= STATISTICS for e in (*errors, *worst))
    reason = "" if right else f"statistics: relative errors {errors[0]:.1e} and {errors[1]:.1e}, {STATISTICS:.1e} allowed"
    return Verdict(reason, max(errors), STATISTICS, max(worst), STATISTICS)


def check_launch(plan: Plan, launch: Launch) -> Verdict:
    """Runs a launch by its kernel, twice, on what its inputs hold, and by its fallback on three images."""
    arguments, out = plan.arguments(launch), plan.maps[launch.out]
    outputs = {name: plan.maps[b] for name, b in launch.writes.items() if name != "scratch"}
    images = sorted({0, out.images // 2, out.images - 1})
    some = {k: _of_images(v, images, out.images) for k, v in arguments.items()}
    truth_type = torch.float64 if out.rows.dtype == torch.float32 and not _is_half(plan) else torch.float32
    exact = _like(some["out"], truth_type)
    launch.op.fallback(**(some | {"out": exact}), compute=truth_type)
    plain = _like(some["out"], out.rows.dtype)
    launch.op.fallback(**(some | {"out": plain}), compute=None)
    bits = [fm.rows.view(torch.uint8) for fm in outputs.values()]
    before = bits
    for _ in range(2):
        before = [b.clone() for b in bits]
        for b in bits:
            b.fill_(0xFF)  # NaN in every type
        launch.op.run(**arguments)
    if not all(torch.equal(first, second) for first, second in zip(before, bits, strict=True)):
        return Verdict("two runs differ")
    written = {name: _of_images(fm, images, out.images) for name, fm in outputs.items()}
    verdict = judge(written["out"], exact, plain)
    if verdict.passed and "stats" in written:
        kept = judge_statistics(written["stats"], written["out"], launch.op.tiling(out))  # type: ignore[attr-defined]
        return verdict if kept.passed else kept
    return verdict


def _is_half(plan: Plan) -> bool:
    return any(b.dtype.itemsize < 4 for b in plan.maps)


def _of_images(value: Any, images: list[int], batch: int) -> Any:
    """A map's or a vector's entries for some images; what is no image's stays."""
    if isinstance(value, FeatureMap) and value.images == batch:
        rows = value.rows.view(batch, -1, value.channels)[images].flatten(0, 1)
        return FeatureMap(rows, len(images), value.height, value.width, value.bordered)
    return value[images] if isinstance(value, Tensor) and value.ndim == 1 else value


def _like(fm: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    return FeatureMap.empty(fm.images, fm.height, fm.width, fm.channels, dtype, fm.rows.device, fm.bordered)


def check_noise(device: torch.device) -> Verdict:
    """Noise by its kernel against the reference, to the bit."""
    vectors = (torch.tensor([-1, 5], device=device), torch.tensor([2**40, 0], device=device), torch.tensor([0, 999], device=device))
    got = noise.noise(*vectors, noise.X_T, 3, 33, 65)
    want = noise.noise_reference(*vectors, noise.X_T, (3, 33, 65))
    return Verdict("" if torch.equal(got.view(torch.int32), want.view(torch.int32)) else "the noise is not the reference's")


def check_ddpm_step(device: torch.device) -> Verdict:
    """One reverse step by its kernel against the reference, to the bit: neither fuses a multiplication with an addition."""
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 2, 3, 16, 16, generator=generator).to(device)
    table = torch.rand(4, len(COLUMNS), generator=generator).to(device)
    row, seed, image = (torch.tensor(v, device=device) for v in ([1, 3], [7, -7], [0, 2**33]))
    z = noise.noise_reference(seed, image, row, noise.REVERSE, (3, 16, 16))
    want = ddpm_step_reference(x, out, z, table, row)
    got = x.clone()
    ddpm_step(got, out, table, row, seed, image)
    return Verdict("" if torch.equal(got, want) else "the step is not the reference's")


def check_advance(device: torch.device) -> Verdict:
    """The step counters by their kernel against the reference: whole numbers, so equal."""
    row, t_of = torch.arange(300, dtype=torch.int32, device=device) % 7, torch.arange(6, device=device) * 11
    label = torch.arange(300, device=device) % 10
    want = advance_reference(row, t_of, label, 10, 1)
    t, entry = torch.zeros_like(label), torch.zeros_like(label)
    advance(row, t_of, t, entry, label, 10)
    same = all(torch.equal(got.long(), v) for got, v in zip((row, t, entry), want, strict=True))
    return Verdict("" if same else "the step counters are not the reference's")


# ---- the child


def main(lines: IO[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Judges every launch of the plan that the first line describes, but for those that it lists as known."""
    from .unet import FusedUNet

    spec = json.loads(lines.readline())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    unet, known = network_of(config_of(spec["config"])), spec["known"]
    fused = FusedUNet(unet, check=False, **(spec["options"] | dict(target=Target(**spec["options"]["target"]))))
    plan = fused.plan()
    device, failed = fused.device, {name for name, passed in known.items() if not passed}
    plan.poison()
    fused.load(*inputs_of(fused))
    others = {"noise": check_noise, "ddpm_step": check_ddpm_step, "advance": check_advance}
    with torch.no_grad():
        for name in STEP_LAUNCHES:
            if name not in known:
                _judge(name, partial(others[name], device), say)
        for launch in plan:
            if launch.name not in known and not _judge(launch.name, partial(check_launch, plan, launch), say).passed:
                failed.add(launch.name)
            plan.fallbacks = failed
            plan.run_one(launch)  # so that the next one has something to read
        if FORWARD not in known:
            _judge(FORWARD, partial(check_forward, fused, unet), say)


def _judge(name: str, check: Callable[[], Verdict], say: Callable[[dict[str, Any]], None]) -> Verdict:
    say(dict(begin=name))
    try:
        verdict = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        say(dict(memory=" ".join(str(error).split())))
        raise SystemExit(0) from None
    except Exception as error:  # whatever a launch does wrong counts against it
        verdict = Verdict(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        say(dict(done=name, verdict=asdict(verdict)))
        if "CUDA" in str(error):  # after an illegal access nothing in this process can be believed
            raise SystemExit(0) from None
        return verdict
    say(dict(done=name, verdict=asdict(verdict)))
    return verdict


def check_forward(fused: FusedUNet, unet: UNet) -> Verdict:
    """The whole network, against the reference in fp32: at most twice as far off as the reference in the plan's own precision."""
    x, t, labels = inputs_of(fused)
    few = sorted({0, len(x) // 2, len(x) - 1})
    inputs = (x[few], t[few], None if labels is None else labels[few])
    own = fused.activations
    unet = unet.to(fused.device)
    exact = (unet.double() if own == torch.float32 else unet.float())(*inputs).double()
    plain = unet.to(own)(*inputs)
    error, other = (float((v.double() - exact).norm() / exact.norm()) for v in (fused(x, t, labels)[few], plain))
    allowed = max(2 * other, FP8_FORWARD if fused.dtype == "fp8" else torch.finfo(own).eps)
    return Verdict("" if error <= allowed else f"relative error {error:.1e}, {allowed:.1e} allowed", error, allowed)


def config_of(fields: Mapping[str, Any]) -> UNetConfig:
    """A configuration that came as JSON."""
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return UNetConfig(**arguments)


def network_of(config: UNetConfig) -> UNet:
    """A network with random weights: norms and biases too, so that a fault in them shows."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for p in unet.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    return unet


def inputs_of(fused: FusedUNet) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    b, c = fused.batch_size, fused.config
    x = torch.randn(b, c.in_channels, *fused.size, generator=generator).to(fused.device)
    t = torch.randint(fused.timesteps, (b,), generator=generator).to(fused.device)
    return x, t, torch.randint(c.num_classes, (b,), generator=generator).to(fused.device) if c.num_classes else None


if __name__ == "__main__":
    main(sys.stdin, lambda message: print(json.dumps(message), flush=True))
