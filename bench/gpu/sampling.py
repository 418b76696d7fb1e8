"""Parts of `bench.gpu`: sampling loops and forward passes of ddpm_fast and of the baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bench.gpu.context import Bench
from bench.workloads import WEIGHTS
from ddpm_fast import Checkpoint, load_pretrained
from ddpm_fast.benchmark.baselines import DdpmFast
from ddpm_fast.benchmark.engines import EngineFailed
from ddpm_fast.benchmark.runner import Effort, Progress, Stage, compare
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.benchmark.workload import Cause, Workload


class Fused(DdpmFast):
    """`Sampler` with the fused engine instead of the automatic choice."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, "fused")


DDPM_FAST = "ddpm_fast"
FUSED = f"{__name__}:{Fused.__name__}"
Steps = int | Mapping[int, int]  # of a loop: of all, or by batch size


def celebahq256(bench: Bench) -> Iterator[Row]:
    """The 256x256 network, batch 16."""
    yield from _network(bench, "celebahq256", (16,), 10)


def sampling(bench: Bench) -> Iterator[Row]:
    """The weights of this repository, then the CIFAR-10 network."""
    try:
        checkpoint = load_pretrained(WEIGHTS)
    except ImportError:
        yield dict(what="sampling", summary=f"{WEIGHTS.name} left out: no safetensors")
    else:
        checkpoint.unet.to(bench.device)
        for dtype in ("fp32", "bf16"):
            batch = 2 if bench.tiny else 256
            yield from _compare(bench, checkpoint, WEIGHTS.name, 50, dtype, [DDPM_FAST], [batch])
    steps = {1: 100, 16: 20, 256: 20, 1024: 20}
    yield from _network(bench, "cifar10", (1, 16, 256, 1024), steps)


def _network(bench: Bench, network: str, batches: tuple[int, ...], steps: Steps) -> Iterator[Row]:
    """Baselines run at most 256 images, and torch.compile one batch size."""
    batches = (2,) if bench.tiny else batches
    few = [batch for batch in batches if batch <= 256]
    run = partial(_compare, bench, bench.checkpoint(network), network, steps)
    if "fp8" in bench.dtypes:
        yield from run("fp8", [FUSED], batches)
    yield from run("bf16", [FUSED, "plain PyTorch", "diffusers"], few)
    if not bench.tiny:  # last, since compiling takes half a minute per batch size
        yield from run("bf16", [FUSED, "torch.compile"], [max(few)])


def _compare(
    bench: Bench,
    checkpoint: Checkpoint,
    network: str,
    steps: Steps,
    dtype: str,
    engines: Sequence[str],
    batches: Sequence[int],
) -> Iterator[Row]:
    """A row per engine and batch size; complete cases are kept if the part is out of time."""
    rows: list[Row] = []

    def add(progress: Progress) -> None:
        if progress.stage is Stage.CASE:
            case = progress.result["cases"][-1]
            rows.extend(_row_of(case, row, network) for row in case["rows"])
        elif progress.stage is Stage.LEFT_OUT:
            failed = progress.cause is Cause.FAILED
            what = dict(what="sampling", network=network, summary=progress.message)
            rows.append(what | dict(failed=True) if failed else what)

    burst, steps = (0.002, 2) if bench.tiny else (0.1, steps)
    effort = Effort(0, burst, rest=0, steps=steps)
    try:
        compare(checkpoint, batches, [dtype], engines, effort, roofline=False, progress=add)
    except EngineFailed as error:
        rows.append(dict(what="sampling", network=network, failed=True, summary=str(error)))
    finally:
        yield from rows


def _row_of(case: dict[str, Any], row: dict[str, Any], network: str) -> Row:
    batch, loop = case["batch"], row["loop"]
    return dict(
        what=row["name"],
        engine=DDPM_FAST if row["engine"] == FUSED else row["engine"],
        dtype=case["dtype"],
        network=network,
        batch=batch,
        steps=case["steps"],
        ms_per_step=batch * loop["ms"],
        low=batch * loop["low"],
        high=batch * loop["high"],
        forward_ms=batch * row["forward"]["ms"],
        image_steps_per_s=1e3 / loop["ms"],
        peak_gib=row["peak_bytes"] / 2**30 if case["device"] == "cuda" else None,
        error=row["error"],
    )
