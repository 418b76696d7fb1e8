"""Comparison of ddpm_fast with every baseline on two networks, in ten minutes.

    python -m bench.run_all                                     into bench-results/ (`make bench`)
    python -m bench.run_all --out DIR                           into another folder
    python -m bench.run_all --networks cifar10 --seconds 120    one network, more rounds

Writes a results file and a figure per network, as `ddpm-fast bench` does, whose `--compare` reads
the file. The Fashion-MNIST network has the weights of this repository; the CIFAR-10 network has
random weights, on which the time does not depend. `python -m bench.report --results DIR --machine
NAME` commits the files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.workloads import NETWORKS, OUT, WEIGHTS, random_checkpoint
from ddpm_fast import save_pretrained
from ddpm_fast.benchmark import Effort, compare, results
from ddpm_fast.benchmark.baselines import BASELINES
from ddpm_fast.benchmark.figures import draw

BATCHES = {
    "cpu": {"fashion-mnist-32": (1, 16), "cifar10": (1, 4)},
    "cuda": {"fashion-mnist-32": (1, 64), "cifar10": (1, 256)},
}
WARM_START_LIMITS = {"fashion-mnist-32": 20.0}  # seconds: `Effort.warm_start_limit`


def weights_of(name: str, folder: Path) -> Path:
    """Folder of the network's checkpoint."""
    if name == WEIGHTS.name:
        return WEIGHTS
    c = random_checkpoint(NETWORKS[name])
    save_pretrained(folder / name, c.unet, c.schedule)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--networks", nargs="+", choices=list(BATCHES[device]), default=list(BATCHES[device])
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", help="batch sizes (default: those of the documents)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0,
        help="shortest time of the rounds per batch size; there are at least six rounds",
    )
    parser.add_argument(
        "--baselines", nargs="+", default=list(BASELINES), help="speedups are those of the first"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder of results and figures (default: %(default)s)"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(
                weights_of(name, Path(folder)),
                args.batches or BATCHES[device][name],
                engines=args.baselines,
                effort=Effort(args.seconds, warm_start_limit=WARM_START_LIMITS.get(name, 0)),
                name=name,
                progress=lambda progress: print(progress.message, flush=True),
            )
        file = args.out / f"{name}.json"
        results.write(file, result)
        draw(result, file.with_suffix(".png"))
        seconds = time.perf_counter() - start
        print(f"-> {file}, {file.with_suffix('.png')}; {seconds:.0f} s in total\n", flush=True)


if __name__ == "__main__":
    main()
