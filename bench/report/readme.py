"""Tables of the two READMEs: measured speedups on CPUs, predicted speedups on an H100."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.report.committed import NETWORKS, cpus, h100_steps
from bench.report.predictions import predict, speedup
from bench.report.tables import NAMES, PREDICTED, table
from ddpm_fast.benchmark.timer import Row

CPUS = {"cpu-amd-zen4": "AMD EPYC (Zen 4)", "cpu-intel-amx": "Intel Xeon (AMX)"}
MS, MS_ZH = "ddpm_fast (ms per image per step)", "ddpm_fast（毫秒/图/步）"
MEASURED = ["measured, fp32", MS, "speedup over the fastest baseline", "speedup over diffusers"]
MEASURED_ZH = ["实测，fp32", MS_ZH, "相对最快基线的加速比", "相对 diffusers 的加速比"]
PREDICTIONS = [
    "predicted, H100",
    MS,
    "speedup over torch.compile, bf16",
    "speedup over eager, bf16",
]
PREDICTIONS_ZH = ["预测，H100", MS_ZH, "相对 torch.compile（bf16）", "相对 eager（bf16）"]


def measured(head: list[str], batch: str) -> str:
    """Measured sampling loops on CPUs."""
    rows = []
    for machine in cpus(*NETWORKS):
        cpu = CPUS.get(machine.folder.name, machine.title)
        for n in NETWORKS:
            for case in machine.read(n)["cases"]:
                first, *others = case["rows"]
                best = min(others, key=lambda row: row["loop"]["ms"])
                diffusers = next(row for row in others if row["engine"] == "diffusers")
                where = f"{cpu}, {NAMES[n]}, {batch} {case['batch']}"
                ms = f"{first['loop']['ms']:.3g}"
                rows.append([where, ms, f"{best['engine']}: {_speedup(best)}", _speedup(diffusers)])
    return table(head, rows)


def _speedup(row: Row) -> str:
    low, high = row["loop"]["speedup_range"]
    return f"{row['loop']['speedup']:.2f} ({low:.2f} to {high:.2f})"


def predicted(head: list[str], batch: str) -> str:
    """Predicted steps on an H100, relative to measured baselines."""
    rows = []
    for network, size, dtype in PREDICTED:
        ratio, step = speedup(network, size, dtype), predict(network, size, dtype).step
        if ratio is not None:
            eager_ms = dict(h100_steps(network, "eager", "bf16")).get(size)
            over_eager = f"{eager_ms / step:.1f}" if eager_ms else ""
            where = f"{NAMES[network]}, {batch} {size}, {dtype}"
            rows.append([where, f"{step / size:.3g}", f"{ratio:.2f}", over_eager])
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "readme": partial(measured, MEASURED, "batch"),
    "readme-predicted": partial(predicted, PREDICTIONS, "batch"),
    "readme-zh": partial(measured, MEASURED_ZH, "批大小"),
    "readme-predicted-zh": partial(predicted, PREDICTIONS_ZH, "批大小"),
}
