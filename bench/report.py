"""The documents' tables, made from the results that are kept: nobody copies a figure by hand.

    python -m bench.report           rewrites the tables
    python -m bench.report --check   exit code 1 where a document does not say what the results do

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. What is predicted is computed from the plans and marked as such;
what is measured comes from bench/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.networks import NETWORKS, ROOT
from bench.precision import markdown
from ddpm_fast import UNet
from ddpm_fast.benchmark.clock import Row
from ddpm_fast.fused_unet import FusedUNet
from ddpm_fast.roofline import GAP, GPUS, estimate

RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("docs/performance.md", "docs/cpu.md", "docs/precision.md")
H100 = GPUS["h100"]
NAMES = {"cifar10": "CIFAR-10", "celebahq256": "CelebA-HQ 256", "shipped": "Fashion-MNIST", "cifar": "CIFAR-10"}
PREDICTED = [("cifar10", 1, "bf16"), ("cifar10", 16, "bf16"), ("cifar10", 256, "bf16"), ("cifar10", 256, "fp8")]
PREDICTED += [("cifar10", 1024, "fp8"), ("celebahq256", 16, "bf16"), ("celebahq256", 16, "fp8")]


def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- predicted


def predict(network: str, batch: int, dtype: str) -> Row:
    """Milliseconds of a forward pass and of a step on an H100: floor by its peaks, and what to expect."""
    with torch.device("meta"):
        unet = UNet(NETWORKS[network])
    fused = FusedUNet(unet, batch, dtype, "meta", check=False)
    estimates = [estimate(launch, H100) for launch in fused.plan()]
    forward = sum(e.predicted for e in estimates)
    elements = batch * fused.plan().x.channels * fused.plan().x.height * fused.plan().x.width
    update = elements * 20 / H100.copy + 2 * GAP  # x_t, out and x_0 of the step before read, x_t-1 and x_0 written; then `advance`
    return dict(
        launches=len(estimates),
        floor=1e3 * sum(e.floor for e in estimates),
        forward=1e3 * forward,
        step=1e3 * (forward + update),
        rate=batch / (forward + update),
    )


def compiled(network: str, batch: int) -> Row | None:
    """What torch.compile took on an H100, measured."""
    rows = [r for r in results("peers-h100.json")["loops"] if (r["network"], r["batch"]) == (network, batch)]
    return next((r for r in rows if "compile" in r["how"]), None)


def predicted_table() -> str:
    rows = []
    for network, batch, dtype in PREDICTED:
        p, peer = predict(network, batch, dtype), compiled(network, batch)
        theirs = f"{peer['step_ms']:g}" if peer else ""
        ratio = f"{peer['step_ms'] / p['step']:.2f}" if peer else ""
        where = [f"{NAMES[network]}, {batch}", dtype, str(p["launches"] + 2)]
        rows.append([*where, f"{p['floor']:.3g}", f"{p['forward']:.3g}", f"{p['step']:.3g}", f"{p['rate']:,.0f}", theirs, ratio])
    head = ["network, batch", "type", "launches a step", "floor ms", "forward ms, predicted", "step ms, predicted"]
    return table([*head, "img-steps/s, predicted", "torch.compile bf16 step ms, measured", "ratio, predicted"], rows)


def bars_table() -> str:
    """Each bar of `bench.gpu` with its prediction. The elementwise kernels' is `bench.predict`'s, in docs/gpu.md."""
    from bench.gpu_bars import BARS

    found: dict[str, Any] = {
        "CelebA-HQ 256, batch 16, bf16: times torch.compile": _ratio("celebahq256", 16, "bf16"),
        "CIFAR-10, batch 1, bf16: ms a step": predict("cifar10", 1, "bf16")["step"],
        "CIFAR-10, batch 1024, fp8: img-steps/s": predict("cifar10", 1024, "fp8")["rate"],
        "CIFAR-10, batch 256, fp8: times torch.compile bf16": _ratio("cifar10", 256, "fp8"),
        "CIFAR-10, batch 256, bf16: times torch.compile": _ratio("cifar10", 256, "bf16"),
    }
    rows = []
    for what, _, bar, goal, less in BARS:
        value = found.get(what)
        meets = lambda wanted, value=value, less=less: value <= wanted if less else value >= wanted
        said = "see [gpu.md](gpu.md)" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        judged = "the goal" if value is not None and meets(goal) else "the bar" if value is not None and meets(bar) else ""
        rows.append([what, f"{bar:,g}", f"{goal:,g}", said, judged, "not yet"])
    return table(["", "bar", "goal", "predicted", "reaches", "measured"], rows)


def _ratio(network: str, batch: int, dtype: str) -> float:
    peer = compiled(network, batch)
    assert peer is not None
    return peer["step_ms"] / predict(network, batch, dtype)["step"]


# ---- measured


def peers_h100() -> str:
    rows = [
        [
            NAMES[r["network"]],
            r["how"],
            str(r["batch"]),
            f"{r['forward_ms']:g}",
            f"{r['step_ms']:g}",
            f"{r['image_steps_per_s']:,g}",
        ]
        for r in results("peers-h100.json")["loops"]
    ]
    return table(["network", "how", "batch", "forward ms", "step ms", "img-steps/s"], rows)


def cpu_table(what: str) -> str:
    """Milliseconds per image and step, by the wall clock on all cores; in brackets how many times faster ours was."""

    def cell(row: Row) -> str:
        low, high = row[f"{what}_middle_half"]
        own = row["engine"] == "ddpm_fast"
        ms, ratio = f"{row[f'{what}_ms']:.2f}", f"{row[f'{what}_ours_is_faster_by']:.2f}"
        return f"**{ms}**" if own else f"{ms} ({ratio}: {low:.2f} to {high:.2f})"

    return _cpu(cell)


def cpu_starts() -> str:
    """Seconds until the first output: the first time, and when what could be kept was there."""
    return _cpu(lambda row: f"{row['first_start']:.1f}, {row['second_start']:.2f}")


def _cpu(cell: Callable[[Row], str]) -> str:
    order = {"shipped": 0, "cifar": 1}
    found = [r for r in results("cpu.json")["results"] if r["clock"] == "wall"]
    found.sort(key=lambda r: (order[r["model"]], r["batch"]))
    names = list(dict.fromkeys(row["engine"] for r in found for row in r["rows"]))
    rows = []
    for name in names:
        of_engine = ({row["engine"]: row for row in r["rows"]}.get(name) for r in found)
        rows.append([name, *("" if row is None else cell(row) for row in of_engine)])
    return table(["engine", *(f"{NAMES[r['model']]}, {r['batch']}" for r in found)], rows)


def precision_table() -> str:
    return markdown(results("precision-cpu.json")["rows"])


TABLES: dict[str, Callable[[], str]] = {
    "predicted": predicted_table,
    "bars": bars_table,
    "peers-h100": peers_h100,
    "cpu-forward": partial(cpu_table, "forward"),
    "cpu-loop": partial(cpu_table, "loop"),
    "cpu-starts": cpu_starts,
    "precision": precision_table,
}


def renewed(text: str) -> str:
    """The document with its tables made anew. ValueError for a table that nothing makes."""

    def make(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"table {found[1]!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", make, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the documents match")
    args = parser.parse_args()
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text()
        new = renewed(old)
        if new != old:
            stale.append(name)
            if not args.check:
                _write(path, new)
    verb = "does not match the results" if args.check else "rewritten"
    print("\n".join(f"{name} {verb}" for name in stale) or "every table is what the results say")
    return int(args.check and bool(stale))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
