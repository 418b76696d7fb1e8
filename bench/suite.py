"""Ours beside everything that can be installed, on the weights that ship and on the CIFAR-10 network: `make bench`, ten minutes.

    python -m bench.suite                     on this machine, into bench/results/ and docs/figures/
    python -m bench.suite --out DIR           the files elsewhere
    python -m bench.suite --networks cifar10 --seconds 120    one network, more rounds

For each network a file as `ddpm-fast bench` writes it (so `ddpm-fast bench --compare` reads it) and a picture. The CIFAR-10 network
has random weights: what they are does not change how long it takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.networks import NETWORKS, ROOT
from ddpm_fast import NoiseSchedule, UNet, save_pretrained
from ddpm_fast.benchmark import results
from ddpm_fast.benchmark.baselines import BASELINES
from ddpm_fast.benchmark.figures import draw
from ddpm_fast.benchmark.kernels import ceilings, points
from ddpm_fast.benchmark.runner import Effort, race
from ddpm_fast.benchmark.worker import Setting

BATCHES = {"cpu": {"fashion-mnist-32": (1, 16), "cifar10": (1, 4)}, "cuda": {"fashion-mnist-32": (1, 64), "cifar10": (1, 256)}}
AGAIN = {"fashion-mnist-32": 20.0}  # seconds: who begins faster is begun a second time, with what was kept


def weights_of(name: str, folder: Path) -> Path:
    """A checkpoint's folder."""
    if name == "fashion-mnist-32":
        return ROOT / "weights" / name
    torch.manual_seed(0)
    save_pretrained(folder / name, UNet(NETWORKS[name]), NoiseSchedule.linear())
    return folder / name


def run(name: str, batches: tuple[int, ...], weights: Path, seconds: float, baselines: list[str]) -> results.Result:
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    setting = Setting(str(weights), dtype, device, torch.get_num_threads())
    subject = setting.subject()
    result = results.begin(subject, name, len(subject.checkpoint.schedule))
    say = lambda line: print(line, flush=True)
    with race(setting, baselines, batches[0], Effort(seconds, again=AGAIN.get(name, 0)), say) as r:
        for batch in batches:
            result["cases"].append(r.case(batch))
            say(results.table_of(result["cases"][-1], result["network"]) + "\n")
    result["ceilings"] = ceilings(subject.device, dtype)
    result["launches"] = points(subject, batches[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--networks", nargs="+", choices=list(BATCHES[device]), default=list(BATCHES[device]))
    parser.add_argument("--batches", type=int, nargs="+", help="default: as in the tables")
    parser.add_argument("--seconds", type=float, default=0, help="of rounds, for each batch size; there are at least six rounds")
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), help="the first is measured against")
    parser.add_argument("--out", type=Path, help="folder for files and pictures")
    args = parser.parse_args()
    began = time.perf_counter()
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            batches = tuple(args.batches or BATCHES[device][name])
            result = run(name, batches, weights_of(name, Path(folder)), args.seconds, args.baselines)
        file = (args.out or ROOT / "bench" / "results") / f"{device}-{name}.json"
        picture = (args.out or ROOT / "docs" / "figures") / f"bench-{device}-{name}.png"
        results.write(file, result)
        draw(result, picture)
        print(f"-> {file}, {picture}; {time.perf_counter() - began:.0f} s so far\n", flush=True)


if __name__ == "__main__":
    main()
