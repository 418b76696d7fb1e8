"""The documents' tables, made from the results that are kept: nobody copies a figure by hand.

    python -m bench.report           rewrites the tables and draws the pictures
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
from ddpm_fast.benchmark.timer import Row
from ddpm_fast.engines.fused.roofline import GAP, GPUS, estimate
from ddpm_fast.engines.fused.unet import FusedUNet

RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "README.zh.md", "docs/performance.md", "docs/benchmarking.md", "docs/cpu.md", "docs/precision.md")
H100 = GPUS["h100"]
NAMES = {"cifar10": "CIFAR-10", "celebahq256": "CelebA-HQ 256", "fashion-mnist-32": "Fashion-MNIST"}
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
    rows = [r for r in results("baselines-h100.json")["loops"] if (r["network"], r["batch"]) == (network, batch)]
    return next((r for r in rows if "compile" in r["how"]), None)


def predicted_table() -> str:
    rows = []
    for network, batch, dtype in PREDICTED:
        p, baseline = predict(network, batch, dtype), compiled(network, batch)
        theirs = f"{baseline['step_ms']:g}" if baseline else ""
        ratio = f"{baseline['step_ms'] / p['step']:.2f}" if baseline else ""
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


def baselines_of(network: str, how: str) -> list[tuple[int, float]]:
    """(batch, ms a step), measured, of those whose description has all these words."""
    rows = [r for r in results("baselines-h100.json")["loops"] if r["network"] == network]
    return [(r["batch"], r["step_ms"]) for r in rows if all(word in r["how"] for word in how.split())]


def fifty_thousand() -> list[tuple[str, float, str]]:
    """(engine, its best image-steps a second on the CIFAR-10 network, predicted or measured)"""
    best = lambda how: max(1e3 * batch / ms for batch, ms in baselines_of("cifar10", how))
    ours = [(f"ddpm_fast {d}", max(predict("cifar10", b, d)["rate"] for b in (256, 1024)), "predicted") for d in ("fp8", "bf16")]
    return ours + [(how, best(how), "measured") for how in ("torch.compile bf16", "eager bf16", "eager fp32")]


def cost_table() -> str:
    """What 50,000 images take on one H100."""
    rows = []
    for name, rate, kind in fifty_thousand():
        hours = lambda steps, rate=rate: 50_000 * steps / rate / 3600
        rows.append([name, kind, f"{rate:,.0f}", f"{hours(1000):,.2f} h", f"{60 * hours(50):,.1f} min"])
    return table(["", "", "image-steps/s", "50,000 images, T = 1000", "50 DDIM steps"], rows)


def scaling_table() -> str:
    """Fits of `bench.scaling`, with their largest relative deviation, and memory."""
    from bench.scaling import Fit, predicted

    rows, axes = [], ("batch", "size", "channels", "steps")
    series = {f"H100, CIFAR-10, {d}: predicted": predicted(d) for d in ("bf16", "fp8")}
    series["two CPU cores, Fashion-MNIST, fp32: measured"] = results("scaling-cpu.json")["series"]
    for where, s in series.items():
        fits = [Fit.of(name, s[name]) if name in s else None for name in axes]
        rows.append([where, *("" if f is None else f"{f} (within {f.apart:.0%})" for f in fits)])
        rows.append(["its memory", *(_from_to(s[name]) if name in s else "" for name in axes)])
    return table(["", "ms a step, n images", "n pixels a side", "n channels", "ms a loop, n steps"], rows)


def _from_to(rows: list[Row]) -> str:
    low, high = rows[0], rows[-1]
    return f"{low['bytes'] / 2**20:,.0f} MiB at {low['x']}, {high['bytes'] / 2**20:,.0f} at {high['x']}"


def bound_table() -> str:
    """What a predicted step's time goes into."""
    from bench import scaling

    rows = []
    for d in ("bf16", "fp8"):
        for r in scaling.predicted(d)["batch"]:
            if r["x"] in (1, 4, 16, 64, 256, 1024):
                whole = sum(r["by"].values())
                rows.append([f"{d}, {r['x']}", *(f"{r['by'][k] / whole:.0%}" for k in ("gaps", "memory", "products"))])
    return table(["CIFAR-10, type, batch", "gaps between launches", "launches bound by memory", "launches bound by products"], rows)


def _ratio(network: str, batch: int, dtype: str) -> float:
    baseline = compiled(network, batch)
    assert baseline is not None
    return baseline["step_ms"] / predict(network, batch, dtype)["step"]


# ---- measured


def baselines_h100() -> str:
    rows = [
        [
            NAMES[r["network"]],
            r["how"],
            str(r["batch"]),
            f"{r['forward_ms']:g}",
            f"{r['step_ms']:g}",
            f"{r['image_steps_per_s']:,g}",
        ]
        for r in results("baselines-h100.json")["loops"]
    ]
    return table(["network", "how", "batch", "forward ms", "step ms", "img-steps/s"], rows)


CPU = ("fashion-mnist-32", "cifar10")
Cell = Callable[[Row], str]


def cpu_table(what: str) -> str:
    """Milliseconds per image and step on all cores; in brackets how many times faster ours was."""
    return _cpu(lambda row: _times(row[what]))


def _times(f: Row) -> str:
    low, high = f["from_to"]
    return f"**{f['ms']:.3g}**" if low == high == 1 else f"{f['ms']:.3g} ({f['ours_is_faster_by']:.2f}: {low:.2f} to {high:.2f})"


def cpu_starts() -> str:
    """Seconds from no process to the first images of ten steps; and again, with what was kept."""

    def cell(row: Row) -> str:
        return f"{row['first_image_s']:.1f}" + (f", {row['again_s']:.1f}" if "again_s" in row else "")

    return _cpu(cell, [0])


def cpu_memory() -> str:
    """MiB of the engine's whole process at its peak."""
    return _cpu(lambda row: f"{row['peak_bytes'] / 2**20:,.0f}", [1])


def _cpu(cell: Cell, which: list[int] | None = None) -> str:
    """A row for each engine, a column for each case of both networks, or for some of them."""
    found = [(n, c) for n in CPU for i, c in enumerate(results(f"cpu-{n}.json")["cases"]) if which is None or i in which]
    names = list(dict.fromkeys(row["engine"] for _, case in found for row in case["rows"]))
    rows = []
    for name in names:
        of_engine = ({row["engine"]: row for row in case["rows"]}.get(name) for _, case in found)
        rows.append([name, *("" if row is None else cell(row) for row in of_engine)])
    return table(["engine", *(f"{NAMES[n]}, {case['batch']}" for n, case in found)], rows)


def cpu_where() -> str:
    """The machine, the day, the versions and the command of the CPU's figures."""
    lines = []
    for n in CPU:
        r = results(f"cpu-{n}.json")
        e, case = r["environment"], r["cases"][0]
        rounds = "; ".join(f"{c['rounds']} rounds, loops of {c['steps']} steps at batch {c['batch']}" for c in r["cases"])
        lines.append(
            f"{NAMES[n]}: {e['cpu']}, {case['threads']} threads, torch {e['torch']}, {r['date'][:10]}, `{r['command']}`; {rounds}."
        )
    return "\n".join(lines)


HEAD = ["", "ours, ms an image and step", "fastest other: ours is faster by", "diffusers eager: ours is faster by", ""]
HEAD_ZH = ["", "本库，毫秒（每图每步）", "最快的其他引擎：本库快几倍", "diffusers eager：本库快几倍", ""]


def readme_table(head: list[str], measured: str = "measured", predicted: str = "predicted") -> str:
    """Where ours stands: loops on a CPU, measured, and on an H100, predicted, beside what was measured of others."""
    rows = []
    for n in CPU:
        for case in results(f"cpu-{n}.json")["cases"]:
            ours, *others = case["rows"]
            best = min(others, key=lambda row: row["loop"]["ms"])
            eager = next(row for row in others if row["engine"] == "diffusers")
            where = f"CPU, {NAMES[n]}, {case['batch']}, fp32"
            rows.append([where, f"{ours['loop']['ms']:.3g}", f"{best['engine']}: {_ranged(best)}", _ranged(eager), measured])
    for network, batch, dtype in PREDICTED:
        baseline, step = compiled(network, batch), predict(network, batch, dtype)["step"]
        if baseline is not None:
            eager_ms = dict(baselines_of(network, "eager bf16")).get(batch)
            ratio = f"{eager_ms / step:.1f}" if eager_ms else ""
            where = f"H100, {NAMES[network]}, {batch}, {dtype}"
            rows.append([where, f"{step / batch:.3g}", f"torch.compile: {baseline['step_ms'] / step:.2f}", ratio, predicted])
    return table(head, rows)


def _ranged(row: Row) -> str:
    low, high = row["loop"]["from_to"]
    return f"{row['loop']['ours_is_faster_by']:.2f} ({low:.2f} to {high:.2f})"


def other_network_table() -> str:
    r = results("other-network-cpu.json")
    rows = []
    for row in r["rows"]:
        n, loop = r["networks"][row["engine"]], row["loop"]
        per_flop = f"{loop['ms'] / n['flops'] * 1e9:.2f}"
        rows.append([row["engine"], f"{n['parameters']:,}", f"{n['flops'] / 1e9:.2f}", str(row["batch"]), _times(loop), per_flop])
    return table(["", "parameters", "GFLOP an image and step", "batch", "ms an image and step", "ms a GFLOP"], rows)


def precision_table() -> str:
    return markdown(results("precision-cpu.json")["rows"])


TABLES: dict[str, Callable[[], str]] = {
    "predicted": predicted_table,
    "bars": bars_table,
    "baselines-h100": baselines_h100,
    "cpu-where": cpu_where,
    "cpu-forward": partial(cpu_table, "forward"),
    "cpu-loop": partial(cpu_table, "loop"),
    "cpu-starts": cpu_starts,
    "cpu-memory": cpu_memory,
    "scaling": scaling_table,
    "bounds": bound_table,
    "cost": cost_table,
    "other-network": other_network_table,
    "readme": partial(readme_table, HEAD),
    "readme-zh": partial(readme_table, HEAD_ZH, "实测", "预测"),
    "precision": precision_table,
}


def renewed(text: str) -> str:
    """The document with its tables made anew. ValueError for a table that nothing makes."""

    def make(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"table {found[1]!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", make, text, flags=re.DOTALL)


def pictures() -> None:
    from bench import scaling
    from ddpm_fast.benchmark.figures import draw

    figures = ROOT / "docs" / "figures"
    for name in CPU:
        draw(results(f"cpu-{name}.json"), figures / f"bench-cpu-{name}.png")
    scaling.draw(figures)


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
    if not args.check:
        pictures()
    verb = "does not match the results" if args.check else "rewritten"
    print("\n".join(f"{name} {verb}" for name in stale) or "every table is what the results say")
    return int(args.check and bool(stale))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
