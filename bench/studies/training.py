"""Training speed of ddpm_fast and of its baselines: `python -m bench.studies.training`.

Every engine trains the same network on the same images in a worker process, so that no engine's
settings affect another. Bursts of steps are timed in interleaved rounds. Nothing is timed unless
the losses of the engines on one input agree.

    ddpm_fast       `Trainer`
    PyTorch's norm  `Trainer` without the CPU engine's GroupNorm (--norms: only these two)
    compiled        `Trainer` with compile=True (--compile: takes minutes)
    plain PyTorch   the reference UNet in a plain loop: randn, AdamW, clip_grad_norm_, an average
                    of the parameters
    diffusers       UNet2DModel, DDPMScheduler.add_noise and EMAModel in the loop of
                    diffusers' train_unconditional.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import NoiseSchedule, UNet, UNetConfig
from ddpm_fast.benchmark.results import provenance, write
from ddpm_fast.benchmark.rounds import summarize, turns
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.training import cpu_ops
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.gradient import AUTOCAST
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.subprocess import JsonWorker, json_stdio

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
    """Noise in the shape of Fashion-MNIST: the time does not depend on the images."""
    generator = np.random.default_rng(0)
    return ImageData(
        generator.integers(0, 256, (4096, 32, 32, 1), dtype=np.uint8),
        generator.integers(0, 10, 4096),
    )


def ddpm_fast(
    channels: tuple[int, ...],
    batch: int,
    precision: str,
    device: torch.device,
    compile: bool = False,
) -> tuple[Step, Loss]:
    config = TrainConfig(
        batch, learning_rate=RATE, ema_decays=(DECAY,), mixed_precision=precision, compile=compile
    )
    trainer = Trainer(network(channels), NoiseSchedule.linear(), images(), config, device)

    def loss_of(x_t: Tensor, t: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        with autocast_to(precision, device):
            return F.mse_loss(trainer.unet(x_t, t, labels).float(), eps)

    return trainer.step, loss_of


def pytorch_norm(
    channels: tuple[int, ...], batch: int, precision: str, device: torch.device
) -> tuple[Step, Loss]:
    """`Trainer` with PyTorch's GroupNorm instead of the CPU engine's."""
    cpu_ops.cpu_norm = None  # type: ignore[assignment]  # in this worker process only
    return ddpm_fast(channels, batch, precision, device)


def plain(
    channels: tuple[int, ...], batch: int, precision: str, device: torch.device
) -> tuple[Step, Loss]:
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

    return _plain_loop(
        unet, lambda x, t, labels: unet(x, t, labels), noised, update, batch, precision, device
    )


def diffusers(
    channels: tuple[int, ...], batch: int, precision: str, device: torch.device
) -> tuple[Step, Loss]:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    reference = network(channels)
    unet = UNet2DModel.from_config(reference.config.to_diffusers())
    unet.load_state_dict(reference.state_dict())
    unet.to(device)
    scheduler: Any = DDPMScheduler()
    average = EMAModel(unet.parameters(), decay=DECAY)
    call = lambda x, t, labels: unet(x, t, class_labels=labels).sample
    return _plain_loop(
        unet,
        call,
        scheduler.add_noise,
        lambda: average.step(unet.parameters()),
        batch,
        precision,
        device,
    )


def _plain_loop(
    unet: Any,
    call: Any,
    noised: Any,
    update: Step,
    batch: int,
    precision: str,
    device: torch.device,
) -> tuple[Step, Loss]:
    """The training step of diffusers' train_unconditional.py."""
    data = images()
    x_all = torch.from_numpy(data.images).permute(0, 3, 1, 2) / 127.5 - 1
    y_all = torch.from_numpy(np.asarray(data.labels))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x_all, y_all), batch, shuffle=True, drop_last=True
    )
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6
    )

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


Create = Callable[[tuple[int, ...], int, str, torch.device], tuple[Step, Loss]]
DDPM_FAST, COMPILED, PYTORCH_NORM = "ddpm_fast", "compiled", "PyTorch's norm"
ENGINES: dict[str, Create] = {
    DDPM_FAST: ddpm_fast,
    COMPILED: partial(ddpm_fast, compile=True),
    PYTORCH_NORM: pytorch_norm,
    "plain PyTorch": plain,
    "diffusers": diffusers,
}
LOSS_TOLERANCES = {"no": 1e-4, "bf16": 1e-3}  # relative difference between the engines


def fixed_loss(loss_of: Loss, precision: str, device: torch.device) -> float:
    """Loss on a fixed input; must agree between the engines."""
    generator = torch.Generator().manual_seed(1)
    x_t, eps = (torch.randn(8, 1, 32, 32, generator=generator).to(device) for _ in range(2))
    t, labels = torch.arange(0, 1000, 125, device=device), torch.arange(8, device=device)
    with torch.no_grad(), autocast_to(precision, device):
        return float(loss_of(x_t, t, labels, eps))


# ---- one process per engine


def worker(engine: str, channels: list[int], batch: int, precision: str) -> None:
    """Sends the loss on a fixed input and the time of a step; then times the requested steps."""
    requests, send = json_stdio()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, loss_of = ENGINES[engine](tuple(channels), batch, precision, device)
    loss = fixed_loss(loss_of, precision, device)
    send(dict(loss=loss, seconds=_seconds(step, 1, device)))
    for request in requests:
        send(dict(seconds=_seconds(step, request["steps"], device)))


def _seconds(step: Step, count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    names: list[str], channels: list[int], batch: int, precision: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Images per second of every engine, and speedups of the first: medians with their ranges."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                JsonWorker(
                    "bench.studies.training",
                    ["--worker", json.dumps([name, channels, batch, precision])],
                )
            )
            for name in names
        }
        first = {name: process.receive() for name, process in workers.items()}
        losses = {name: message["loss"] for name, message in first.items()}
        least, most = min(losses.values()), max(losses.values())
        if most - least > LOSS_TOLERANCES[precision] * most:
            raise RuntimeError(
                f"the losses of the engines on one input differ, so nothing is timed: {losses}"
            )
        for process in workers.values():
            process.request(dict(steps=2))
        for name in turns(names, rounds):
            times[name].append(workers[name].request(dict(steps=steps))["seconds"])
    rows = []
    for name in names:
        summary = summarize(times[name], times[names[0]])
        rows.append(
            dict(
                engine=name,
                images_per_second=round(1e3 * batch * steps / summary["ms"], 1),
                speedup=summary["speedup"],
                speedup_range=summary["speedup_range"],
                first_step_seconds=round(first[name]["seconds"], 2),
                loss=losses[name],
            )
        )
    settings = dict(
        channels=",".join(map(str, channels)),
        batch_size=batch,
        precision=precision,
        rounds=rounds,
        steps=steps,
    )
    return dict(**settings, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--channels", type=lambda text: [int(c) for c in text.split(",")], default=[32, 64, 96]
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="mixed precision")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps per round")
    parser.add_argument("--compile", action="store_true", help="include `compiled`")
    parser.add_argument(
        "--norms",
        action="store_true",
        help="compare only GroupNorm of the CPU engine and of PyTorch",
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    excluded = {PYTORCH_NORM} if args.compile else {PYTORCH_NORM, COMPILED}
    names = [name for name in ENGINES if name not in excluded]
    names = [DDPM_FAST, PYTORCH_NORM] if args.norms else names
    result = compare(names, args.channels, args.batch_size, args.precision, args.rounds, args.steps)
    print(
        f"channels {result['channels']}, batch {args.batch_size}, {args.precision}; "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    for row in result["rows"]:
        low, high = row["speedup_range"]
        print(
            f"  {row['engine']:14} {row['images_per_second']:7.1f} images/s   "
            f"ddpm_fast speedup {row['speedup']:.2f} ({low:.2f} to {high:.2f})   "
            f"first step {row['first_step_seconds']:.1f} s"
        )
    if args.out:
        write(args.out, dict(**provenance(), **result))


if __name__ == "__main__":
    main()
