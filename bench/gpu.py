"""One command for a machine with a GPU: tests, then timings, into one JSON file and a table.

    python -m bench.gpu                          everything; results in bench/results/
    python -m bench.gpu --tiny --out FILE.json   the same on a CPU in tiny sizes, to prove that it runs
    python -m bench.gpu --only kernels forward   some parts

Needs Python, torch, triton, numpy and pytest, nothing else, and no network. Each part has a time budget, a part that fails
does not stop the others, and nothing is timed before its result has been checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import gpu_network
from bench.clock import Timing, measure
from bench.gpu_network import TINY_UNET
from bench.training import ours, plain
from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.data import ImageData
from ddpm_fast.environment import environment
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.ddpm_step import ddpm_step, ddpm_step_reference
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_gradient, noise_mse_reference
from ddpm_fast.kernels.q_sample import q_sample, q_sample_reference
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.objective import target_table
from ddpm_fast.profile import EXACT
from ddpm_fast.testing import relative_error
from ddpm_fast.timesteps import choose_timesteps
from ddpm_fast.unet import channels_last

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


class Bench:
    """The device, the sizes, and the parts; every part returns rows for the JSON file and the table."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
        self.copy_rate: float | None = None
        self.until = 0.0  # the part's deadline

    def parts(self) -> dict[str, tuple[Callable[[], list[Row]], float]]:
        """Name -> (function, budget in seconds). The most important figures come last."""
        return {
            "tests": (self.tests, 240),
            "copy": (self.copy, 15),
            "kernels": (self.kernels, 60),
            "forward": (self.forward, 90),
            "training": (self.training, 60),
            "likelihood": (self.likelihood, 60),
            "sampling": (self.sampling, 90),
            "self-check": (partial(gpu_network.self_check, self), 180),
            "invariance": (partial(gpu_network.invariance, self), 60),
            "launches": (partial(gpu_network.launches, self), 120),
            "network": (partial(gpu_network.forward, self), 150),
        }

    def late(self) -> bool:
        return time.monotonic() > self.until

    def clock(self, call: Callable[[], object], captured: bool = False) -> Timing:
        seconds, least = (0.02, 2) if self.tiny else (0.5, 5)
        return measure(call, self.device, seconds, least, captured)

    # ---- parts

    def tests(self) -> list[Row]:
        """The tests that need a GPU, in a process of their own."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or kernel", "tests"]
        if self.tiny:  # prove that the command works; the interpreter's own runs have the kernels
            command += ["-k", "gpu"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired as late:
            output = late.stdout or b""
            return [dict(what="tests", failed=True, summary="out of time", output=output[-4000:].decode(errors="replace"))]
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        failed = done.returncode not in ((0, 5) if self.tiny else (0,))  # 5: no test ran
        return [dict(what="tests", failed=failed, summary=lines[-1] if lines else "", output=done.stdout[-6000:])]

    def copy(self) -> list[Row]:
        """The rate at which the device copies its own memory: bytes read and written per second."""
        size = 2**20 if self.tiny else 2**30
        source = torch.empty(size, device=self.device)
        target = torch.empty_like(source)
        timing = self.clock(lambda: target.copy_(source), captured=True)
        self.copy_rate = 2 * source.nbytes / timing.median
        return [dict(what="copy", bytes=2 * source.nbytes, **row_of(timing), tb_per_s=self.copy_rate / 1e12)]

    def kernels(self) -> list[Row]:
        """noise, q_sample, ddpm_step and noise_mse, each beside plain PyTorch on the same tensors."""
        rows: list[Row] = []
        shapes = [(2, 3, 8, 8)] if self.tiny else [(2048, 3, 128, 128), (32768, 3, 32, 32)]  # far beyond any cache
        for shape in shapes:
            for layout in (torch.channels_last, torch.contiguous_format):
                for dtype in (torch.float32, torch.bfloat16):
                    if self.late():
                        return [*rows, dict(what="kernels", failed=True, summary="out of time")]
                    rows += self._kernels_on(shape, layout, dtype)
        return rows

    def _kernels_on(self, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> list[Row]:
        b, c, h, w = shape
        schedule = NoiseSchedule.linear()
        image, seed = torch.arange(b, device=self.device), torch.zeros(b, dtype=torch.int64, device=self.device)
        row = torch.zeros(b, dtype=torch.int32, device=self.device)
        t = torch.full((b,), 500, device=self.device)
        table = EXACT.table(schedule, "ddpm", choose_timesteps(1000, None)).to(self.device)[1]
        coef = schedule.q_sample_table(self.device)
        x = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        out = torch.randn(shape, device=self.device, dtype=dtype).contiguous(memory_format=layout)
        x_0 = x.to(dtype)
        few = slice(0, 2)  # the check needs two images, not all of them

        z = N.noise_reference(seed[few], image[few], row[few], N.Q_SAMPLE, (c, h, w))
        want = q_sample_reference(x_0[few], z, coef, t[few])
        wrong = relative_error(q_sample(x_0[few], coef, t[few], row[few], seed[few], image[few]), want)
        z = N.noise_reference(seed[few], image[few], row[few], N.REVERSE, (c, h, w))
        want = ddpm_step_reference(x[few], out[few], z, table, row[few])
        got = x[few].clone(memory_format=torch.preserve_format)
        ddpm_step(got, out[few], table, row[few], seed[few], image[few])
        wrong = max(wrong, relative_error(got, want))
        target = target_table(schedule, "eps", self.device)
        z = N.noise_reference(seed[few], image[few], row[few], N.Q_SAMPLE, (c, h, w))
        want = noise_mse_reference(out[few], z, None, target, t[few])
        wrong = max(wrong, relative_error(noise_mse(out[few], None, target, t[few], row[few], seed[few], image[few]), want))
        if not wrong < 1e-6:
            raise AssertionError(f"kernels differ from their references by {wrong:.1e}: nothing timed")

        signal, sigma = (float(v) for v in coef[500])
        c0, c1, clip, m0, m1, _, _, s, *_ = (float(v) for v in table[500])

        def plain_q_sample() -> Tensor:
            return x_0 * signal + torch.randn_like(x_0) * sigma

        def plain_step() -> Tensor:
            return m0 * (c0 * x + c1 * out).clamp(-clip, clip) + m1 * x + s * torch.randn_like(x)

        ones, old, eps = torch.ones(b, device=self.device), torch.zeros_like(x), torch.randn_like(x)

        def plain_mse() -> Tensor:  # with the noise that q_sample had to store
            return (out.float() - eps).square().mean((1, 2, 3))

        calls: dict[str, tuple[Callable[[], object], int]] = {
            "noise": (lambda: N.noise(seed, image, row, N.X_T, c, h, w), 4),
            "q_sample": (lambda: q_sample(x_0, coef, t, row, seed, image), 4 + dtype.itemsize),
            "q_sample, plain PyTorch": (plain_q_sample, 4 + dtype.itemsize),
            "ddpm_step": (lambda: ddpm_step(x, out, table, row, seed, image), 8 + dtype.itemsize),
            "ddpm_step, plain PyTorch": (plain_step, 8 + dtype.itemsize),
            "ddpm_step, history": (lambda: ddpm_step(x, out, table, row, seed, image, False, old), 16 + dtype.itemsize),
            "noise_mse": (lambda: noise_mse(out, None, target, t, row, seed, image), dtype.itemsize),
            "noise_mse gradient": (
                lambda: noise_mse_gradient(ones, out, None, target, t, row, seed, image),
                2 * dtype.itemsize,
            ),
            "noise_mse, plain PyTorch": (plain_mse, dtype.itemsize + 4),
        }
        rows = []
        for name, (call, per_element) in calls.items():
            timing = self.clock(call, captured=True)
            rate = per_element * x.numel() / timing.median
            share = rate / self.copy_rate if self.copy_rate else None
            where = dict(shape=list(shape), layout=str(layout).removeprefix("torch."), dtype=str(dtype).removeprefix("torch."))
            rows.append(dict(what=name, **where, **row_of(timing), tb_per_s=rate / 1e12, share_of_copy=share, error=wrong))
        return rows

    def forward(self) -> list[Row]:
        """The reference UNet, fp32 and channels-last bf16. Random weights: times do not depend on them."""
        torch.manual_seed(0)
        config = TINY_UNET if self.tiny else UNetConfig()
        unet = channels_last(UNet(config).eval().to(self.device))
        half = channels_last(UNet(config).eval().to(self.device, torch.bfloat16))
        half.load_state_dict(unet.state_dict())
        rows: list[Row] = []
        for batch in (1, 2) if self.tiny else (1, 16, 64, 256):
            x = torch.randn(batch, config.in_channels, *(config.size or (32, 32)), device=self.device)
            x = x.contiguous(memory_format=torch.channels_last)
            t = torch.arange(batch, device=self.device) % 1000
            with torch.no_grad():
                error = relative_error(half(x, t), unet(x, t))
                if not error < 0.05:
                    raise AssertionError(f"bf16 forward differs from fp32 by {error:.1e}: nothing timed")
                for name, model in (("fp32", unet), ("bf16", half)):
                    if self.late():
                        return [*rows, dict(what="forward", failed=True, summary="out of time")]
                    timing = self.clock(partial(model, x, t))
                    rows.append(dict(what="reference forward", dtype=name, batch=batch, **row_of(timing), error=error))
        return rows

    def training(self) -> list[Row]:
        """Steps of `Trainer` beside the same network in a plain PyTorch loop, both under autocast to bf16."""
        channels, batch = ((8, 16), 8) if self.tiny else ((48, 96, 96), 256)
        x_t, eps = torch.randn(2, 4, 1, 32, 32, device=self.device)
        t, labels = torch.tensor([0, 300, 600, 999], device=self.device), torch.arange(4, device=self.device)
        engines = {"training": ours, "training, plain PyTorch": plain}
        rows: list[Row] = []
        for name, make in engines.items():
            step, loss_of = make(channels, batch, "bf16", self.device)
            with torch.no_grad():
                loss = float(loss_of(x_t, t, labels, eps))
            if rows and abs(loss - rows[0]["loss"]) > 1e-3 * loss:
                raise AssertionError(f"losses on one input differ, {rows[0]['loss']} and {loss}: nothing timed")
            timing = self.clock(step)
            rows.append(dict(what=name, batch=batch, **row_of(timing), images_per_s=batch / timing.median, loss=loss))
        return rows

    def likelihood(self) -> list[Row]:
        """Terms of the bound a second, on the CIFAR-10 network and pictures of noise: images and timesteps in one batch."""
        torch.manual_seed(0)
        config = TINY_UNET if self.tiny else UNetConfig()
        count, steps, batch = (2, 5, 4) if self.tiny else (8, 100, 256)
        shape = (count, *(config.size or (32, 32)), config.in_channels)
        data = ImageData(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        rows: list[Row] = []
        exact = None
        for dtype in (torch.float32, torch.bfloat16):
            unet = channels_last(UNet(config).eval().to(self.device, dtype))
            sampler = Sampler(unet, NoiseSchedule.linear(), (config.in_channels, *(config.size or (32, 32))))
            bits = bits_per_dimension(sampler, data, steps, batch_size=batch).mean
            exact = exact or bits
            timing = self.clock(partial(bits_per_dimension, sampler, data, steps, batch_size=batch))
            rate = count * steps / timing.median
            figures = dict(terms_per_s=rate, bits=bits, apart=abs(bits - exact))
            rows.append(dict(what="likelihood", dtype=str(dtype).removeprefix("torch."), **row_of(timing), **figures))
        return rows

    def sampling(self) -> list[Row]:
        """Eager sampling through `Sampler`: some steps of the loop, so img-steps/s; divide by 1000 for images/s at T = 1000."""
        torch.manual_seed(0)
        config = TINY_UNET if self.tiny else UNetConfig()
        schedule, steps = NoiseSchedule.linear(), 3 if self.tiny else 20
        rows: list[Row] = []
        for dtype in (torch.float32, torch.bfloat16):
            unet = channels_last(UNet(config).eval().to(self.device, dtype))
            sampler = Sampler(unet, schedule, (config.in_channels, *(config.size or (32, 32))))
            for batch in (1, 2) if self.tiny else (1, 16, 256):
                if self.late():
                    return [*rows, dict(what="sampling", failed=True, summary="out of time")]
                sampler.sample(batch, steps=2, batch_size=batch)
                timing = self.clock(partial(sampler.sample, batch, steps=steps, batch_size=batch))
                per_step = timing.median / steps
                rows.append(
                    dict(
                        what="eager sampling",
                        dtype=str(dtype).removeprefix("torch."),
                        batch=batch,
                        steps=steps,
                        **row_of(timing),
                        ms_per_step=1e3 * per_step,
                        image_steps_per_s=batch / per_step,
                    )
                )
        return rows + self._shipped()

    def _shipped(self) -> list[Row]:
        """The weights that ship, DDIM: whole images, if safetensors is there to read them."""
        try:
            import safetensors  # noqa: F401
        except ImportError:
            return [dict(what="shipped weights", summary="safetensors is not installed: left out")]
        found = sorted(p.parent for p in (ROOT / "weights").glob("*/model_index.json"))
        rows: list[Row] = []
        for directory in found:
            sampler = Sampler.from_pretrained(directory, self.device)
            count, steps = (2, 2) if self.tiny else (256, 50)
            sampler.sample(count, solver="ddim", steps=2, batch_size=count)
            timing = self.clock(partial(sampler.sample, count, solver="ddim", steps=steps, batch_size=count))
            rate = count / timing.median
            rows.append(dict(what=f"{directory.name}, ddim", batch=count, steps=steps, **row_of(timing), images_per_s=rate))
        return rows


def row_of(timing: Timing) -> Row:
    return dict(ms=1e3 * timing.median, spread=timing.spread, runs=timing.runs)


def table_of(rows: list[Row]) -> str:
    """One line a row: what it is, on what, and its figures."""
    lines = []
    for row in rows:
        shown = {k: v for k, v in row.items() if k not in ("what", "output", "runs", "bytes") and v is not None}
        lines.append(f"  {row['what']:26} " + "  ".join(f"{k} {_short(v)}" for k, v in shown.items()))
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "x".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/gpu-DATE.json)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts, by the names under which the results stand")
    args = parser.parse_args()
    bench = Bench(args.tiny)
    if bench.device.type == "cpu" and not args.tiny:
        parser.error("no GPU found; --tiny runs the same in tiny sizes on the CPU")
    parts = bench.parts()
    if unknown := set(args.only or ()) - set(parts):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    now = datetime.now(timezone.utc)
    out = args.out or ROOT / "bench" / "results" / f"gpu-{now:%Y-%m-%d-%H%M}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    command = f"python -m bench.gpu {' '.join(sys.argv[1:])}".strip()
    result: Row = dict(command=command, date=now.isoformat(timespec="seconds"), tiny=args.tiny, environment=environment(), parts={})
    failed = False
    for name, (part, budget) in parts.items():
        if args.only and name not in args.only:
            continue
        began = time.monotonic()
        bench.until = began + budget
        try:
            rows = part()
        except Exception as error:  # a part that breaks must not take the others' results with it
            traceback.print_exc()
            rows = [dict(what=name, failed=True, summary=f"{type(error).__name__}: {error}")]
        failed |= any(row.get("failed") for row in rows)
        result["parts"][name] = dict(seconds=round(time.monotonic() - began, 1), rows=rows)
        write(out, result)
        print(f"{name} ({result['parts'][name]['seconds']} s)\n{table_of(rows)}", flush=True)
    print(f"-> {out}" + (", with failures" if failed else ""))
    return int(failed)


def write(path: Path, result: Row) -> None:
    """The results so far, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
