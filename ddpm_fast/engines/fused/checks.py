"""Comparison of each launch of a plan with its fallback: the criterion, and the worker process that
applies it.

An illegal access poisons the process that made it, and a deadlock never returns. So this runs in a
worker process, which `verification` starts: it checks launch by launch and reports before each
which one runs next.

The criterion, on the first, the middle and the last image of a batch, with the output full of NaN
before:

- relative L2 error at most twice that of the same operation by plain PyTorch in the launch's own
  precision (or one unit in the last place; two of fp32)
- no pixel that is off by more than twice what plain PyTorch's worst pixel is, and one unit in the
  last place of the output's largest value: a GPU's exp and rsqrt are off by as much
- a border of exact zeros, and the same bits in a second run
- where it keeps statistics: those of what it stored, to `STATISTICS`

The truth is the fallback in fp32, or fp64 where the plan is fp32. Then the whole forward pass is
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

FORWARD = "forward"  # the name of the check of the whole network
STATISTICS = 1e-5  # relative error of statistics, which are sums of some dozens of values in fp32
FP8_FORWARD = 0.15  # relative error of an fp8 forward: plain PyTorch has none to compare with
Send = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        reason: Why it failed; empty if it passed.
        error, allowed: Relative L2 error, and its bound.
        pixel, pixel_allowed: Error of the worst pixel relative to the largest value, and its bound.
        timed_out: There was no answer in time, which may be the fault of a busy machine.
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
    """Applies the criterion to three maps of the same images; exact in fp32 or fp64, plain in the
    kernel's type.
    """
    ulp = torch.finfo(kernel.rows.dtype).eps
    if not bool((kernel.border.double() == 0).all()):
        return CheckResult("the border is not zero")
    truth = exact.pixels.double()
    errors = []
    for fm in (kernel, plain):
        off = fm.pixels.double() - truth
        errors.append(
            (
                float(off.norm() / truth.norm().clamp(min=1e-30)),
                float(off.abs().max() / truth.abs().max().clamp(min=1e-30)),
            )
        )
    (error, pixel), (plain_error, plain_pixel) = errors
    # In fp32 the mean and the scale of a norm are rounded as coarsely as its output. Either's error
    # is common to a whole group, so a few groups make the L2 error of plain PyTorch, half a unit to
    # one, a matter of luck: twice a lucky one is less than what a right kernel rounds.
    floor = 2 * ulp if kernel.rows.dtype == torch.float32 else ulp
    allowed, pixel_allowed = max(2 * plain_error, floor), 2 * plain_pixel + ulp
    reason = ""
    if not error <= allowed:
        reason = f"relative error {error:.1e}, {allowed:.1e} allowed"
    elif not pixel <= pixel_allowed:
        reason = f"worst pixel off by {pixel:.1e}, {pixel_allowed:.1e} allowed"
    return CheckResult(reason, error, allowed, pixel, pixel_allowed)


def compare_statistics(stats: FeatureMap, out: FeatureMap, tiling: Tiling) -> CheckResult:
    """Compares the means and squared deviations that a launch kept of `out` with fp64."""
    truth, errors, worst = tile_statistics(out.pixels.double(), tiling), [], []
    for computed, exact in zip(stats.grid.double().unbind(2), truth.unbind(2), strict=True):
        errors.append(float((computed - exact).norm() / exact.norm().clamp(min=1e-30)))
        worst.append(float((computed - exact).abs().max() / exact.abs().max().clamp(min=1e-30)))
    right = all(e <= STATISTICS for e in (*errors, *worst))
    reason = (
        ""
        if right
        else f"statistics: relative errors {errors[0]:.1e} and {errors[1]:.1e}, {STATISTICS:.1e} allowed"
    )
    return CheckResult(reason, max(errors), STATISTICS, max(worst), STATISTICS)


def check_launch(plan: Plan, launch: Launch) -> CheckResult:
    """Runs a launch by its kernel, twice, on what its inputs hold, and by its fallback on three
    images.
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
    """A map's or a vector's entries for some images; what is no image's stays."""
    if isinstance(value, FeatureMap) and value.images == batch:
        rows = value.rows.view(batch, -1, value.channels)[images].flatten(0, 1)
        return FeatureMap(rows, len(images), value.height, value.width, value.bordered)
    return value[images] if isinstance(value, Tensor) and value.ndim == 1 else value


def _like(fm: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    return FeatureMap.empty(
        fm.images, fm.height, fm.width, fm.channels, dtype, fm.rows.device, fm.bordered
    )


def check_noise(device: torch.device) -> CheckResult:
    """Compares noise by its kernel with the reference: bit-exact."""
    vectors = (
        torch.tensor([-1, 5], device=device),
        torch.tensor([2**40, 0], device=device),
        torch.tensor([0, 999], device=device),
    )
    z = noise.noise(*vectors, noise.X_T, 3, 33, 65)
    expected = noise.noise_reference(*vectors, noise.X_T, (3, 33, 65))
    return CheckResult(
        ""
        if torch.equal(z.view(torch.int32), expected.view(torch.int32))
        else "the noise is not the reference's"
    )


def check_ddpm_step(device: torch.device) -> CheckResult:
    """Compares one reverse step by its kernel with the reference: bit-exact, for neither fuses a
    multiplication and an addition.
    """
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
    return CheckResult("" if torch.equal(stepped, expected) else "the step is not the reference's")


def check_advance(device: torch.device) -> CheckResult:
    """Compares the step counters by their kernel with the reference: whole numbers, so equal."""
    step_index, t_of = (
        torch.arange(300, dtype=torch.int32, device=device) % 7,
        torch.arange(6, device=device) * 11,
    )
    label = torch.arange(300, device=device) % 10
    expected = advance_reference(step_index, t_of, label, 10, 1)
    t, time_row = torch.zeros_like(label), torch.zeros_like(label)
    advance(step_index, t_of, t, time_row, label, 10)
    same = all(
        torch.equal(v.long(), e) for v, e in zip((step_index, t, time_row), expected, strict=True)
    )
    return CheckResult("" if same else "the step counters are not the reference's")


STEP_CHECKS: dict[
    str, Callable[[torch.device], CheckResult]
] = {  # what a step runs in addition to the network
    "noise": check_noise,
    "ddpm_step": check_ddpm_step,
    "advance": check_advance,
}


def check_forward(network: PlannedUNet, unet: UNet) -> CheckResult:
    """Compares the whole network with the reference in fp32: at most twice the error of the
    reference in the plan's precision.
    """
    x, t, labels = inputs_of(network)
    few = sorted({0, len(x) // 2, len(x) - 1})
    inputs = (x[few], t[few], None if labels is None else labels[few])
    dtype = network.activations
    unet = unet.to(network.device)
    exact = (unet.double() if dtype == torch.float32 else unet.float())(*inputs).double()
    plain = unet.to(dtype)(*inputs)
    error, plain_error = (
        float((v.double() - exact).norm() / exact.norm())
        for v in (network(x, t, labels)[few], plain)
    )
    allowed = max(
        2 * plain_error, FP8_FORWARD if network.dtype == "fp8" else torch.finfo(dtype).eps
    )
    return CheckResult(
        "" if error <= allowed else f"relative error {error:.1e}, {allowed:.1e} allowed",
        error,
        allowed,
    )


# ---- the worker


def main() -> None:
    """The worker: runs every check of the plan that its one request describes, but for those with a
    known result.

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
            if (
                launch.name not in known
                and not _report(launch.name, partial(check_launch, plan, launch), send).passed
            ):
                failed.add(launch.name)
            plan.fallbacks = failed
            plan.run_one(launch)  # so that the next one has something to read
        if FORWARD not in known:
            _report(FORWARD, partial(check_forward, network, unet), send)


def _report(name: str, check: Callable[[], CheckResult], send: Send) -> CheckResult:
    """Runs a check and sends its result. Ends the process if no later result could be trusted."""
    send(dict(started=name))
    broken = False
    try:
        result = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        send(dict(out_of_memory=" ".join(str(error).split())))
        raise SystemExit(0) from None
    except Exception as error:  # whatever a launch does wrong counts against it
        result = CheckResult(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        broken = "CUDA" in str(error)  # an illegal access breaks this process's context
    send(dict(finished=name, result=asdict(result)))
    if broken:
        raise SystemExit(0)
    return result


def network_of(config: UNetConfig) -> UNet:
    """A network with random weights, norms and biases included, so that a fault in them shows."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for p in unet.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    return unet


def inputs_of(network: PlannedUNet) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random (x_t, t, labels) of a full batch."""
    generator = torch.Generator().manual_seed(1)
    b, c, device = network.batch_size, network.config, network.device
    x = torch.randn(b, c.in_channels, *network.size, generator=generator).to(device)
    t = torch.randint(network.timesteps, (b,), generator=generator).to(device)
    return (
        x,
        t,
        torch.randint(c.num_classes, (b,), generator=generator).to(device)
        if c.num_classes
        else None,
    )


if __name__ == "__main__":
    main()
