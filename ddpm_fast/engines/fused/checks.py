"""Comparison of each launch of a plan with its fallback, in a worker process.

After an illegal access a process cannot use the GPU, and a deadlock never returns. So the checks
run in a worker process of `verification`, which reports the name of each launch before it runs.

The criterion, for the first, middle and last image of a batch, with outputs filled with NaN before:

- the relative L2 error is at most twice that of plain PyTorch in the launch's precision, or one
  unit in the last place (two in fp32)
- the error of the worst pixel is at most twice that of plain PyTorch plus one unit in the last
  place of the output's largest value, which is the error of a GPU's exp and rsqrt
- the border is exactly zero, and a second run gives the same bits
- statistics that the launch keeps are those of its output, within `STATISTICS`

The truth is the fallback in fp32, or in fp64 for a plan in fp32. Finally the whole forward pass is
compared with the reference network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import noise
from ...kernels._feature_map import FeatureMap
from ...kernels._tile_statistics import Tiling, tile_statistics
from ...kernels.ddpm_step import COLUMNS, ddpm_step, ddpm_step_reference
from ...kernels.step_index import advance, advance_reference
from ...models.config import UNetConfig
from ...models.unet import UNet
from ...utils.subprocess import json_stdio
from .model import PlannedUNet, PlanSpec
from .plan import Launch, Plan

FORWARD = "forward"  # name of the check of the whole network
STATISTICS = 1e-5  # allowed relative error of statistics, which are sums of dozens of fp32 values
FP8_FORWARD = 0.15  # allowed relative error of an fp8 forward pass, which plain PyTorch lacks
Send = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        reason: Why it failed; empty if it passed.
        error, allowed: Relative L2 error, and its bound.
        pixel, pixel_allowed: Error of the worst pixel relative to the largest value, and its bound.
        timed_out: Whether the check timed out, possibly because the machine was busy.
    """

    reason: str = ""
    error: float = 0.0
    allowed: float = 0.0
    pixel: float = 0.0
    pixel_allowed: float = 0.0
    timed_out: bool = False

    @property
    def passed(self) -> bool:
        return not self.reason


# ---- one launch


def compare(kernel: FeatureMap, exact: FeatureMap, plain: FeatureMap) -> CheckResult:
    """Applies the criterion to three maps of the same images: by the kernel, exact in fp32 or fp64,
    and by plain PyTorch in the kernel's dtype.
    """
    ulp = torch.finfo(kernel.rows.dtype).eps
    if not bool((kernel.border.double() == 0).all()):
        return CheckResult("the border is not zero")
    truth = exact.pixels.double()
    error, pixel = _errors(kernel.pixels.double(), truth)
    plain_error, plain_pixel = _errors(plain.pixels.double(), truth)
    # In fp32, mean and scale of a norm are rounded as coarsely as its output, and an error is
    # common to a whole group. With few groups, the L2 error of plain PyTorch may be less than half
    # that of a correct kernel by chance.
    floor = 2 * ulp if kernel.rows.dtype == torch.float32 else ulp
    allowed, pixel_allowed = max(2 * plain_error, floor), 2 * plain_pixel + ulp
    reason = ""
    if not error <= allowed:
        reason = f"relative error {error:.1e}, {allowed:.1e} allowed"
    elif not pixel <= pixel_allowed:
        reason = f"worst pixel off by {pixel:.1e}, {pixel_allowed:.1e} allowed"
    return CheckResult(reason, error, allowed, pixel, pixel_allowed)


def _errors(computed: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative L2 error, and largest error relative to the largest value."""
    off = computed - exact
    return (
        float(off.norm() / exact.norm().clamp(min=1e-30)),
        float(off.abs().max() / exact.abs().max().clamp(min=1e-30)),
    )


def compare_statistics(stats: FeatureMap, out: FeatureMap, tiling: Tiling) -> CheckResult:
    """Compares the means and squared deviations of `out` that a launch kept with fp64."""
    truth = tile_statistics(out.pixels.double(), tiling)
    pairs = zip(stats.grid.double().unbind(2), truth.unbind(2), strict=True)
    errors, worst = zip(*(_errors(computed, exact) for computed, exact in pairs), strict=True)
    reason = ""
    if not all(e <= STATISTICS for e in (*errors, *worst)):
        shown = " and ".join(f"{e:.1e}" for e in errors)
        reason = f"statistics: relative errors {shown}, {STATISTICS:.1e} allowed"
    return CheckResult(reason, max(errors), STATISTICS, max(worst), STATISTICS)


def check_launch(plan: Plan, launch: Launch) -> CheckResult:
    """Runs a launch twice by its kernel on its current inputs, and by its fallback on three images,
    and compares the results.
    """
    arguments, out = plan.arguments(launch), plan.maps[launch.out]
    outputs = {name: plan.maps[b] for name, b in launch.writes.items() if name != "scratch"}
    images = sorted({0, out.images // 2, out.images - 1})
    some = {k: _of_images(v, images, out.images) for k, v in arguments.items()}
    truth_type = (
        torch.float64 if out.rows.dtype == torch.float32 and not _is_half(plan) else torch.float32
    )
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
        return CheckResult("two runs differ")
    written = {name: _of_images(fm, images, out.images) for name, fm in outputs.items()}
    result = compare(written["out"], exact, plain)
    if result.passed and "stats" in written:
        of_stats = compare_statistics(written["stats"], written["out"], launch.op.tiling(out))  # type: ignore[attr-defined]
        return result if of_stats.passed else of_stats
    return result


def _is_half(plan: Plan) -> bool:
    return any(b.dtype.itemsize < 4 for b in plan.maps)


def _of_images(value: Any, images: list[int], batch: int) -> Any:
    """Entries of a map or vector for some images; other values are returned as they are."""
    if isinstance(value, FeatureMap) and value.images == batch:
        rows = value.rows.view(batch, -1, value.channels)[images].flatten(0, 1)
        return FeatureMap(rows, len(images), value.height, value.width, value.bordered)
    return value[images] if isinstance(value, Tensor) and value.ndim == 1 else value


def _like(fm: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    return FeatureMap.empty(
        fm.images, fm.height, fm.width, fm.channels, dtype, fm.rows.device, fm.bordered
    )


def check_noise(device: torch.device) -> CheckResult:
    """Compares the noise kernel with its reference, bit-exactly."""
    vectors = (
        torch.tensor([-1, 5], device=device),
        torch.tensor([2**40, 0], device=device),
        torch.tensor([0, 999], device=device),
    )
    z = noise.noise(*vectors, noise.X_T, 3, 33, 65)
    expected = noise.noise_reference(*vectors, noise.X_T, (3, 33, 65))
    same = torch.equal(z.view(torch.int32), expected.view(torch.int32))
    return CheckResult("" if same else "the noise differs from the reference")


def check_ddpm_step(device: torch.device) -> CheckResult:
    """Compares a reverse step by the kernel with its reference, bit-exactly: neither uses fma."""
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 2, 3, 16, 16, generator=generator).to(device)
    table = torch.rand(4, len(COLUMNS), generator=generator).to(device)
    step_index, seed, image = (
        torch.tensor(v, device=device) for v in ([1, 3], [7, -7], [0, 2**33])
    )
    z = noise.noise_reference(seed, image, step_index, noise.REVERSE, (3, 16, 16))
    expected = ddpm_step_reference(x, out, z, table, step_index)
    stepped = x.clone()
    ddpm_step(stepped, out, table, step_index, seed, image)
    same = torch.equal(stepped, expected)
    return CheckResult("" if same else "the step differs from the reference")


def check_advance(device: torch.device) -> CheckResult:
    """Compares the step counters by the kernel with the reference."""
    step_index = torch.arange(300, dtype=torch.int32, device=device) % 7
    t_of = torch.arange(6, device=device) * 11
    label = torch.arange(300, device=device) % 10
    expected = advance_reference(step_index, t_of, label, 10, 1)
    t, time_row = torch.zeros_like(label), torch.zeros_like(label)
    advance(step_index, t_of, t, time_row, label, 10)
    same = all(
        torch.equal(v.long(), e) for v, e in zip((step_index, t, time_row), expected, strict=True)
    )
    return CheckResult("" if same else "the step counters differ from the reference")


Check = Callable[[torch.device], CheckResult]
# kernels that a step runs in addition to the network
STEP_CHECKS: dict[str, Check] = dict(
    noise=check_noise, ddpm_step=check_ddpm_step, advance=check_advance
)


def check_forward(network: PlannedUNet, unet: UNet) -> CheckResult:
    """Compares the whole network with the reference in fp32, or fp64 for fp32: the error is at most
    twice that of the reference in the network's dtype.
    """
    x, t, labels = inputs_of(network)
    some = sorted({0, len(x) // 2, len(x) - 1})
    inputs = (x[some], t[some], None if labels is None else labels[some])
    dtype = network.activations
    unet = unet.to(network.device)
    exact = (unet.double() if dtype == torch.float32 else unet.float())(*inputs).double()
    plain = unet.to(dtype)(*inputs)
    error, plain_error = (
        float((v.double() - exact).norm() / exact.norm())
        for v in (network(x, t, labels)[some], plain)
    )
    floor = FP8_FORWARD if network.dtype == "fp8" else torch.finfo(dtype).eps
    allowed = max(2 * plain_error, floor)
    reason = "" if error <= allowed else f"relative error {error:.1e}, {allowed:.1e} allowed"
    return CheckResult(reason, error, allowed)


# ---- the worker


def main() -> None:
    """Entry point of a worker: runs the checks of a plan whose results are not known.

    Request: {"spec": of `PlanSpec`, "passed": {check: bool} of the known results}.
    Messages: {"started": check}, {"finished": check, "result": of `CheckResult`}, {"out_of_memory":
    reason}.
    """
    requests, send = json_stdio()
    request = next(requests)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spec, known = PlanSpec.from_json(request["spec"]), request["passed"]
    unet = network_of(spec.config)
    network = spec.network(unet)
    plan = network.plan()
    failed = {name for name, passed in known.items() if not passed}
    plan.poison()
    network.load(*inputs_of(network))
    with torch.no_grad():
        for name, check in STEP_CHECKS.items():
            if name not in known:
                _report(name, partial(check, network.device), send)
        for launch in plan:
            if launch.name not in known:
                result = _report(launch.name, partial(check_launch, plan, launch), send)
                if not result.passed:
                    failed.add(launch.name)
            plan.fallbacks = failed
            plan.run_one(launch)  # writes the inputs of the next launches
        if FORWARD not in known:
            _report(FORWARD, partial(check_forward, network, unet), send)


def _report(name: str, check: Callable[[], CheckResult], send: Send) -> CheckResult:
    """Runs a check and sends its result. Ends the process if it cannot use the GPU any more."""
    send(dict(started=name))
    try:
        result = check()
        _synchronize()
    except torch.OutOfMemoryError as error:
        send(dict(out_of_memory=" ".join(str(error).split())))
        raise SystemExit(0) from None
    except Exception as error:  # any error counts as a failure of the launch
        result = CheckResult(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    send(dict(finished=name, result=asdict(result)))
    try:
        _synchronize()  # raises again after an illegal access
    except RuntimeError:
        raise SystemExit(0) from None
    return result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def network_of(config: UNetConfig) -> UNet:
    """Returns a network with random weights, including norms and biases."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for p in unet.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    return unet


def inputs_of(network: PlannedUNet) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns random (x_t, t, labels) of a full batch."""
    generator = torch.Generator().manual_seed(1)
    b, c, device = network.batch_size, network.config, network.device
    x = torch.randn(b, c.in_channels, *network.size, generator=generator).to(device)
    t = torch.randint(network.timesteps, (b,), generator=generator).to(device)
    if not c.num_classes:
        return x, t, None
    return x, t, torch.randint(c.num_classes, (b,), generator=generator).to(device)


if __name__ == "__main__":
    main()
