"""Tuner of tile sizes: writes those that are faster than the default, for `FusedUNet(tiles=...)`.

    python -m bench.tools.tune --net cifar10 --batch 256 --dtype bf16 --out tiles.json
    python -m bench.tools.tune --tiny --out tiles.json     on a CPU, to test the command

Each candidate for a distinct product of the plan is checked against the launch's fallback and
timed. It is selected if it is faster than the default by more than the spread of the times. The
channels per step and the instruction family do not change, so images stay bit-equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.workloads import NETWORKS, TINY_UNET, random_checkpoint
from ddpm_fast.benchmark.results import provenance, write
from ddpm_fast.benchmark.timer import measure
from ddpm_fast.engines.fused.checks import check_launch
from ddpm_fast.engines.fused.packing import tile_key
from ddpm_fast.engines.fused.plan import Launch, Plan
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels._gemm import Tiles


def candidates(tiles: Tiles) -> Iterator[dict[str, Any]]:
    """Yields changes to the default tiles: at least 64 rows, and the same channels per step."""
    for block_m in (64, 128, 256):
        for warps in (4, 8):
            for stages in (3, 4, 5):
                changed: dict[str, Any] = dict(block_m=block_m, warps=warps, stages=stages)
                if replace(tiles, **changed) != tiles:
                    yield {k: v for k, v in changed.items() if v != getattr(tiles, k)}


def key_of(fused: FusedUNet, launch: Launch) -> str | None:
    """Key of the launch in the overrides; None for a launch without tiles."""
    op: Any = launch.op
    if not hasattr(op, "tiles") or op.name == "time_embedding":
        return None
    tiles = op.tiles
    x = launch.reads["x"]
    channels = tiles.block_k if op.name == "conv_in" else x.channels
    if op.name == "conv1x1" and "x2" in launch.reads:
        channels = tiles.block_k
    return tile_key(
        op.name, fused.target, op.weight.dtype, channels, launch.out.channels, x.height, x.width
    )


def tune(
    fused: FusedUNet, plan: Plan, seconds: float
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Returns (overrides, measured rows). Runs the launches in order, so that inputs are valid."""
    best: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    seen: set[str | None] = {None}
    for launch in plan:
        key = key_of(fused, launch)
        if key not in seen and launch.name not in plan.fallbacks:
            seen.add(key)
            changed, measured = tune_one(plan, launch, fused.device, seconds)
            rows += [dict(key=key, **row) for row in measured]
            best |= {str(key): changed} if changed else {}
            faster = f", faster with {changed}" if changed else ""
            print(f"{key}: {measured[0]['us']:.1f} us by default{faster}", flush=True)
        plan.run_one(launch)
    return best, rows


def tune_one(
    plan: Plan, launch: Launch, device: torch.device, seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (changes to the default tiles, or {}; measured rows, of the default first)."""
    op: Any = launch.op
    default = measure(partial(plan.run_one, launch), device, seconds, captured=True)
    best, least = dict[str, Any](), default.median * (1 - max(default.spread, 0.02))
    rows: list[dict[str, Any]] = [dict(changed={}, us=1e6 * default.median)]
    for changed in candidates(op.tiles):
        other = replace(launch, op=replace(op, tiles=replace(op.tiles, **changed)))
        try:
            check = check_launch(plan, other)
            if not check.passed:
                rows.append(dict(changed=changed, failed=check.reason))
                continue
            timing = measure(partial(plan.run_one, other), device, seconds, captured=True)
        except Exception as error:  # too much shared memory, or another error of the compiler
            rows.append(dict(changed=changed, failed=f"{type(error).__name__}: {str(error)[:200]}"))
            continue
        rows.append(dict(changed=changed, us=1e6 * timing.median))
        if timing.median < least:
            best, least = changed, timing.median
    return best, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=list(NETWORKS), default="cifar10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp8"], default="bf16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny network, on any device")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("no GPU found; --tiny runs a tiny network on the CPU")
    config = TINY_UNET if args.tiny else NETWORKS[args.net]
    unet = random_checkpoint(config).unet.to(device)
    fused = FusedUNet(unet, 2 if args.tiny else args.batch, args.dtype)
    x = torch.randn(fused.batch_size, config.in_channels, *fused.size, device=device)
    plan = fused.load(x, torch.arange(fused.batch_size, device=device) % 1000)
    plan.run()
    best, rows = tune(fused, plan, 0.01 if args.tiny else 0.1)
    write(args.out, best)
    write(args.out.with_suffix(".measured.json"), dict(**provenance(), rows=rows))
    print(f"{len(best)} overrides -> {args.out}")


if __name__ == "__main__":
    main()
