"""ddpm-fast info and collect-env: a checkpoint, its cost, its plan; the cache; the environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from ..checkpoints.checkpoint import Checkpoint, load_pretrained
from ..engines.base import DTYPES
from ..engines.fused.calibration import Calibration, load_calibration
from ..engines.fused.checks import CheckResult
from ..engines.fused.model import PlannedUNet
from ..engines.fused.plan import Buffer, Launch
from ..engines.fused.roofline import GPUS, Estimate, Gpu, estimate
from ..engines.fused.verification import cached_results
from ..kernels._gemm import Target
from ..models.flops import unet_cost
from ..utils.cache import cache_dir, cached_files, clear_cache
from ..utils.environment import environment
from .common import PATH, megabytes, parse_size, print_report

HEADER = (
    "launch",
    "kernel",
    "input",
    "output",
    "operands",
    "tile",
    "GFLOP",
    "MB",
    "floor us",
    "predicted",
    "bound by",
)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
}


@click.command()
@click.argument("directory", type=PATH, required=False)
@click.option(
    "--plan", "planned", is_flag=True, help="Print every kernel launch with its cost and its bound."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=256, show_default=True, help="With --plan."
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="bf16",
    show_default=True,
    help="With --plan.",
)
@click.option("--size", help="With --plan: HEIGHTxWIDTH in pixels.  [default: as trained]")
@click.option(
    "--gpu",
    type=click.Choice(list(GPUS)),
    default="h100",
    show_default=True,
    help="With --plan: the GPU to predict for.",
)
@click.option(
    "--cache", is_flag=True, help="Print the contents of the cache folder ($DDPM_FAST_CACHE)."
)
@click.option("--clear", is_flag=True, help="With --cache: remove them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(
    directory: Path | None,
    planned: bool,
    batch_size: int,
    dtype: str,
    size: str | None,
    gpu: str,
    cache: bool,
    clear: bool,
    as_json: bool,
) -> None:
    """Describe a checkpoint and its cost."""
    if clear and not cache:
        raise ValueError("--clear goes with --cache")
    context = click.get_current_context()
    for name in ("batch_size", "dtype", "size", "gpu"):
        if not planned and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ValueError(f"--{name.replace('_', '-')} goes with --plan")
    if cache:
        _cache(clear, as_json)
        return
    if directory is None:
        raise ValueError("give the directory of a checkpoint, or --cache")
    checkpoint = load_pretrained(directory)
    if planned:
        calibration = load_calibration(directory, checkpoint.unet) if dtype == "fp8" else None
        _plan(checkpoint, batch_size, dtype, parse_size(size), GPUS[gpu], calibration, as_json)
    else:
        _describe(directory, checkpoint, as_json)


@click.command("collect-env")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def collect_env(as_json: bool) -> None:
    """Print environment information for bug reports."""
    report = environment()
    width = max(map(len, report))
    lines = [
        f"{name:{width}}  {value if value not in (None, []) else 'none'}"
        for name, value in report.items()
    ]
    print_report(report, as_json, "\n".join(lines))


def _cache(clear: bool, as_json: bool) -> None:
    files = cached_files()
    size = sum(p.stat().st_size for p in files)
    report = dict(
        directory=str(cache_dir()),
        files=[str(p.relative_to(cache_dir())) for p in files],
        bytes=size,
        cleared=clear,
    )
    if clear:
        clear_cache()
    text = f"{cache_dir()}: {len(files)} files, {megabytes(size)}{', removed' if clear else ''}"
    print_report(report, as_json, text)


def _describe(directory: Path, c: Checkpoint, as_json: bool) -> None:
    config, schedule = c.unet.config, c.schedule
    cost = unet_cost(config, config.size or (32, 32))
    report = dict(
        directory=str(directory),
        config={k: v for k, v in config.to_diffusers().items() if not k.startswith("_")},
        timesteps=len(schedule),
        beta=[float(schedule.beta[0]), float(schedule.beta[-1])],
        prediction=c.prediction,
        variance=c.variance,
        clip=c.clip,
        **cost.as_dict(),
    )
    h, w = config.size or (32, 32)
    classes = f", {config.num_classes} classes" if config.num_classes else ""
    lines = [
        f"{directory}",
        f"  images      {config.in_channels} x {h} x {w}{'' if config.size else ' assumed, none is recorded'}{classes}",
        f"  network     widths {config.channels}, {config.levels_of('layers')} residual blocks, {_where(config.attends)}",
        f"  predicts    {c.prediction}, variance {c.variance}, x_0 clipped to {c.clip}",
        f"  schedule    {len(schedule)} steps, beta {schedule.beta[0]:.3g} to {schedule.beta[-1]:.3g}",
        f"  parameters  {cost.parameters:,} ({megabytes(cost.weight_bytes)} in fp32)",
        f"  per image   {cost.flops / 1e9:.3f} GFLOP a step, {megabytes(cost.activation_bytes)} of activations at the peak in fp32",
    ]
    print_report(report, as_json, "\n".join(lines))


def _where(flags: Any) -> str:
    return (
        "attention on " + ", ".join(f"level {i}" for i, f in enumerate(flags) if f)
        if any(flags)
        else "no attention"
    )


# ---- the plan


def _plan(
    c: Checkpoint,
    batch: int,
    dtype: str,
    size: tuple[int, int] | None,
    gpu: Gpu,
    calibration: Calibration | None,
    as_json: bool,
) -> None:
    """Planned on the meta device for the GPU that was named; the check results are this machine's, if it has any."""
    steps = len(c.schedule)
    fused = PlannedUNet(
        c.unet.to("meta"),
        batch,
        dtype,
        "meta",
        size,
        steps,
        target=gpu.target,
        calibration=calibration,
    )
    plan = fused.plan()
    estimates = [estimate(launch, gpu) for launch in plan]
    results = _cached_results(fused)
    rows = [
        _row(launch, e, results.get(launch.name), fused.keep_bf16)
        for launch, e in zip(plan, estimates, strict=True)
    ]
    floor, predicted = sum(e.floor for e in estimates), sum(e.predicted for e in estimates)
    flops, moved = sum(e.flops for e in estimates), sum(e.bytes for e in estimates)
    totals = dict(
        gpu=gpu.name,
        batch_size=batch,
        dtype=dtype,
        size=list(fused.size),
        launches=len(plan),
        gflop_per_image=round(flops / batch / 1e9, 3),
        bytes_per_forward=moved,
        arena_bytes=plan.arena.size,
        floor_ms=round(1e3 * floor, 4),
        predicted_ms=round(1e3 * predicted, 4),
        checks=_summary_of(results),
    )
    if dtype == "fp8":
        totals["calibrated"], totals["keep_bf16"] = calibration is not None, fused.keep_bf16
    lines = [_columns(*HEADER), *map(_line, rows), ""]
    lines += _about_fp8(fused, calibration) if dtype == "fp8" else []
    lines += [
        f"{len(plan)} launches, {totals['gflop_per_image']} GFLOP and {moved / batch / 1e6:.1f} MB an image (weights included), "
        f"arena {megabytes(plan.arena.size)}; self-check: {totals['checks']}",
        f"{gpu.name}, batch {batch}, {dtype}: no faster than {1e3 * floor:.3f} ms; "
        f"predicted {1e3 * predicted:.3f} ms a forward pass, {batch / predicted:,.0f} images a second and step"
        + (
            ""
            if gpu.measured
            else " (nothing was measured on this GPU: an H100's shares of its peaks)"
        ),
    ]
    print_report(dict(**totals, plan=rows), as_json, "\n".join(lines))


def _cached_results(fused: PlannedUNet) -> dict[str, CheckResult]:
    if not torch.cuda.is_available():
        return {}
    spec = fused.spec()
    options = dict(spec.options) | dict(device="cuda", target=vars(Target.of(torch.device("cuda"))))
    return cached_results(replace(spec, options=options)) or {}


def _about_fp8(fused: PlannedUNet, calibration: Calibration | None) -> list[str]:
    """Where the units come from, which layers stay in bf16, and why."""
    narrow = sum(_operands(launch) == "e4m3" for launch in fused.plan())
    if calibration is None:
        return [
            f"{narrow} convolutions in e4m3, with ranges by rule: ddpm-fast calibrate would look at the activations themselves"
        ]
    lines = [
        f"{narrow} convolutions in e4m3, with ranges as calibrated, {len(fused.keep_bf16) or 'none'} kept in bf16"
    ]
    errors = ((name, calibration.layers[name].error) for name in fused.keep_bf16)
    return lines + [
        f"  {name} stays bf16: off by {error:.4f} in e4m3, {calibration.allowed:.4f} allowed"
        for name, error in errors
    ]


def _row(
    launch: Launch, e: Estimate, result: CheckResult | None, keep_bf16: list[str]
) -> dict[str, Any]:
    t = getattr(launch.op, "tiles", None)
    first = launch.reads.get("x") or launch.reads.get("qkv") or launch.out
    second = launch.reads.get("x2")
    return dict(
        launch=launch.name,
        kernel=launch.op.name,
        reads=_shape(first) + (f"+{second.channels}" if second is not None else ""),
        writes=_shape(launch.out),
        operands=_operands(launch),
        keep_bf16=launch.name in keep_bf16,
        tile=None if t is None else f"{t.block_m}x{t.block_n}x{t.block_k} w{t.warps}",
        flops=e.flops,
        bytes=e.bytes,
        floor_us=round(1e6 * e.floor, 2),
        predicted_us=round(1e6 * e.predicted, 2),
        bound=e.bound,
        check=None if result is None else result.reason or "passed",
    )


def _operands(launch: Launch) -> str | None:
    """The type that a launch multiplies; None where it does not."""
    weight = getattr(launch.op, "weight", None)
    return None if weight is None else TYPES[weight.dtype]


def _shape(b: Buffer) -> str:
    return f"{b.height}x{b.width}x{b.channels}"


def _line(r: dict[str, Any]) -> str:
    figures = (
        f"{r['flops'] / 1e9:.2f}",
        f"{r['bytes'] / 1e6:.2f}",
        f"{r['floor_us']:.2f}",
        f"{r['predicted_us']:.2f}",
    )
    operands = f"{r['operands'] or ''}{' kept' if r['keep_bf16'] else ''}"
    failed = "" if r["check"] in (None, "passed") else f"  FAILED: {r['check']}"
    return _columns(
        r["launch"],
        r["kernel"],
        r["reads"],
        r["writes"],
        operands,
        r["tile"] or "",
        *figures,
        r["bound"] + failed,
    )


def _columns(*c: str) -> str:
    return f"{c[0]:46} {c[1]:16} {c[2]:>16} {c[3]:>14} {c[4]:>9} {c[5]:>16} {c[6]:>8} {c[7]:>8} {c[8]:>8} {c[9]:>9}  {c[10]}"


def _summary_of(results: dict[str, CheckResult]) -> str:
    passed = sum(r.passed for r in results.values())
    return f"{passed} of {len(results)} passed" if results else "not checked on this machine"
