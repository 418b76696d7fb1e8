"""Training speed beside what users would run instead: `python -m bench.training`.

Every engine trains the same network on the same images in a process of its own, so that none profits from another's settings,
and they take turns: a burst of steps each, round after round. First each says its loss on the same input, which must agree.

    ddpm_fast       `Trainer`
    PyTorch's norm  `Trainer` without the native engine's GroupNorm (--norms: these two alone, for before and after)
    compiled        `Trainer` with compile=True (--compile: takes minutes)
    plain PyTorch   the reference UNet in the usual loop: randn, AdamW, clip_grad_norm_, an average over the parameters
    diffusers       UNet2DModel, DDPMScheduler.add_noise and EMAModel, in the loop of its train_unconditional.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import NoiseSchedule, UNet, UNetConfig
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.training import cpu_ops as cpu_training
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.trainer import AUTOCAST, Trainer
from ddpm_fast.utils.environment import environment

ENGINES = ("ddpm_fast", "compiled", "plain PyTorch", "diffusers")
NORMS = ("ddpm_fast", "PyTorch's norm")
RATE, DECAY = 1e-3, 0.999
Step = Callable[[], Any]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def network(channels: tuple[int, ...], layers: int = 1) -> UNet:
    """The network that every engine trains, with the same weights."""
    torch.manual_seed(0)
    attention = tuple(i == len(channels) - 1 for i in range(len(channels)))
    config = UNetConfig(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        channels=channels,
        layers=layers,
        attention=attention,
        head_dim=min(32, channels[-1]),
        norm_groups=8,
        downsample_padding=1,
        num_classes=10,
    )
    return UNet(config)


def autocast_to(precision: str, device: torch.device) -> Any:
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def images() -> ImageData:
    """Noise in the shape of Fashion-MNIST: what is trained on does not change how long it takes."""
    generator = np.random.default_rng(0)
    return ImageData(generator.integers(0, 256, (4096, 32, 32, 1), dtype=np.uint8), generator.integers(0, 10, 4096))


def ours(channels: tuple[int, ...], batch: int, precision: str, device: torch.device, compile: bool = False) -> tuple[Step, Loss]:
    config = TrainConfig(batch, learning_rate=RATE, ema_decays=(DECAY,), mixed_precision=precision, compile=compile)
    trainer = Trainer(network(channels), NoiseSchedule.linear(), images(), config, device)

    def loss_of(x_t: Tensor, t: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        with autocast_to(precision, device):
            return F.mse_loss(trainer.unet(x_t, t, labels).float(), eps)

    return trainer.step, loss_of


def plain(channels: tuple[int, ...], batch: int, precision: str, device: torch.device) -> tuple[Step, Loss]:
    unet = network(channels).to(device)
    average = [p.detach().clone() for p in unet.parameters()]
    bar = torch.from_numpy(NoiseSchedule.linear().alpha_bar.copy()).float().to(device)

    def noised(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a = bar[t].view(-1, 1, 1, 1)
        return a.sqrt() * x_0 + (1 - a).sqrt() * eps

    def update() -> None:
        with torch.no_grad():
            for mean, p in zip(average, unet.parameters(), strict=True):
                mean.lerp_(p, 1 - DECAY)

    return _usual_loop(unet, lambda x, t, labels: unet(x, t, labels), noised, update, batch, precision, device)


def of_diffusers(channels: tuple[int, ...], batch: int, precision: str, device: torch.device) -> tuple[Step, Loss]:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    reference = network(channels)
    unet = UNet2DModel.from_config(reference.config.to_diffusers())
    unet.load_state_dict(reference.state_dict())
    unet.to(device)
    scheduler: Any = DDPMScheduler()
    average = EMAModel(unet.parameters(), decay=DECAY)
    call = lambda x, t, labels: unet(x, t, class_labels=labels).sample
    return _usual_loop(unet, call, scheduler.add_noise, lambda: average.step(unet.parameters()), batch, precision, device)


def _usual_loop(
    unet: Any, call: Any, noised: Any, update: Step, batch: int, precision: str, device: torch.device
) -> tuple[Step, Loss]:
    """What train_unconditional.py does between two batches."""
    data = images()
    x_all = torch.from_numpy(data.images).permute(0, 3, 1, 2) / 127.5 - 1
    y_all = torch.from_numpy(np.asarray(data.labels))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x_all, y_all), batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6)

    def batches() -> Any:
        while True:
            yield from loader

    def loss_of(x_t: Tensor, t: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        return F.mse_loss(call(x_t, t, labels).float(), eps)

    source = batches()

    def step() -> None:
        x_0, labels = (v.to(device) for v in next(source))
        eps = torch.randn(x_0.shape, device=device)
        t = torch.randint(0, 1000, (len(x_0),), device=device)
        with autocast_to(precision, device):
            loss = loss_of(noised(x_0, eps, t), t, labels, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update()

    return step, loss_of


# ---- one process for each engine


def serve(name: str, channels: tuple[int, ...], batch: int, precision: str) -> None:
    """Says its loss on a fixed input and how long its first step took; then, for every number on stdin, how long so many take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = {"plain PyTorch": plain, "diffusers": of_diffusers}.get(name, ours)
    more = dict(compile=True) if name == "compiled" else {}
    if name == "PyTorch's norm":
        cpu_training.native = None  # type: ignore[assignment]
    step, loss_of = make(channels, batch, precision, device, **more)
    generator = torch.Generator().manual_seed(1)
    x_t, eps = (torch.randn(8, 1, 32, 32, generator=generator).to(device) for _ in range(2))
    with torch.no_grad(), autocast_to(precision, device):
        loss = float(loss_of(x_t, torch.arange(0, 1000, 125, device=device), torch.arange(8, device=device), eps))
    first = _seconds(step, 1, device)
    print(json.dumps(dict(loss=loss, first=first)), flush=True)
    for line in sys.stdin:
        print(_seconds(step, int(line), device), flush=True)


def _seconds(step: Step, count: int, device: torch.device) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Engine:
    """A process that trains when asked."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        command = [sys.executable, "-m", "bench.training", "--serve", name, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = json.loads(self._read())

    def seconds(self, steps: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return line

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def compare(names: list[str], channels: str, batch: int, precision: str, rounds: int, steps: int) -> dict[str, Any]:
    """Images per second of every engine, and how much faster the first is: median over rounds, with the rounds' extremes."""
    arguments = ["--channels", channels, "--batch-size", str(batch), "--precision", precision]
    engines = [Engine(name, arguments) for name in names]
    losses = {engine.name: engine.hello["loss"] for engine in engines}
    if max(losses.values()) - min(losses.values()) > (1e-4 if precision == "no" else 1e-3) * max(losses.values()):
        raise RuntimeError(f"the engines disagree, so nothing is timed: {losses}")
    for engine in engines:
        engine.seconds(2)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for engine in engines:
            time.sleep(0.2)  # a pool of threads that still spins is no longer there
            times[engine.name].append(engine.seconds(steps))
    for engine in engines:
        engine.close()
    rows = []
    for engine in engines:
        ratios = sorted(theirs / mine for theirs, mine in zip(times[engine.name], times[names[0]], strict=True))
        rate = batch * steps / statistics.median(times[engine.name])
        rows.append(
            dict(
                engine=engine.name,
                images_per_second=round(rate, 1),
                ours_is_faster_by=round(statistics.median(ratios), 3),
                from_to=[round(ratios[0], 3), round(ratios[-1], 3)],
                first_step_seconds=round(engine.hello["first"], 2),
                loss=engine.hello["loss"],
            )
        )
    return dict(channels=channels, batch_size=batch, precision=precision, rounds=rounds, steps=steps, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--channels", default="32,64,96")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="mixed precision")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--norms", action="store_true", help="with and without the native GroupNorm")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, tuple(map(int, args.channels.split(","))), args.batch_size, args.precision)
    names = list(NORMS) if args.norms else [name for name in ENGINES if args.compile or name != "compiled"]
    result = compare(names, args.channels, args.batch_size, args.precision, args.rounds, args.steps)
    print(f"widths {args.channels}, batch {args.batch_size}, {args.precision}; {args.rounds} rounds of {args.steps} steps")
    for row in result["rows"]:
        low, high = row["from_to"]
        print(
            f"  {row['engine']:14} {row['images_per_second']:7.1f} images/s   ours is {row['ours_is_faster_by']:.2f} x as fast "
            f"({low:.2f} to {high:.2f})   first step {row['first_step_seconds']:.1f} s"
        )
    if args.out:
        args.out.write_text(json.dumps(dict(environment=environment(), **result), indent=2) + "\n")


if __name__ == "__main__":
    main()
