"""denoising-diffusion-pytorch, which has a network of its own, beside ours at equal FLOPs: another function, so this is no ratio of
engines for one, but what a second of this machine brings in either.

It would replace the torch that is here, so it lives in an environment of its own, whose Python runs this same file:

    python -m venv E && E/bin/pip install denoising-diffusion-pytorch
    python -m bench.other_network --python E/bin/python [--batch 1 4] [--out FILE.json]

Its network is made as wide as comes nearest to the FLOP of the CIFAR-10 network; both draw by DDIM, each in its own loop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

STEPS = 5
NAME = "denoising-diffusion-pytorch"


# ---- in its environment: torch and the package, nothing of ours


def _network(width: int) -> Any:
    """Ho et al.'s shape: widths 1, 2, 2, 2 and full attention at the second level, as in the CIFAR-10 network."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # its trainer alone needs that
        import types

        stub: Any = types.ModuleType("torchvision")
        stub.transforms = stub.utils = types.ModuleType("torchvision.transforms")
        sys.modules.update({"torchvision": stub, "torchvision.transforms": stub.transforms, "torchvision.utils": stub.utils})
    import denoising_diffusion_pytorch as package

    return package, package.Unet(width, dim_mults=(1, 2, 2, 2), full_attn=(False, True, False, False)).eval().requires_grad_(False)


def _flops(network: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def serve(flops: int, threads: int) -> None:
    """Says what it made, then for every batch size on stdin the seconds of a loop."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    best = min(range(32, 193, 8), key=lambda width: abs(_flops(_network(width)[1]) - flops))
    package, network = _network(best)
    chain = package.GaussianDiffusion(network, image_size=32, timesteps=1000, sampling_timesteps=STEPS).eval()
    hello = dict(width=best, flops=_flops(network), parameters=sum(p.numel() for p in network.parameters()))
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        with torch.no_grad():
            images = chain.sample(batch_size=int(line))
        seconds = time.perf_counter() - began
        right = bool(images.isfinite().all()) and images.shape == (int(line), 3, 32, 32)
        print(json.dumps(dict(seconds=seconds, right=right)), file=answers, flush=True)


# ---- here


class Theirs:
    def __init__(self, python: str, flops: int, threads: int) -> None:
        command = [python, str(Path(__file__)), "--serve", str(flops), "--threads", str(threads)]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(command, text=True, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.hello = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{NAME}: its process ended with {self._process.wait()}")
        return json.loads(line)

    def seconds(self, batch: int) -> float:
        assert self._process.stdin is not None
        print(batch, file=self._process.stdin, flush=True)
        answer = self._read()
        if not answer["right"]:
            raise RuntimeError(f"{NAME}: no images came")
        return answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(python: str, batches: list[int], rounds: int = 6) -> dict[str, Any]:
    from bench.networks import NETWORKS
    from ddpm_fast import NoiseSchedule, Sampler, UNet
    from ddpm_fast.benchmark.results import provenance
    from ddpm_fast.benchmark.runner import figures
    from ddpm_fast.models.flops import unet_cost

    torch.manual_seed(0)
    unet = UNet(NETWORKS["cifar10"]).eval()
    sampler = Sampler(unet, NoiseSchedule.linear(), (3, 32, 32))
    cost = unet_cost(unet.config)
    theirs = Theirs(python, cost.flops, torch.get_num_threads())
    rows = []
    try:
        for batch in batches:
            times: dict[str, list[float]] = {"ddpm_fast": [], NAME: []}
            for i in range(rounds + 1):
                for name, own in times.items():
                    time.sleep(0.2)
                    began = time.perf_counter()
                    if name == NAME:
                        seconds = theirs.seconds(batch)
                    else:
                        sampler.sample(batch, solver="ddim", steps=STEPS, batch_size=batch, output="float")
                        seconds = time.perf_counter() - began
                    own.extend([seconds / batch / STEPS] * (i > 0))  # the first is for warming up
            for name, own in times.items():
                rows.append(dict(engine=name, batch=batch, loop=figures(own, times["ddpm_fast"])))
    finally:
        theirs.close()
    mine = dict(flops=cost.flops, parameters=cost.parameters, engine=sampler.engine.name)
    return dict(**provenance(), steps=STEPS, rounds=rounds, networks={"ddpm_fast": mine, NAME: theirs.hello}, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of its environment")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads)
    if not args.python:
        parser.error("--python E/bin/python is needed, of an environment that has denoising-diffusion-pytorch")
    result = compare(args.python, args.batch)
    for name, network in result["networks"].items():
        print(f"{name}: {network['parameters']:,} parameters, {network['flops'] / 1e9:.2f} GFLOP an image and step")
    for row in result["rows"]:
        loop = row["loop"]
        low, high = loop["from_to"]
        ratio = f"{loop['ours_is_faster_by']:.2f} ({low:.2f} to {high:.2f})"
        print(f"  batch {row['batch']}: {row['engine']:28} {loop['ms']:7.2f} ms an image and step, ours faster by {ratio}")
    if args.out:
        from ddpm_fast.benchmark.results import write

        write(args.out, result)


if __name__ == "__main__":
    main()
