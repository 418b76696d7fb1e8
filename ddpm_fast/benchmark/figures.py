"""Figures of a result: times, throughput against the batch size, and a roofline of the kernels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..plotting.style import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    figure,
    save,
)

Result = dict[str, Any]
COLORS = (BLUE, GREY, ORANGE, GREEN, PINK, AMBER, SKY, BLACK)  # ddpm_fast first
MARKERS = "osD^vP*X"
LINES = ("-", "--", ":")


def draw(result: Result, out: Path) -> None:
    """Draws a result.

    The left plot has bars, or throughput for more than two batch sizes; the right plot a roofline
    if kernels were timed.

    Args:
        result: As `runner.compare` returns it.
        out: .png, .svg or .pdf file.
    """
    batches = {case["batch"] for case in result["cases"]}
    has_kernels = bool(result["kernels"])
    plot, axes = figure(width=15 if has_kernels else 8, height=5.5, columns=2 if has_kernels else 1)
    left = axes[0, 0] if has_kernels else axes
    (throughput if len(batches) > 2 else bars)(left, result)
    if has_kernels:
        roofline(axes[0, 1], result["kernels"], result["ceilings"])
    save(plot, out)


def bars(axes: Any, result: Result) -> None:
    """Times of loops: a group per case, a bar per engine, with the interval of the median."""
    cases = result["cases"]
    engines, y = _engines(result), 0
    ticks: list[tuple[float, str]] = []
    for case in cases:
        for row in case["rows"]:
            loop = row["loop"]
            axes.barh(
                y,
                loop["ms"],
                xerr=[[loop["ms"] - loop["low"]], [loop["high"] - loop["ms"]]],
                color=COLORS[engines.index(row["engine"]) % len(COLORS)],
                height=0.8,
                error_kw=dict(elinewidth=0.8, capsize=2),
            )
            text = f" {loop['ms']:.3g} ms"
            if loop["speedup_range"] != [1, 1]:
                text += f", ddpm_fast speedup {loop['speedup']:.2f}"
            axes.text(max(loop["ms"], loop["high"]), y, text, va="center", fontsize=8)
            ticks.append((y, row["name"]))
            y += 1
        y += 1
    longest = max(row["loop"]["high"] for case in cases for row in case["rows"])
    axes.set_xlim(0, 1.45 * longest)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("sampling loop, ms per image per step")
    batches = "; ".join(f"batch {c['batch']}" for c in cases)
    _title(
        axes,
        f"{result['network']['name']}, {batches}, {cases[0]['dtype']} on {_device(cases[0])}",
    )


def throughput(axes: Any, result: Result) -> None:
    """Throughput of loops against the batch size: a line per engine and precision."""
    engines = _engines(result)
    dtypes = list(dict.fromkeys(case["dtype"] for case in result["cases"]))
    lines: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for case in result["cases"]:
        for row in case["rows"]:
            lines.setdefault((row["engine"], case["dtype"]), []).append((case["batch"], row))
    for (engine, dtype), line in lines.items():
        loops = [row["loop"] for _, row in line]
        y = [1e3 / loop["ms"] for loop in loops]
        below = [1e3 / loop["ms"] - 1e3 / loop["high"] for loop in loops]
        above = [1e3 / loop["low"] - 1e3 / loop["ms"] for loop in loops]
        i = engines.index(engine)
        axes.errorbar(
            [batch for batch, _ in line],
            y,
            yerr=[below, above],
            capsize=2,
            label=line[0][1]["name"],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINES[dtypes.index(dtype) % len(LINES)],
            linewidth=1 if i else 2,
        )
    batches = sorted({case["batch"] for case in result["cases"]})
    axes.set(
        xscale="log",
        xlabel="batch size",
        ylabel="sampling loop, image-steps per second",
        ylim=(0, None),
    )
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    _title(axes, f"{result['network']['name']} on {_device(result['cases'][0])}")


def _engines(result: Result) -> list[str]:
    return list(dict.fromkeys(row["engine"] for case in result["cases"] for row in case["rows"]))


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9)


def _device(case: dict[str, Any]) -> str:
    return case["device_name"] + (f", {case['threads']} threads" if case["device"] == "cpu" else "")


def roofline(
    axes: Any,
    kernels: Iterable[dict[str, Any]],
    ceilings: Iterable[dict[str, Any]],
    predicted: bool = False,
) -> None:
    """Roofline plot (Williams et al. 2009): a point per kernel, sized by its share of the time.

    Args:
        axes: Where to draw.
        kernels: As `kernels.kernel_times` or `kernels.predicted_launches` returns them.
        ceilings: As `kernels.ceilings` returns them.
        predicted: Labels the times as predicted.
    """
    kernels = list(kernels)
    total = sum(p["seconds"] * p["times"] for p in kernels)
    points = [p for p in kernels if p["flops"] and p["seconds"] > 0]
    for i, kind in enumerate(dict.fromkeys(p["what"] for p in points)):
        group = [p for p in points if p["what"] == kind]
        shares = [p["seconds"] * p["times"] / total for p in group]
        axes.scatter(
            [p["flops"] / p["bytes"] for p in group],
            [p["flops"] / p["seconds"] for p in group],
            s=[12 + 1500 * share for share in shares],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            alpha=0.65,
            linewidths=0,
            label=f"{kind}, {sum(shares):.0%} of the time",
        )
    least = min(p["flops"] / p["bytes"] for p in points) / 2
    most = 2 * max(p["flops"] / p["bytes"] for p in points)
    _ceilings(axes, list(ceilings), least, most)
    uncounted = [p for p in kernels if not p["flops"]]
    share = sum(p["seconds"] * p["times"] for p in uncounted) / total
    if share > 0.005:
        names = ", ".join(dict.fromkeys(p["what"] for p in uncounted))
        axes.plot([], [], " ", label=f"no FLOP counted, {share:.0%}: {names}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, each operand counted once",
        ylabel="FLOP per second",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    images = points[0]["images"]
    where = "one image on one core" if images == 1 else f"batch {images}"
    _title(axes, f"every kernel of a forward pass, {'predicted' if predicted else where}")


def _ceilings(axes: Any, ceilings: list[dict[str, Any]], least: float, most: float) -> None:
    """A line per ceiling, between `least` and `most` FLOP per byte."""
    peak = max(c["per_s"] for c in ceilings if c["kind"] == "flops")
    label = dict(textcoords="offset points", fontsize=8)
    for c in ceilings:
        rate = c["per_s"]
        if c["kind"] == "flops":
            axes.plot([least, most], [rate, rate], color=BLACK, linewidth=1)
            text = f"{c['what']}, {c['dtype']}: {_si(rate)}FLOP/s"
            axes.annotate(text, (least, rate), (2, 3), **label)
        else:
            end = min(most, 1.3 * peak / rate)
            axes.plot([least, end], [least * rate, end * rate], "--", color=BLACK, linewidth=1)
            text = f"{c['what']}: {_si(rate)}B/s"
            axes.annotate(text, (least, least * rate), (8, 0), va="top", **label)


def _si(v: float) -> str:
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if v >= 10**power:
            return f"{v / 10**power:.3g} {letter}"
    return f"{v:.3g} "
