"""Comparison with denoising-diffusion-pytorch, which has another network, at equal FLOP.

The two networks compute different functions, so the ratio is not a speedup of one engine over
another; it compares the images per second of this machine with either.

The package would replace the installed torch, so it needs a separate environment, whose Python
runs this file:

    python -m venv E && E/bin/pip install denoising-diffusion-pytorch
    python -m bench.studies.other_network --python E/bin/python [--batch 1 4] [--out FILE.json]

The width of its network is the nearest to the FLOP of the CIFAR-10 network. Both sample by DDIM,
each package in its sampling loop.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

STEPS = 5
NAME = "denoising-diffusion-pytorch"


# ---- in the environment of the package: torch, without ddpm_fast


def _network(width: int) -> Any:
    """The package and a network shaped as the CIFAR-10 network of Ho et al. (2020)."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # only the package's trainer needs it
        import types

        stub: Any = types.ModuleType("torchvision")
        stub.transforms = stub.utils = types.ModuleType("torchvision.transforms")
        sys.modules.update(
            {
                "torchvision": stub,
                "torchvision.transforms": stub.transforms,
                "torchvision.utils": stub.utils,
            }
        )
    import denoising_diffusion_pytorch as package

    attention = (False, True, False, False)
    unet = package.Unet(width, dim_mults=(1, 2, 2, 2), full_attn=attention)
    return package, unet.eval().requires_grad_(False)


def _flops(network: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def worker(flops: int, threads: int) -> None:
    """Sends the network's cost as a line of JSON; then, per request, the seconds of a loop."""
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stderr

    def send(**message: Any) -> None:
        print(json.dumps(message), file=messages, flush=True)

    torch.set_num_threads(threads)
    width = min(range(32, 193, 8), key=lambda width: abs(_flops(_network(width)[1]) - flops))
    package, network = _network(width)
    diffusion = package.GaussianDiffusion(
        network, image_size=32, timesteps=1000, sampling_timesteps=STEPS
    ).eval()
    send(
        width=width, flops=_flops(network), parameters=sum(p.numel() for p in network.parameters())
    )
    for line in sys.stdin:
        batch = json.loads(line)["batch"]
        start = time.perf_counter()
        with torch.no_grad():
            images = diffusion.sample(batch_size=batch)
        seconds = time.perf_counter() - start
        send(
            seconds=seconds,
            valid=bool(images.isfinite().all()) and images.shape == (batch, 3, 32, 32),
        )


# ---- in this environment


def compare(python: str, batches: list[int], rounds: int = 6) -> dict[str, Any]:
    """Times both networks in turns; `python` is that of the environment with the package."""
    from bench.workloads import NETWORKS, random_checkpoint
    from ddpm_fast import Sampler
    from ddpm_fast.benchmark.results import provenance
    from ddpm_fast.benchmark.rounds import summarize, turns
    from ddpm_fast.models.flops import unet_cost
    from ddpm_fast.utils.subprocess import JsonWorker

    c = random_checkpoint(NETWORKS["cifar10"])
    sampler = Sampler.from_checkpoint(c, "cpu")
    cost = unet_cost(c.unet.config)
    arguments = ["--worker", str(cost.flops), "--threads", str(torch.get_num_threads())]
    command = [python, str(Path(__file__)), *arguments]
    rows = []
    with JsonWorker(NAME, environment=dict(PYTHONPATH=""), command=command) as process:
        network = process.receive()

        def seconds(name: str, batch: int) -> float:
            if name == NAME:
                answer = process.request(dict(batch=batch))
                if not answer["valid"]:
                    raise RuntimeError(
                        f"{NAME} returned no images of the expected shape, or NaN or Inf"
                    )
                return answer["seconds"]
            start = time.perf_counter()
            sampler.sample(batch, solver="ddim", steps=STEPS, batch_size=batch, output="float")
            return time.perf_counter() - start

        for batch in batches:
            times: dict[str, list[float]] = {"ddpm_fast": [], NAME: []}
            for name in times:  # warm-up
                seconds(name, batch)
            for name in turns(list(times), rounds):
                times[name].append(seconds(name, batch) / batch / STEPS)
            for name, values in times.items():
                loop = summarize(values, times["ddpm_fast"])
                rows.append(dict(engine=name, batch=batch, loop=loop))
    fast = dict(flops=cost.flops, parameters=cost.parameters, engine=sampler.engine.name)
    return dict(
        **provenance(),
        steps=STEPS,
        rounds=rounds,
        networks={"ddpm_fast": fast, NAME: network},
        rows=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", help="Python of the environment with denoising-diffusion-pytorch"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.threads)
    if not args.python:
        parser.error(f"--python is missing; give the Python of an environment with {NAME}")
    result = compare(args.python, args.batch)
    for name, network in result["networks"].items():
        gflop = f"{network['flops'] / 1e9:.2f} GFLOP per image per step"
        print(f"{name}: {network['parameters']:,} parameters, {gflop}")
    for row in result["rows"]:
        loop = row["loop"]
        low, high = loop["speedup_range"]
        ratio = f"{loop['speedup']:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"  batch {row['batch']}: {row['engine']:28} {loop['ms']:7.2f} ms per image per step, "
            f"ddpm_fast speedup {ratio}"
        )
    if args.out:
        from ddpm_fast.benchmark.results import write

        write(args.out, result)


if __name__ == "__main__":
    main()
