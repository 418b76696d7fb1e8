"""Accuracy of each precision, emulated on a CPU: `python -m bench.studies.precision [--out FILE] [--rows NAME ...]`.

A plan's fallbacks compute in fp32 and round where its kernels round, so `FusedUNet` on a CPU emulates its GPU form, except for the
order of sums in a tensor core. A row is a precision, a part one figure of it: `layers`, `forward` and `cifar10` are errors of
single passes, `ddpm` and `kid` are of images. Parts that the file holds are not computed again, so a stopped run can be resumed;
several processes may compute rows at once. Set OMP_NUM_THREADS=1 where cores are shared: a batch is small.
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

from bench.workloads import NETWORKS, OUT, ROOT
from ddpm_fast import FusedUNet, NoiseSchedule, Sampler, UNet, load_pretrained
from ddpm_fast.benchmark.results import write
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
    "fp8": "fp8",  # with the calibration of the weights' folder
    "fp8-by-rule": "fp8",  # without
}
PARTS = ("layers", "forward", "cifar10", "ddpm", "kid")
BATCH = 16
STATES: dict[str, Any] = dict(
    images=BATCH, seed=2, solver="ddim", steps=10
)  # where errors of single passes are taken
DDPM: dict[str, Any] = dict(images=16, seed=0, solver="ddpm", steps=1000)
KID: dict[str, Any] = dict(images=512, seed=0, solver="ddim", steps=50)
Call = tuple[Tensor, ...]


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `Sampler.sample` for the settings that the results file records."""
    return {"indices" if name == "images" else name: value for name, value in settings.items()}


class PrecisionStudy:
    """The network, its reference, and the parts of a row."""

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
        c, config = self.checkpoint, self.unet.config
        assert config.size is not None
        shape = (config.in_channels, *config.size)
        return Sampler(
            model,
            c.schedule,
            shape,
            c.prediction,
            c.variance,
            c.clip,
            config.num_classes,
            "cpu",
            engine="reference",
        )

    def draw(self, row: str, request: dict[str, Any], output: str) -> Tensor:
        model = self.unet if row == "fp32" else self.fused(row)
        return self.sampler(model).sample(**_arguments(request), output=output, batch_size=BATCH)

    # ---- parts

    def layers(self, row: str) -> dict[str, Any]:
        """Each 3x3 convolution's product alone (no bias, no residual) on the exact input: relative error against fp32."""
        errors = layer_errors(self.fused("fp32"), self.fused(row), states(self))
        worst = max(errors, key=lambda name: errors[name])
        return dict(
            worst=worst,
            largest=errors[worst],
            median=float(np.median(list(errors.values()))),
            errors=errors,
            calls=STATES,
        )

    def forward(self, row: str) -> dict[str, Any]:
        """The whole network against the reference, along a trajectory of the reference."""
        fused, pairs = self.fused(row), []
        for call in states(self):
            exact = self.unet(*call)
            pairs.append(
                (
                    float((fused(*call).double() - exact).square().sum()),
                    float(exact.double().square().sum()),
                )
            )
        each = [(e / n) ** 0.5 for e, n in pairs]
        error = (sum(e for e, _ in pairs) / sum(n for _, n in pairs)) ** 0.5
        return dict(error=error, by_step=each, saturated=fused.saturated(), calls=STATES)

    @torch.no_grad()
    def cifar10(self, row: str) -> dict[str, Any]:
        """One pass of the CIFAR-10 network of Ho et al. with random weights, on noise: no weights of it ship."""
        unet = channels_last(network_of(NETWORKS["cifar10"]))
        call = (
            torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
            torch.tensor([900, 100]),
        )
        calibration = (
            calibrate(Checkpoint(unet, NoiseSchedule.linear()), images=2, steps=3)
            if row == "fp8"
            else None
        )
        fused, exact = FusedUNet(unet, 2, ROWS[row], "cpu", calibration=calibration), unet(*call)
        return dict(error=relative_error(fused(*call), exact), wide=fused.keep_bf16)

    def ddpm(self, row: str) -> dict[str, Any]:
        """PSNR of whole images, of [-1, 1] after clipping, against the same images by the reference in fp32."""
        cached = self.out.with_suffix(".reference.npy")
        if not cached.exists():
            np.save(cached, self.draw("fp32", DDPM, "float").numpy())
        exact = torch.from_numpy(np.load(cached))
        if row == "fp32":
            return dict(**DDPM)
        off = self.draw(row, DDPM, "float").clamp(-1, 1) - exact.clamp(-1, 1)
        psnr = 10 * torch.log10(4 / off.double().square().flatten(1).mean(1))
        return dict(**DDPM, mean=float(psnr.mean()), least=float(psnr.min()), each=psnr.tolist())

    def kid(self, row: str) -> dict[str, Any]:
        """As `ddpm-fast eval` scores images that are given to it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "drawn.npy"
            np.save(path, self.draw(row, KID, "uint8").numpy())
            command = [
                sys.executable,
                "-m",
                "ddpm_fast",
                "eval",
                "--json",
                "--samples",
                str(path),
                "--data-dir",
                str(self.data),
            ]
            done = subprocess.run(
                [*command, "--fit", "pad"], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr.strip())
        report = json.loads(done.stdout)
        return dict(
            **KID, kid=report["kid"], floor=report["kid_floor"], real_images=report["real_images"]
        )


# ---- single passes


class Recorder:
    """Model that records its calls."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.calls = unet, list[Call]()

    def __call__(self, *call: Tensor) -> Tensor:
        self.calls.append(tuple(v.clone() for v in call))
        return self.unet(*call)


def states(study: PrecisionStudy) -> list[Call]:
    """Calls of the reference network along sampling loops."""
    recorder = Recorder(study.unet)
    study.sampler(recorder).sample(**_arguments(STATES), batch_size=BATCH)
    return recorder.calls


@torch.no_grad()
def layer_errors(exact: FusedUNet, other: FusedUNet, calls: list[Call]) -> dict[str, float]:
    """Name of a 3x3 convolution -> relative error of its product in `other` on its inputs in `exact`."""
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
    """Output of a convolution for fp32 pixels [N, C, H, W], which are first rounded to its operands' type."""
    read, wrote = launch.reads["x"], launch.out
    unit = next(getattr(before.op, "unit", 1.0) for before in plan if before.out is read)
    x, out = (
        FeatureMap.empty(b.images, b.height, b.width, b.channels, b.dtype, "cpu", b.bordered)
        for b in (read, wrote)
    )
    x.write(pixels / unit)
    op: Any = launch.op
    replace(op, bias=None).fallback(x=x, out=out, compute=plan.compute)
    return out.pixels.float()


# ---- the file


def read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text()) if out.exists() else dict(environment=environment(), rows={})


def markdown(rows: dict[str, Any]) -> str:
    """The table of docs/precision.md; a part that is missing leaves its cells empty."""
    head = (
        "type",
        "largest error of a layer",
        "median",
        "forward: median of steps",
        "at t = 0",
        "CIFAR-10",
    )
    lines: list[tuple[str, ...]] = [(*head, "PSNR: mean, dB", "least, dB", "KID"), ("---",) * 9]
    for name, row in ((name, rows[name]) for name in ROWS if name in rows):
        layers, forward, cifar, ddpm, kid = (row.get(part) for part in PARTS)
        by_step = sorted(forward["by_step"][:-1]) if forward else []
        worst = f" ({layers['worst']})" if layers and layers["largest"] else ""
        cells = (
            [f"{layers['largest']:.2g}{worst}", f"{layers['median']:.2g}"] if layers else ["", ""]
        )
        cells += (
            [f"{by_step[len(by_step) // 2]:.2g}", f"{forward['by_step'][-1]:.2g}"]
            if forward
            else ["", ""]
        )
        cells += [f"{cifar['error']:.2g}" if cifar else ""]
        cells += (
            [f"{ddpm['mean']:.1f}", f"{ddpm['least']:.1f}"] if ddpm and "mean" in ddpm else ["", ""]
        )
        cells += [f"{kid['kid'][0]:.3f} +- {kid['kid'][1]:.3f}" if kid else ""]
        lines.append((name, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "fashion-mnist-32")
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
                figures = getattr(study, part)(row) | dict(
                    seconds=round(time.perf_counter() - start, 1)
                )
                result = read(args.out)  # again: another process may have written in the meantime
                result["rows"].setdefault(row, {})[part] = figures
                write(args.out, result)
            shown = {
                k: v
                for k, v in read(args.out)["rows"][row][part].items()
                if not isinstance(v, dict | list) or k == "kid"
            }
            print(row, part, shown, flush=True)
    print(markdown(read(args.out)["rows"]))


if __name__ == "__main__":
    main()
