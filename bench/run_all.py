"""Comparison of ddpm_fast with every baseline on the shipped weights and on the CIFAR-10 network, in ten minutes.

    python -m bench.run_all                                     on this machine, into bench-results/ (`make bench`)
    python -m bench.run_all --out DIR                           into another folder
    python -m bench.run_all --networks cifar10 --seconds 120    one network, more rounds

Writes a file per network, as `ddpm-fast bench` does (its `--compare` reads it), and a figure. The CIFAR-10 network has random
weights: the time does not depend on them. `python -m bench.report --results DIR --machine NAME` commits the files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.workloads import NETWORKS, OUT, ROOT
from ddpm_fast import NoiseSchedule, UNet, save_pretrained
from ddpm_fast.benchmark import results
from ddpm_fast.benchmark.baselines import BASELINES
from ddpm_fast.benchmark.figures import draw
from ddpm_fast.benchmark.kernels import ceilings, kernel_times
from ddpm_fast.benchmark.runner import Effort, comparison
from ddpm_fast.benchmark.worker import Setting

BATCHES = {
    "cpu": {"fashion-mnist-32": (1, 16), "cifar10": (1, 4)},
    "cuda": {"fashion-mnist-32": (1, 64), "cifar10": (1, 256)},
}
WARM_START_LIMITS = {"fashion-mnist-32": 20.0}  # seconds: `Effort.warm_start_limit`


def weights_of(name: str, folder: Path) -> Path:
    """Folder of the network's checkpoint."""
    if name == "fashion-mnist-32":
        return ROOT / "weights" / name
    torch.manual_seed(0)
    save_pretrained(folder / name, UNet(NETWORKS[name]), NoiseSchedule.linear())
    return folder / name


def run(
    name: str, batches: tuple[int, ...], weights: Path, seconds: float, baselines: list[str]
) -> results.Result:
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    setting = Setting(str(weights), dtype, device, torch.get_num_threads())
    workload = setting.workload()
    result = results.empty_result(workload, name, len(workload.checkpoint.schedule))
    log = lambda line: print(line, flush=True)
    effort = Effort(seconds, warm_start_limit=WARM_START_LIMITS.get(name, 0))
    with comparison(setting, baselines, batches[0], effort, log) as c:
        for batch in batches:
            result["cases"].append(c.case(batch))
            log(results.table_of(result["cases"][-1], result["network"]) + "\n")
    result["ceilings"] = ceilings(workload.device, dtype)
    result["kernels"] = kernel_times(workload, batches[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--networks", nargs="+", choices=list(BATCHES[device]), default=list(BATCHES[device])
    )
    parser.add_argument("--batches", type=int, nargs="+", help="default: as in the tables")
    parser.add_argument(
        "--seconds", type=float, default=0, help="per batch size; there are at least six rounds"
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
            batches = tuple(args.batches or BATCHES[device][name])
            result = run(
                name, batches, weights_of(name, Path(folder)), args.seconds, args.baselines
            )
        file = args.out / f"{name}.json"
        results.write(file, result)
        draw(result, file.with_suffix(".png"))
        print(
            f"-> {file}, {file.with_suffix('.png')}; {time.perf_counter() - start:.0f} s so far\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
