"""Solvers compared with diffusers and with the papers in fp64, and their orders of convergence.

    python -m bench.studies.parity [--out FILE.md]

Each row compares three loops of twenty steps with the same x_T, denoiser and noise: `ddpm_step` in
fp32, diffusers' scheduler in fp32, and the papers' formulas in fp64. An error is the largest over
all elements, relative to the largest element.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.studies.parity_loops import (
    MEAN,
    NAMES,
    SCHEDULE,
    STD,
    T,
    diffusers_loop,
    error,
    network,
    papers,
    run_table,
    start,
)
from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.prediction import PREDICTIONS
from ddpm_fast.diffusion.presets import PRESETS
from ddpm_fast.diffusion.solvers import ddim_inversion_table, ddim_table, dpm_solver_table
from ddpm_fast.kernels.ddpm_step import ddpm_step_reference, x_0_reference
from ddpm_fast.utils.files import write_atomically

CASES: list[tuple[str, str, float, float | None]] = [
    *(
        ("ddpm", v, 0.0, c)
        for v in ("fixed_small", "fixed_large", "learned", "learned_range")
        for c in (1.0, None)
    ),
    *(("ddim", "", eta, c) for eta in (0.0, 0.5, 1.0) for c in (1.0, None)),
    *((s, "", 0.0, c) for s in ("dpm++2m", "dpm++2m-sde") for c in (1.0, None)),
]


def rows() -> Iterator[dict[str, Any]]:
    """One row per solver, prediction, variance and clip; None where diffusers has no option."""
    for solver, variance, eta, clip in CASES:
        for prediction in PREDICTIONS:
            net, x = network(prediction, variance), start()
            kwargs: dict[str, Any] = dict(
                prediction=prediction, variance=variance or "fixed_large", clip=clip, eta=eta
            )
            exact = papers(solver, prediction, variance, eta, clip, net, x)
            result = run_table(PRESETS["exact"].table(SCHEDULE, solver, T, **kwargs), net, x)
            row: dict[str, Any] = dict(
                solver=solver, variance=variance, eta=eta, clip=clip, prediction=prediction
            )
            row.update(ddpm_fast=error(result, exact), diffusers=None, difference=None, preset=None)
            if not (solver.startswith("dpm") and clip):  # diffusers' DPM-Solver++ cannot clip
                baseline = diffusers_loop(solver, prediction, variance, eta, clip, net, x)
                row.update(diffusers=error(baseline, exact), difference=error(result, baseline))
                same_preset = run_table(
                    PRESETS["diffusers"].table(SCHEDULE, solver, T, **kwargs), net, x
                )
                row.update(
                    preset=error(
                        same_preset,
                        diffusers_loop(
                            solver, prediction, variance, eta, clip, net, x, default=True
                        ),
                    )
                )
            yield row


def inversion_rows() -> Iterator[dict[str, Any]]:
    """DDIM inversion against diffusers' DDIMInverseScheduler, with sees="target"."""
    import diffusers

    # no x_0: at a clean image it does not determine eps, and diffusers divides by zero
    for prediction in ("eps", "v"):
        net, x = network(prediction, ""), start() * 0.3
        scheduler: Any = diffusers.DDIMInverseScheduler(
            prediction_type=NAMES[prediction], clip_sample=False
        )
        scheduler.set_timesteps(len(T))
        y = x
        for t in scheduler.timesteps.tolist():
            y = scheduler.step(net(y, t), t, y).prev_sample
        table = ddim_inversion_table(SCHEDULE, T, prediction, sees="target")
        exact = x.double()
        for i, t in enumerate(table.t):
            bar, bar_to = (
                1.0 if i == 0 else SCHEDULE.alpha_bar[table.t[i - 1]],
                SCHEDULE.alpha_bar[t],
            )
            out = net(exact, int(t))
            if prediction == "eps":
                x_0, eps = (exact - np.sqrt(1 - bar) * out) / np.sqrt(bar), out
            else:
                x_0, eps = (
                    np.sqrt(bar) * exact - np.sqrt(1 - bar) * out,
                    np.sqrt(bar) * out + np.sqrt(1 - bar) * exact,
                )
            exact = np.sqrt(bar_to) * x_0 + np.sqrt(1 - bar_to) * eps
        result = run_table(table, net, x)
        row: dict[str, Any] = dict(
            solver="ddim inversion",
            variance="",
            eta=0.0,
            clip=None,
            prediction=prediction,
            preset=None,
        )
        yield row | dict(
            ddpm_fast=error(result, exact), diffusers=error(y, exact), difference=error(result, y)
        )


# ---- orders


def flow_error(solver: str, steps: int) -> float:
    """Largest error of the probability-flow map of N(MEAN, STD^2), over states within 3 deviations.

    The timesteps are uniform in lambda between the ends of the linear schedule. There is no
    clipping and no step to alpha_bar = 1.
    """
    first, last = np.log(SCHEDULE.alpha_bar[[0, -1]] / SCHEDULE.noise_var[[0, -1]]) / 2
    chain = NoiseSchedule.from_alpha_bar(1 / (1 + np.exp(-2 * np.linspace(first, last, steps + 1))))
    make = ddim_table if solver == "ddim" else dpm_solver_table
    table = make(chain, np.arange(steps + 1)[::-1], clip=None, end="t=0")
    coef = torch.from_numpy(table.coef)
    spread = lambda t: np.sqrt(chain.alpha_bar[t] * STD**2 + chain.noise_var[t])
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None, None, None]
    x, old = np.sqrt(chain.alpha_bar[-1]) * MEAN + spread(-1) * z, torch.zeros_like(z)
    for i, t_i in enumerate(table.t):
        eps = (
            np.sqrt(chain.noise_var[t_i])
            * (x - np.sqrt(chain.alpha_bar[t_i]) * MEAN)
            / spread(t_i) ** 2
        )
        row = torch.full((len(z),), i)
        x, old = (
            ddpm_step_reference(x, eps, torch.zeros_like(x), coef, row, old=old),
            x_0_reference(x, eps, coef, row),
        )
    return float((x - (np.sqrt(chain.alpha_bar[0]) * MEAN + spread(0) * z)).abs().max())


STEPS = (20, 40, 80, 160, 320)


def order(solver: str) -> tuple[float, list[float]]:
    """(least-squares slope of log error over log steps, the errors)"""
    errors = [flow_error(solver, n) for n in STEPS]
    return float(-np.polyfit(np.log(STEPS), np.log(errors), 1)[0]), errors


def report() -> str:
    def short(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    lines = [
        "| solver | variance or eta | clip | predicts "
        "| ddpm_fast, fp64 | diffusers, fp64 | ddpm_fast, diffusers | preset, diffusers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in [*rows(), *inversion_rows()]:
        option = r["variance"] or (f"eta {r['eta']:g}" if r["solver"] == "ddim" else "")
        figures = " | ".join(
            short(r[name]) for name in ("ddpm_fast", "diffusers", "difference", "preset")
        )
        lines.append(
            f"| {r['solver']} | {option} | {r['clip'] or 'none'} | {r['prediction']} | {figures} |"
        )
    lines += [
        "",
        f"| order | {' | '.join(f'N = {n}' for n in STEPS)} | slope |",
        "|---" * (len(STEPS) + 2) + "|",
    ]
    for solver in ("ddim", "dpm++2m"):
        slope, errors = order(solver)
        lines.append(f"| {solver} | {' | '.join(f'{e:.2e}' for e in errors)} | {slope:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    text = report()
    print(text)
    if args.out:
        write_atomically(args.out, (text + "\n").encode())


if __name__ == "__main__":
    main()
