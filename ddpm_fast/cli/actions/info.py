"""Implementation of ddpm-fast info and collect-env."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import load_pretrained
from ...engines.fused.calibration import Calibration, load_calibration
from ...engines.fused.checks import CheckResult
from ...engines.fused.model import PlannedUNet
from ...engines.fused.plan import Buffer, Launch
from ...engines.fused.roofline import GPUS, Estimate, predict_step
from ...engines.fused.verification import cached_results
from ...kernels._gemm import Target
from ...models.flops import unet_cost
from ...utils.cache import cache_dir, cached_files, clear_cache
from ...utils.environment import environment
from ..common import mebibytes, print_report

HEADER = (
    "launch",
    "input",
    "output",
    "dtype",
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


def describe_environment(as_json: bool) -> None:
    """Prints versions and hardware."""
    report = environment()
    width = max(map(len, report))
    lines = [
        f"{name:{width}}  {value if value not in (None, []) else 'none'}"
        for name, value in report.items()
    ]
    print_report(report, as_json, "\n".join(lines))


def describe_cache(clear: bool, as_json: bool) -> None:
    """Prints the contents of the cache folder; removes them if `clear`."""
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
    number = f"{len(files)} file{'' if len(files) == 1 else 's'}"
    text = f"{cache_dir()}: {number}, {mebibytes(size)}{', removed' if clear else ''}"
    print_report(report, as_json, text)


def describe(directory: Path, as_json: bool) -> None:
    """Prints a checkpoint's configuration and cost."""
    c = load_pretrained(directory)
    config, schedule = c.unet.config, c.schedule
    h, w = config.size or (32, 32)
    cost = unet_cost(config, (h, w))
    report = dict(
        directory=str(directory),
        config={k: v for k, v in config.to_config().items() if not k.startswith("_")},
        timesteps=len(schedule),
        beta=[float(schedule.beta[0]), float(schedule.beta[-1])],
        prediction=c.prediction,
        variance=c.variance,
        clip=c.clip,
        **cost.as_dict(),
    )
    assumed = "" if config.size else " (assumed: the configuration has no sample_size)"
    classes = f", {config.num_classes} classes" if config.num_classes else ""
    levels = ", ".join(f"level {i}" for i, attends in enumerate(config.attends) if attends)
    attention = f"attention on {levels}" if levels else "no attention"
    blocks = f"{config.levels_of('layers')} residual blocks per level"
    clip = "no clipping" if c.clip is None else f"x_0 clipped to {c.clip}"
    beta = f"beta {schedule.beta[0]:.3g} to {schedule.beta[-1]:.3g}"
    flops = f"{cost.flops / 1e9:.3f} GFLOP per image per step"
    lines = [
        f"{directory}",
        f"  images      {config.in_channels} x {h} x {w}{assumed}{classes}",
        f"  network     channels {config.channels}, {blocks}, {attention}",
        f"  prediction  {c.prediction}, variance {c.variance}, {clip}",
        f"  schedule    {len(schedule)} timesteps, {beta}",
        f"  parameters  {cost.parameters:,} ({mebibytes(cost.weight_bytes)} in fp32)",
        f"  cost        {flops}, as PyTorch computes the network",
        f"  memory      {mebibytes(cost.activation_bytes)} of activations per image, peak in fp32",
    ]
    print_report(report, as_json, "\n".join(lines))


# ---- the plan


def describe_plan(
    directory: Path,
    batch: int,
    dtype: str,
    size: tuple[int, int] | None,
    gpu_name: str,
    as_json: bool,
) -> None:
    """Prints the plan of a checkpoint for the named GPU, with this machine's check results."""
    c, gpu = load_pretrained(directory), GPUS[gpu_name]
    calibration = load_calibration(directory, c.unet) if dtype == "fp8" else None
    arguments = c.unet.to("meta"), batch, dtype, "meta", size, len(c.schedule)
    fused = PlannedUNet(*arguments, target=gpu.target, calibration=calibration)
    plan = fused.plan()
    prediction = predict_step(plan, gpu)
    estimates = prediction.launches
    results = _cached_results(fused)
    rows = [
        _row(launch, e, results.get(launch.name), fused.keep_bf16)
        for launch, e in zip(plan, estimates, strict=True)
    ]
    floor, predicted = prediction.floor, prediction.forward
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
    defined = unet_cost(c.unet.config, fused.size).flops
    totals["gflop_per_image_as_defined"] = round(defined / 1e9, 3)
    lines = [*_table(rows), ""]
    lines += _fp8_lines(fused, calibration) if dtype == "fp8" else []
    basis = "" if gpu.measured else " from the utilization of an H100"
    rate = f"{batch / predicted:,.0f} image-steps per second"
    lines += [
        f"{len(plan)} launches, {mebibytes(plan.arena.size)} of feature maps; "
        f"self-check: {totals['checks']}",
        f"{totals['gflop_per_image']} GFLOP per image per step, {moved / batch / 1e6:.1f} MB with "
        f"the weights; {totals['gflop_per_image_as_defined']} GFLOP in PyTorch,",
        "  which convolves upsampled feature maps and has no time embedding table",
        f"{gpu.name}, batch {batch}, {dtype}: lower bound {1e3 * floor:.3f} ms per step",
        f"  predicted{basis}: {1e3 * predicted:.3f} ms per step, {rate}",
    ]
    print_report(dict(**totals, plan=rows), as_json, "\n".join(lines))


def _cached_results(fused: PlannedUNet) -> dict[str, CheckResult]:
    if not torch.cuda.is_available():
        return {}
    spec = fused.spec()
    options = dict(spec.options) | dict(device="cuda", target=vars(Target.of(torch.device("cuda"))))
    return cached_results(replace(spec, options=options)) or {}


def _fp8_lines(fused: PlannedUNet, calibration: Calibration | None) -> list[str]:
    """Source of the ranges, and the layers that stay in bf16."""
    count = sum(_operands(launch) == "e4m3" for launch in fused.plan())
    if calibration is None:
        return [
            f"{count} convolutions in e4m3, default ranges; run ddpm-fast calibrate to measure them"
        ]
    bf16 = len(fused.keep_bf16)
    errors = ((name, calibration.layers[name].error) for name in fused.keep_bf16)
    return [
        f"{count} convolutions in e4m3, calibrated ranges; {bf16} convolutions stay in bf16",
        *(
            f"  {name}: error {error:.4f} in e4m3; limit {calibration.allowed:.4f}"
            for name, error in errors
        ),
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
    """The dtype of a launch's weights; None without weights."""
    weight = getattr(launch.op, "weight", None)
    return None if weight is None else TYPES[weight.dtype]


def _shape(b: Buffer) -> str:
    return f"{b.height}x{b.width}x{b.channels}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of at most 120 characters, with a heading per block of the network."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    blocks = ["", *(_block_of(row["launch"]) for row in rows)]
    failures = ["", *(r["check"] if r["check"] not in (None, "passed") else "" for r in rows)]
    lines = []
    for i, row in enumerate(cells):
        if i and blocks[i] and blocks[i] != blocks[i - 1]:
            lines.append(blocks[i])
        padded = (f"{c:>{w}}" for c, w in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append(f"{row[0]:{widths[0]}} {' '.join(padded)}  {row[-1]}".rstrip())
        lines += [f"    FAILED: {failures[i]}"] if failures[i] else []
    return lines


def _block_of(launch: str) -> str:
    """Block of a launch by its name, such as "up_blocks.2"; "" outside blocks."""
    parts = launch.split(".")
    return ".".join(parts[: 2 if parts[0].endswith("blocks") else 1]) if len(parts) > 2 else ""


def _cells(r: dict[str, Any]) -> tuple[str, ...]:
    block = _block_of(r["launch"])
    name = f"  {r['launch'].removeprefix(block + '.')}" if block else r["launch"]
    dtype = f"{r['operands'] or ''}{' kept' if r['keep_bf16'] else ''}"
    figures = (
        f"{r['flops'] / 1e9:.2f}",
        f"{r['bytes'] / 1e6:.2f}",
        f"{r['floor_us']:.2f}",
        f"{r['predicted_us']:.2f}",
    )
    return name, r["reads"], r["writes"], dtype, r["tile"] or "", *figures, r["bound"]


def _summary_of(results: dict[str, CheckResult]) -> str:
    passed = sum(r.passed for r in results.values())
    return f"{passed} of {len(results)} passed" if results else "not checked on this machine"
