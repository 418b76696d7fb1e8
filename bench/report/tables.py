"""Tables of the documents, made from the committed results and from predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.gpu.targets import TARGETS
from bench.report.committed import NETWORKS, Machine, accuracy, cpus, h100_loops
from bench.report.fits import Fit
from bench.report.predictions import best_rates, compiled_ms, of_target, predict, series, speedup
from bench.studies.precision import markdown
from ddpm_fast.benchmark.timer import Row

NAMES = {"cifar10": "CIFAR-10", "celebahq256": "CelebA-HQ 256", "fashion-mnist-32": "Fashion-MNIST"}
PREDICTED = [
    ("cifar10", 1, "bf16"),
    ("cifar10", 16, "bf16"),
    ("cifar10", 256, "bf16"),
    ("cifar10", 256, "fp8"),
]
PREDICTED += [("cifar10", 1024, "fp8"), ("celebahq256", 16, "bf16"), ("celebahq256", 16, "fp8")]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- predicted


def predicted_table() -> str:
    rows = []
    for network, batch, dtype in PREDICTED:
        p, compiled = predict(network, batch, dtype), compiled_ms(network, batch)
        ratio = speedup(network, batch, dtype)
        cells = [f"{NAMES[network]}, {batch}", dtype, str(p.launches + 2)]
        cells += [f"{p.floor:.3g}", f"{p.forward:.3g}", f"{p.step:.3g}", f"{p.rate:,.0f}"]
        cells += ["" if compiled is None else f"{compiled:g}"]
        rows.append([*cells, "" if ratio is None else f"{ratio:.2f}"])
    head = ["network, batch", "type", "launches per step", "floor ms", "forward ms, predicted"]
    head += ["step ms, predicted", "image-steps/s, predicted"]
    head += ["torch.compile bf16 step ms, measured", "ratio, predicted"]
    return table(head, rows)


def targets_table() -> str:
    """Targets of `bench.gpu` with predictions; those of elementwise kernels are in docs/gpu.md."""
    rows = []
    for target in TARGETS:
        value = of_target(target)
        shown = "see [gpu.md](gpu.md)"
        if value is not None:
            shown = f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        reached = {"goal": "the goal", "bar": "the bar"}.get(target.reached(value) or "", "")
        limits = [f"{target.bar:,g}", f"{target.goal:,g}"]
        rows.append([target.what, *limits, shown, reached, "not yet"])
    return table(["", "bar", "goal", "predicted", "reaches", "measured"], rows)


def cost_table() -> str:
    """Time of 50,000 images on one H100."""
    rows = []
    for name, rate, kind in best_rates():
        hours = lambda steps, rate=rate: 50_000 * steps / rate / 3600
        rows.append(
            [name, kind, f"{rate:,.0f}", f"{hours(1000):,.2f} h", f"{60 * hours(50):,.1f} min"]
        )
    return table(["", "", "image-steps/s", "50,000 images, T = 1000", "50 DDIM steps"], rows)


def scaling_table() -> str:
    """Fits of time, with the largest relative deviation of a row, and memory."""
    rows, axes = [], ("batch", "size", "channels", "steps")
    measured = {f"H100, CIFAR-10, {d}: predicted": series(d) for d in ("bf16", "fp8")}
    machines = cpus("scaling")
    for machine in machines:
        cores = "two CPU cores" if len(machines) == 1 else f"two cores, {machine.title}"
        measured[f"{cores}, Fashion-MNIST, fp32: measured"] = machine.read("scaling")["series"]
    for where, s in measured.items():
        fits = [Fit.of(name, s[name]) if name in s else None for name in axes]
        rows.append(
            [where, *("" if f is None else f"{f} (within {f.max_error:.0%})" for f in fits)]
        )
        rows.append(["memory", *(_memory_range(s[name]) if name in s else "" for name in axes)])
    return table(
        ["", "ms per step, n images", "n pixels per side", "n channels", "ms per loop, n steps"],
        rows,
    )


def _memory_range(rows: list[Row]) -> str:
    low, high = rows[0], rows[-1]
    least, most = (f"{row['bytes'] / 2**20:,.0f}" for row in (low, high))
    return f"{least} MiB at {low['x']}, {most} at {high['x']}"


def bound_table() -> str:
    """Shares of a predicted step by the bound of its launches."""
    rows = []
    for d in ("bf16", "fp8"):
        for r in series(d)["batch"]:
            if r["x"] in (1, 4, 16, 64, 256, 1024):
                rows.append(
                    [
                        f"{d}, {r['x']}",
                        *(f"{r['parts'][k] / r['ms']:.0%}" for k in ("gaps", "memory", "products")),
                    ]
                )
    return table(
        [
            "CIFAR-10, type, batch",
            "gaps between launches",
            "launches bound by memory",
            "launches bound by products",
        ],
        rows,
    )


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
        for r in h100_loops()
    ]
    return table(["network", "engine", "batch", "forward ms", "step ms", "image-steps/s"], rows)


Cell = Callable[[Row], str]


def per_cpu(make: Callable[[Machine], str]) -> str:
    """The table of each CPU that has results, with a title if there are several."""
    machines = cpus(*NETWORKS)
    if len(machines) == 1:
        return make(machines[0])
    return "\n\n".join(f"**{machine.title}**\n\n{make(machine)}" for machine in machines)


def cpu_table(what: str) -> str:
    """Milliseconds per image per step on all cores; in parentheses the speedup of ddpm_fast."""
    return per_cpu(partial(_engines, cell=lambda row: _times(row[what])))


def _times(f: Row) -> str:
    low, high = f["speedup_range"]
    return (
        f"**{f['ms']:.3g}**"
        if low == high == 1
        else f"{f['ms']:.3g} ({f['speedup']:.2f}: {low:.2f} to {high:.2f})"
    )


def cpu_starts() -> str:
    """Seconds from process start to the first images of ten steps: cold, and with caches."""

    def cell(row: Row) -> str:
        return f"{row['first_image_s']:.1f}" + (
            f", {row['warm_first_image_s']:.1f}" if "warm_first_image_s" in row else ""
        )

    return per_cpu(partial(_engines, cell=cell, which=[0]))


def cpu_memory() -> str:
    """Peak memory of the engine's process in MiB."""
    return per_cpu(
        partial(_engines, cell=lambda row: f"{row['peak_bytes'] / 2**20:,.0f}", which=[1])
    )


def _engines(machine: Machine, cell: Cell, which: list[int] | None = None) -> str:
    """A row per engine, a column per case of both networks, or per case in `which`."""
    cases = [
        (n, c)
        for n in NETWORKS
        for i, c in enumerate(machine.read(n)["cases"])
        if which is None or i in which
    ]
    names = list(dict.fromkeys(row["engine"] for _, case in cases for row in case["rows"]))
    rows = []
    for name in names:
        of_engine = ({row["engine"]: row for row in case["rows"]}.get(name) for _, case in cases)
        rows.append([name, *("" if row is None else cell(row) for row in of_engine)])
    return table(["engine", *(f"{NAMES[n]}, {case['batch']}" for n, case in cases)], rows)


def cpu_where() -> str:
    """CPU, date, versions and command of the CPU's figures."""
    return per_cpu(_where)


def _where(machine: Machine) -> str:
    lines = []
    for n in NETWORKS:
        r = machine.read(n)
        e, case = r["environment"], r["cases"][0]
        rounds = "; ".join(
            f"{c['rounds']} rounds, loops of {c['steps']} steps at batch {c['batch']}"
            for c in r["cases"]
        )
        machine_and_date = (
            f"{e['cpu']}, {case['threads']} threads, torch {e['torch']}, {r['date'][:10]}"
        )
        lines.append(f"{NAMES[n]}: {machine_and_date}, `{r['command']}`; {rounds}.")
    return "\n".join(lines)


def other_network_table() -> str:
    """denoising-diffusion-pytorch, on the first CPU that has it."""
    r = cpus("other-network")[0].read("other-network")
    rows = []
    for row in r["rows"]:
        n, loop = r["networks"][row["engine"]], row["loop"]
        per_flop = f"{loop['ms'] / n['flops'] * 1e9:.2f}"
        rows.append(
            [
                row["engine"],
                f"{n['parameters']:,}",
                f"{n['flops'] / 1e9:.2f}",
                str(row["batch"]),
                _times(loop),
                per_flop,
            ]
        )
    return table(
        [
            "",
            "parameters",
            "GFLOP per image per step",
            "batch",
            "ms per image per step",
            "ms per GFLOP",
        ],
        rows,
    )


def precision_table() -> str:
    return markdown(accuracy("precision")["rows"])


TABLES: dict[str, Callable[[], str]] = {
    "predicted": predicted_table,
    "targets": targets_table,
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
    "precision": precision_table,
}
