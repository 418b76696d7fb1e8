"""Figures of a result: times of all engines, throughput against the batch size, and a roofline of every kernel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..plotting.style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save

Result = dict[str, Any]
OTHERS = (GREY, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000")
MARKERS = "sD^vP*X"


def draw(result: Result, out: Path) -> None:
    """Draws bars per case, or throughput for more than two batch sizes; and the roofline if kernels were timed."""
    batches = {case["batch"] for case in result["cases"]}
    has_kernels = bool(result["kernels"])
    plot, axes = figure(width=15 if has_kernels else 8, height=5.5, columns=2 if has_kernels else 1)
    left = axes[0, 0] if has_kernels else axes
    (throughput if len(batches) > 2 else bars)(left, result)
    if has_kernels:
        roofline(axes[0, 1], result["kernels"], result["ceilings"])
    save(plot, out)


def bars(axes: Any, result: Result) -> None:
    """Milliseconds per image per step of loops: a group per case, a bar per engine, with the median's interval."""
    cases = result["cases"]
    names = list(dict.fromkeys(row["engine"] for case in cases for row in case["rows"]))
    at = 0
    ticks: list[tuple[float, str]] = []
    for case in cases:
        for row in case["rows"]:
            loop = row["loop"]
            color = (
                BLUE
                if row["engine"] == cases[0]["rows"][0]["engine"]
                else OTHERS[(names.index(row["engine"]) - 1) % len(OTHERS)]
            )
            error = [[loop["ms"] - loop["low"]], [loop["high"] - loop["ms"]]]
            axes.barh(
                at,
                loop["ms"],
                xerr=error,
                color=color,
                height=0.8,
                error_kw=dict(elinewidth=0.8, capsize=2),
            )
            speedup = (
                ""
                if loop["speedup_range"] == [1, 1]
                else f", ddpm_fast {loop['speedup']:.2f} times as fast"
            )
            text = f" {loop['ms']:.3g} ms{speedup}"
            axes.text(max(loop["ms"], loop["high"]), at, text, va="center", fontsize=8)
            ticks.append((at, row["name"]))
            at += 1
        at += 1
    longest = max(row["loop"]["high"] for case in cases for row in case["rows"])
    axes.set_xlim(0, 1.45 * longest)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("sampling loop: ms per image per step")
    what = "; ".join(f"batch {c['batch']}" for c in cases)
    axes.set_title(
        f"{result['network']['name']}, {what}, {cases[0]['dtype']} on {_device(cases[0])}",
        loc="left",
        fontsize=9,
    )


def throughput(axes: Any, result: Result) -> None:
    """Images times steps per second of loops against the batch size, a line per engine and precision."""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    highlighted: list[str] = []  # names of ddpm_fast: one per precision
    for case in result["cases"]:
        highlighted += [name for name in [case["rows"][0]["name"]] if name not in highlighted]
        for row in case["rows"]:
            lines.setdefault(row["name"], []).append((case["batch"], row["loop"]))
    for i, (name, line) in enumerate(lines.items()):
        x, y = [batch for batch, _ in line], [1e3 / loop["ms"] for _, loop in line]
        below = [1e3 / loop["ms"] - 1e3 / loop["high"] for _, loop in line]
        above = [1e3 / loop["low"] - 1e3 / loop["ms"] for _, loop in line]
        style: dict[str, Any] = dict(
            color=OTHERS[i % len(OTHERS)], marker=MARKERS[i % len(MARKERS)], linewidth=1
        )
        if name in highlighted:
            dashes = ("-", "--", ":")[highlighted.index(name) % 3]
            style = dict(color=BLUE, marker="o", linewidth=2, linestyle=dashes)
        axes.errorbar(x, y, yerr=[below, above], capsize=2, label=name, **style)
    every = sorted({case["batch"] for case in result["cases"]})
    axes.set(
        xscale="log",
        xlabel="batch size",
        ylabel="images x steps per second, sampling loops",
        ylim=(0, None),
    )
    axes.set_xticks(every, [str(b) for b in every])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(
        f"{result['network']['name']} on {_device(result['cases'][0])}", loc="left", fontsize=9
    )


def _device(case: dict[str, Any]) -> str:
    return case["device_name"] + (f", {case['threads']} threads" if case["device"] == "cpu" else "")


def roofline(
    axes: Any,
    points: Iterable[dict[str, Any]],
    ceilings: Iterable[dict[str, Any]],
    predicted: bool = False,
) -> None:
    """FLOP per second over FLOP per byte (Williams et al. 2009): a point per kernel, as large as its share of the time."""
    every = list(points)
    whole = sum(p["seconds"] * p["times"] for p in every)
    points = [p for p in every if p["flops"] and p["seconds"] > 0]
    kinds = list(dict.fromkeys(p["what"] for p in points))
    colors = (BLUE, *OTHERS)
    for kind in kinds:
        group = [p for p in points if p["what"] == kind]
        x, y = [p["flops"] / p["bytes"] for p in group], [p["flops"] / p["seconds"] for p in group]
        share = [p["seconds"] * p["times"] / whole for p in group]
        i = kinds.index(kind)
        axes.scatter(
            x,
            y,
            s=[12 + 1500 * s for s in share],
            color=colors[i % len(colors)],
            marker=("o" + MARKERS)[i % 8],
            alpha=0.65,
            linewidths=0,
            label=f"{kind}, {sum(share):.0%} of the time",
        )
    least = min(p["flops"] / p["bytes"] for p in points) / 2
    most = 2 * max(p["flops"] / p["bytes"] for p in points)
    roofs = list(ceilings)
    peak = max(c["per_s"] for c in roofs if c["kind"] == "flops")
    for c in roofs:
        if c["kind"] == "flops":
            axes.plot([least, most], [c["per_s"]] * 2, color="black", linewidth=1)
            text = f"{c['what']}, {c['dtype']}: {_si(c['per_s'])}FLOP/s"
            axes.annotate(text, (least, c["per_s"]), (2, 3), textcoords="offset points", fontsize=8)
        else:
            end = min(most, 1.3 * peak / c["per_s"])
            axes.plot(
                [least, end],
                [least * c["per_s"], end * c["per_s"]],
                color="black",
                linewidth=1,
                linestyle="--",
            )
            text = f"{c['what']}: {_si(c['per_s'])}B/s"
            axes.annotate(
                text,
                (least, least * c["per_s"]),
                (8, 0),
                textcoords="offset points",
                fontsize=8,
                va="top",
            )
    rest = sum(p["seconds"] * p["times"] for p in every if not p["flops"]) / whole
    if rest > 0.005:
        names = ", ".join(dict.fromkeys(p["what"] for p in every if not p["flops"]))
        axes.plot([], [], " ", label=f"no FLOP counted, {rest:.0%}: {names}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, each operand counted once",
        ylabel="FLOP per second",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    where = (
        "predicted"
        if predicted
        else "one image on one core"
        if points[0]["images"] == 1
        else f"batch {points[0]['images']}"
    )
    axes.set_title(f"every kernel of a forward pass, {where}", loc="left", fontsize=9)


def _si(v: float) -> str:
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if v >= 10**power:
            return f"{v / 10**power:.3g} {letter}"
    return f"{v:.3g} "
