"""Sample quality against the number of steps.

    python -m bench.studies.quality --data-dir DIR [--out FILE] [--plot FILE]

Each row is one run of `ddpm-fast eval`: KID of images sampled by a solver, and KID of as many real
images (the floor). A stopped run can be resumed: rows of the file are not computed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.workloads import OUT, ROOT, WEIGHTS
from ddpm_fast.benchmark.results import write
from ddpm_fast.utils.environment import environment

# solver, steps, images, further options
SMALL = ("--variance", "fixed_small")
ROWS: list[tuple[str, int, int, tuple[str, ...]]] = [
    ("ddpm", 100, 512, ()),
    ("ddim", 50, 512, ()),
    ("dpm++2m", 20, 512, ()),
    ("ddpm", 1000, 128, ()),
    ("ddim", 10, 512, ()),
    ("ddim", 20, 512, ()),
    ("dpm++2m", 10, 512, ()),
    ("dpm++2m", 50, 512, ()),
    ("dpm++2m-sde", 20, 512, ()),
    ("dpm++2m-sde", 50, 512, ()),
    ("ddpm", 50, 512, ()),
    ("ddim", 100, 512, ()),
    ("ddpm", 100, 512, SMALL),
    ("ddpm", 50, 512, SMALL),
    ("ddpm", 20, 512, SMALL),
    ("ddpm", 1000, 128, SMALL),
    ("ddim", 50, 512, ("--preset", "diffusers")),
    ("ddim", 50, 512, ("--preset", "ddim")),
    ("ddim", 50, 512, ("--preset", "ddim", "--spacing", "quadratic")),
]


def run(
    weights: Path, data: Path, solver: str, steps: int, images: int, options: tuple[str, ...]
) -> dict[str, Any]:
    """Computes a row in a child process."""
    command = [sys.executable, "-m", "ddpm_fast", "eval", "--json", "--quiet", "--fit", "pad"]
    command += ["--weights", str(weights), "--data-dir", str(data), "--solver", solver]
    command += ["--steps", str(steps), "--images", str(images), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    names = ("images", "real_images", "kid", "kid_floor", "seconds_of_drawing", "rounding")
    row = dict(weights=weights.name, seed=0, solver=solver, steps=steps, options=" ".join(options))
    return row | {name: report[name] for name in names}


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draws KID against steps: a line per solver."""
    from ddpm_fast.plotting.style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save

    lines = {
        "DDPM, fixed_large": ("ddpm", "", BLUE, "o--"),
        "DDPM, fixed_small": ("ddpm", " ".join(SMALL), BLUE, "o-"),
        "DDIM": ("ddim", "", ORANGE, "s-"),
        "DPM-Solver++ 2M": ("dpm++2m", "", GREEN, "D-"),
        "DPM-Solver++ 2M, SDE": ("dpm++2m-sde", "", PINK, "^-"),
    }
    plot, axes = figure()
    for name, (solver, options, color, style) in lines.items():
        points = sorted(
            (r["steps"], *r["kid"])
            for r in rows
            if (r["solver"], r["options"]) == (solver, options)
        )
        if points:
            steps, kid, deviation = zip(*points, strict=True)
            axes.errorbar(steps, kid, deviation, fmt=style, color=color, capsize=3, label=name)
    floor = max(r["kid_floor"][0] for r in rows)
    axes.axhline(floor, color=GREY, linestyle=":", label="real images")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="KID (EfficientNet-Lite0 features)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.1))
    save(plot, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--data-dir", type=Path, required=True, help="Fashion-MNIST's IDX files")
    parser.add_argument(
        "--out", type=Path, default=OUT / "quality.json", help="JSON file (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="figure, .png")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = (
        json.loads(args.out.read_text())
        if args.out.exists()
        else dict(environment=environment(), rows=[])
    )
    rows = {(r["solver"], r["steps"], r["options"]): r for r in result["rows"]}
    for row in ROWS:
        solver, steps, _, options = row
        key = solver, steps, " ".join(options)
        if key not in rows:
            rows[key] = run(args.weights, args.data_dir, *row)
            result["rows"].append(rows[key])
            write(args.out, result)
        r = rows[key]
        kid, floor = ("{:7.4f} +- {:.4f}".format(*r[name]) for name in ("kid", "kid_floor"))
        what = f"{solver:12} {steps:5} steps {r['options']:32} {r['images']:5} images"
        print(f"{what}  KID {kid}  floor {floor}", flush=True)
    if args.plot:
        draw(result["rows"], args.plot)


if __name__ == "__main__":
    main()
