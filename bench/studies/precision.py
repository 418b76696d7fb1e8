"""Accuracy of each precision, emulated on a CPU.

    python -m bench.studies.precision [--out FILE] [--rows NAME ...] [--parts NAME ...]

The fallbacks of a plan compute in fp32 and round to the types that its kernels round to. So
`FusedUNet` on a CPU emulates the GPU, except for the order of sums in tensor cores. A row is a
precision; a part is a group of its figures. `layers`, `forward` and `cifar10` are errors of single
passes, `ddpm` and `kid` measure images. A stopped run can be resumed: parts of the file are not
computed again. Several processes may compute rows of one file; set OMP_NUM_THREADS=1 for them,
since batches are small.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.workloads import NETWORKS, OUT, ROOT, WEIGHTS
from ddpm_fast import FusedUNet, NoiseSchedule, Sampler, UNet, load_pretrained
from ddpm_fast.benchmark.results import write
from ddpm_fast.benchmark.workload import Workload
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.engines.fused.calibration import load_calibration
from ddpm_fast.engines.fused.checks import network_of
from ddpm_fast.engines.fused.plan import Launch, Plan
from ddpm_fast.kernels._feature_map import FeatureMap
from ddpm_fast.models.unet import channels_last
from ddpm_fast.sampling.calibrate import calibrate
from ddpm_fast.utils.environment import environment
from ddpm_fast.utils.numerics import relative_error

# row -> dtype of FusedUNet
ROWS = {
    "fp32": "fp32",  # its images are sampled by the reference network
    "fp16": "fp16",
    "bf16": "bf16",
    "fp8": "fp8",  # with the calibration file of the weights
    "fp8-by-rule": "fp8",  # with the default ranges
}
PARTS = ("layers", "forward", "cifar10", "ddpm", "kid")
BATCH = 16
# the sampling loop at whose states the errors of single passes are taken
STATES: dict[str, Any] = dict(images=BATCH, seed=2, solver="ddim", steps=10)
DDPM: dict[str, Any] = dict(images=16, seed=0, solver="ddpm", steps=1000)
KID: dict[str, Any] = dict(images=512, seed=0, solver="ddim", steps=50)
Call = tuple[Tensor, ...]


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Sampler.sample` for settings as the results file records them."""
    return {"indices" if name == "images" else name: value for name, value in settings.items()}


class PrecisionStudy:
    """Accuracy study of one checkpoint; the methods from `layers` on compute the parts of a row."""

    def __init__(self, weights: Path, data: Path, out: Path) -> None:
        self.weights, self.data, self.out = weights, data, out
        self.checkpoint: Checkpoint = load_pretrained(weights)
        self.unet = channels_last(self.checkpoint.unet.eval().requires_grad_(False))

    def fused(self, row: str) -> FusedUNet:
        calibration = load_calibration(self.weights, self.unet) if row == "fp8" else None
        return FusedUNet(
            self.unet, BATCH, ROWS[row], "cpu", calibration=calibration, count_saturated=True
        )

    def sampler(self, model: Callable[..., Tensor]) -> Sampler:
        return Workload(self.checkpoint).sampler("reference", model=model)

    def sample(self, row: str, settings: dict[str, Any], output: str) -> Tensor:
        model = self.unet if row == "fp32" else self.fused(row)
        return self.sampler(model).sample(**_arguments(settings), output=output, batch_size=BATCH)

    # ---- parts

    def layers(self, row: str) -> dict[str, Any]:
        """Relative error of each 3x3 convolution, without bias and residual, on exact inputs."""
        errors = layer_errors(self.fused("fp32"), self.fused(row), states(self))
        worst = max(errors, key=lambda name: errors[name])
        median = float(np.median(list(errors.values())))
        figures = dict(worst=worst, largest=errors[worst], median=median)
        return figures | dict(errors=errors, calls=STATES)

    def forward(self, row: str) -> dict[str, Any]:
        """Relative error of the whole network at the states of a sampling loop."""
        fused, pairs = self.fused(row), []
        for call in states(self):
            exact = self.unet(*call)
            error = float((fused(*call).double() - exact).square().sum())
            pairs.append((error, float(exact.double().square().sum())))
        each = [(e / n) ** 0.5 for e, n in pairs]
        total = (sum(e for e, _ in pairs) / sum(n for _, n in pairs)) ** 0.5
        return dict(error=total, by_step=each, saturated=fused.saturated(), calls=STATES)

    @torch.no_grad()
    def cifar10(self, row: str) -> dict[str, Any]:
        """Relative error of the CIFAR-10 network on noise; its weights are random."""
        unet = channels_last(network_of(NETWORKS["cifar10"]))
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        call = (x, torch.tensor([900, 100]))
        calibration = None
        if row == "fp8":
            calibration = calibrate(Checkpoint(unet, NoiseSchedule.linear()), images=2, steps=3)
        fused, exact = FusedUNet(unet, 2, ROWS[row], "cpu", calibration=calibration), unet(*call)
        return dict(error=relative_error(fused(*call), exact), wide=fused.keep_bf16)

    def ddpm(self, row: str) -> dict[str, Any]:
        """PSNR of images, clipped to [-1, 1], against the same images of the reference in fp32."""
        cached = self.out.with_suffix(".reference.npy")
        if not cached.exists():
            np.save(cached, self.sample("fp32", DDPM, "float").numpy())
        exact = torch.from_numpy(np.load(cached))
        if row == "fp32":
            return dict(**DDPM)
        error = self.sample(row, DDPM, "float").clamp(-1, 1) - exact.clamp(-1, 1)
        psnr = 10 * torch.log10(4 / error.double().square().flatten(1).mean(1))
        return dict(**DDPM, mean=float(psnr.mean()), least=float(psnr.min()), each=psnr.tolist())

    def kid(self, row: str) -> dict[str, Any]:
        """KID of `ddpm-fast eval --samples`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.npy"
            np.save(path, self.sample(row, KID, "uint8").numpy())
            command = [sys.executable, "-m", "ddpm_fast", "eval", "--json", "--fit", "pad"]
            command += ["--samples", str(path), "--data-dir", str(self.data)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr.strip())
        report = json.loads(done.stdout)
        figures = dict(kid=report["kid"], floor=report["kid_floor"])
        return dict(**KID, **figures, real_images=report["real_images"])


# ---- single passes


class Recorder:
    """Model that records its calls."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.calls = unet, list[Call]()

    def __call__(self, *call: Tensor) -> Tensor:
        self.calls.append(tuple(v.clone() for v in call))
        return self.unet(*call)


def states(study: PrecisionStudy) -> list[Call]:
    """Calls of the reference network in a sampling loop."""
    recorder = Recorder(study.unet)
    study.sampler(recorder).sample(**_arguments(STATES), batch_size=BATCH)
    return recorder.calls


@torch.no_grad()
def layer_errors(exact: FusedUNet, other: FusedUNet, calls: list[Call]) -> dict[str, float]:
    """Maps each 3x3 convolution to the error of its product in `other` on its inputs in `exact`."""
    sums: dict[str, list[float]] = {}
    for call in calls:
        exact_plan, other_plan = exact.load(*call), other.load(*call)
        for launch, other_launch in zip(exact_plan, other_plan, strict=True):
            if launch.op.name == "conv3x3":
                pixels = exact_plan.maps[launch.reads["x"]].pixels
                expected = product(exact_plan, launch, pixels)
                error = product(other_plan, other_launch, pixels) - expected
                squares = sums.setdefault(launch.name, [0.0, 0.0])
                squares[0] += float(error.double().square().sum())
                squares[1] += float(expected.double().square().sum())
            exact_plan.run_one(launch)
    return {name: (e / n) ** 0.5 for name, (e, n) in sums.items()}


def product(plan: Plan, launch: Launch, pixels: Tensor) -> Tensor:
    """Output of a convolution for fp32 pixels [N, C, H, W], rounded to the type of its operands."""
    source = launch.reads["x"]
    unit = next(getattr(before.op, "unit", 1.0) for before in plan if before.out is source)
    x, out = (
        FeatureMap.empty(b.images, b.height, b.width, b.channels, b.dtype, "cpu", b.bordered)
        for b in (source, launch.out)
    )
    x.write(pixels / unit)
    op: Any = launch.op
    replace(op, bias=None).fallback(x=x, out=out, compute=plan.compute)
    return out.pixels.float()


# ---- the file


def read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text()) if out.exists() else dict(environment=environment(), rows={})


def markdown(rows: dict[str, Any]) -> str:
    """The table of docs/precision.md; the cells of a missing part are empty."""
    head = ["type", "largest error of a layer", "median", "forward: median of steps", "at t = 0"]
    lines = [[*head, "CIFAR-10", "PSNR: mean, dB", "least, dB", "KID"], ["---"] * 9]
    for name, row in ((name, rows[name]) for name in ROWS if name in rows):
        layers, forward, cifar, ddpm, kid = (row.get(part) for part in PARTS)
        cells = [""] * 8
        if layers:
            worst = f" ({layers['worst']})" if layers["largest"] else ""
            cells[0:2] = f"{layers['largest']:.2g}{worst}", f"{layers['median']:.2g}"
        if forward:
            *steps, last = forward["by_step"]
            cells[2:4] = f"{sorted(steps)[len(steps) // 2]:.2g}", f"{last:.2g}"
        if cifar:
            cells[4] = f"{cifar['error']:.2g}"
        if ddpm and "mean" in ddpm:
            cells[5:7] = f"{ddpm['mean']:.1f}", f"{ddpm['least']:.1f}"
        if kid:
            cells[7] = "{:.3f} +- {:.3f}".format(*kid["kid"])
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="Fashion-MNIST's IDX files",
    )
    parser.add_argument(
        "--out", type=Path, default=OUT / "precision.json", help="JSON file (default: %(default)s)"
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    study = PrecisionStudy(args.weights, args.data_dir, args.out)
    for part in args.parts:
        for row in args.rows:
            if part not in read(args.out)["rows"].get(row, {}):
                start = time.perf_counter()
                figures = getattr(study, part)(row)
                figures["seconds"] = round(time.perf_counter() - start, 1)
                result = read(args.out)  # another process may have written in the meantime
                result["rows"].setdefault(row, {})[part] = figures
                write(args.out, result)
            items = read(args.out)["rows"][row][part].items()
            shown = {k: v for k, v in items if not isinstance(v, dict | list) or k == "kid"}
            print(row, part, shown, flush=True)
    print(markdown(read(args.out)["rows"]))


if __name__ == "__main__":
    main()
