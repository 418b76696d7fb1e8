"""Every solver against diffusers and against the papers' formulas in fp64, and the order at which solvers converge.

    python -m bench.studies.parity [--out FILE.md]

A row is a whole loop of twenty steps from the same start, with the same denoiser and the same noise for all: ours through the
operation `ddpm_step` in fp32, diffusers' scheduler in fp32, and the formulas as the papers print them, in fp64. An error is the
largest over all elements, relative to the largest element.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.prediction import PREDICTIONS, conversion
from ddpm_fast.diffusion.presets import PRESETS
from ddpm_fast.diffusion.solvers import StepTable, ddim_inversion_table, ddim_table, dpm_solver_table
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels.ddpm_step import ddpm_step, ddpm_step_reference, x_0_reference
from ddpm_fast.kernels.noise import REVERSE, noise_reference

SCHEDULE = NoiseSchedule.linear()
SHAPE = (4, 2, 6, 5)
T = choose_timesteps(1000, 20, "leading")  # the one spacing that every scheduler of diffusers takes
NAMES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
MEAN, STD = 0.2, 0.4
Net = Callable[[Tensor, int], Tensor]


def network(prediction: str, variance: str) -> Net:
    """Almost the exact denoiser of Gaussian data, bent a little so that nothing is linear; its variance varies too."""

    def call(x: Tensor, t: int) -> Tensor:
        a, n = np.sqrt(SCHEDULE.alpha_bar[t]), np.sqrt(SCHEDULE.noise_var[t])
        wide = x.double()
        x_0 = MEAN + a * STD**2 / (a * a * STD**2 + n * n) * (wide - a * MEAN) + 0.1 * torch.sin(2 * wide)
        of_x, of_out = conversion("x_0", prediction, a, n)
        out = of_x * wide + of_out * x_0
        if variance == "learned":
            out = torch.cat([out, np.log(SCHEDULE.beta[t]) + 0.3 * torch.cos(wide)], dim=1)
        if variance == "learned_range":
            out = torch.cat([out, torch.cos(wide)], dim=1)
        return out.to(x.dtype)

    return call


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()


def noises(count: int) -> list[Tensor]:
    image = torch.arange(SHAPE[0])
    seed = torch.full_like(image, 7)
    return [noise_reference(seed, image, torch.full_like(image, i), REVERSE, SHAPE[1:]) for i in range(count)]


def ours(table: StepTable, net: Net, x: Tensor) -> Tensor:
    """The loop of `Sampler`, bare."""
    x = x.clone()
    old = torch.zeros_like(x)
    coef, image = table.to("cpu")[1], torch.arange(len(x))
    for i, t in enumerate(table.t):
        row = torch.full_like(image, i)
        ddpm_step(x, net(x, int(t)), coef, row, torch.full_like(image, 7), image, table.learned, old)
    return x


# ---- as the papers print it, fp64


def papers(solver: str, prediction: str, variance: str, eta: float, clip: float | None, net: Net, x: Tensor) -> Tensor:
    """Song et al. 2021 eq. 12; Ho et al. 2020 eqs. 7, 15 on Nichol & Dhariwal's respaced chain; Lu et al. 2022b, algorithm 2."""
    x, before = x.double(), None
    bar_of = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for i, z in enumerate(noises(len(T))):
        t, z = int(T[i]), z.double()
        bar, bar_to = bar_of[t], bar_of[T[i + 1]] if i + 1 < len(T) else 1.0
        out = net(x, t)
        out, second = out.chunk(2, dim=1) if variance.startswith("learned") else (out, None)
        if prediction == "eps":
            x_0 = (x - np.sqrt(1 - bar) * out) / np.sqrt(bar)
        else:
            x_0 = out if prediction == "x_0" else np.sqrt(bar) * x - np.sqrt(1 - bar) * out
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        last = i == len(T) - 1
        if solver == "ddpm":
            beta = 1 - bar / bar_to
            tilde = beta * (1 - bar_to) / (1 - bar)
            mean = np.sqrt(bar_to) * beta / (1 - bar) * x_0 + np.sqrt(bar / bar_to) * (1 - bar_to) / (1 - bar) * x
            if variance == "learned" and second is not None:
                var: Any = second.exp()
            elif second is not None and not last:
                var = torch.exp((second + 1) / 2 * np.log(beta) + (1 - second) / 2 * np.log(tilde))
            else:
                var = tilde if variance == "fixed_small" else beta
            x = mean if last else mean + torch.as_tensor(var).sqrt() * z
        elif solver == "ddim":
            sigma = eta * np.sqrt((1 - bar_to) / (1 - bar) * (1 - bar / bar_to))
            eps = (x - np.sqrt(bar) * x_0) / np.sqrt(1 - bar)
            x = np.sqrt(bar_to) * x_0 + np.sqrt(max(0, 1 - bar_to - sigma**2)) * eps + sigma * z
        else:
            lam, lam_to = (np.log(b / (1 - b)) / 2 if b < 1 else np.inf for b in (bar, bar_to))
            d = x_0
            if before is not None and not last:
                x_0_before, lam_before = before
                d = x_0 + (lam_to - lam) / (2 * (lam - lam_before)) * (x_0 - x_0_before)
            before = x_0, lam
            noise, noise_to, decay = np.sqrt(1 - bar), np.sqrt(1 - bar_to), np.exp(lam - lam_to)
            if solver == "dpm++2m":
                x = noise_to / noise * x - np.sqrt(bar_to) * (decay - 1) * d
            else:
                x = noise_to / noise * decay * x + np.sqrt(bar_to) * (1 - decay**2) * d + noise_to * np.sqrt(1 - decay**2) * z
    return x


# ---- as diffusers computes it


def diffusers_loop(
    solver: str, prediction: str, variance: str, eta: float, clip: float | None, net: Net, x: Tensor, default: bool = False
) -> Tensor:
    """`default`: DDIM with the network's own eps beside the clipped x_0, as its pipelines run it."""
    import diffusers

    common: dict[str, Any] = dict(prediction_type=NAMES[prediction])
    scheduler: Any
    if solver == "ddpm":
        scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip is not None, **common)
    elif solver == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=clip is not None, **common)
    else:
        kind = "sde-dpmsolver++" if solver.endswith("sde") else "dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type=kind, lower_order_final=False, **common)
    if solver.startswith("dpm"):
        scheduler.set_timesteps(timesteps=T.tolist())
    else:
        scheduler.set_timesteps(len(T))
    for i, z in enumerate(noises(len(T))):
        out = net(x, int(T[i]))
        if variance == "learned":  # it takes the variance itself, not its logarithm
            mean, log_var = out.chunk(2, dim=1)
            out = torch.cat([mean, log_var.exp()], dim=1)
        options: dict[str, Any] = {}
        if solver == "ddim":
            options = dict(eta=eta, use_clipped_model_output=not default, variance_noise=z)
        elif solver.endswith("sde"):
            options = dict(variance_noise=z)
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: z):
            x = scheduler.step(out, int(T[i]), x, **options).prev_sample
    return x


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).abs().max() / exact.double().abs().max())


CASES: list[tuple[str, str, float, float | None]] = [
    *(("ddpm", v, 0.0, c) for v in ("fixed_small", "fixed_large", "learned", "learned_range") for c in (1.0, None)),
    *(("ddim", "", eta, c) for eta in (0.0, 0.5, 1.0) for c in (1.0, None)),
    *((s, "", 0.0, c) for s in ("dpm++2m", "dpm++2m-sde") for c in (1.0, None)),
]


def rows() -> Iterator[dict[str, Any]]:
    """One for each solver, prediction, variance and clip; `theirs` and `apart` are None where diffusers cannot do it."""
    for solver, variance, eta, clip in CASES:
        for prediction in PREDICTIONS:
            net, x = network(prediction, variance), start()
            how: dict[str, Any] = dict(prediction=prediction, variance=variance or "fixed_large", clip=clip, eta=eta)
            exact = papers(solver, prediction, variance, eta, clip, net, x)
            mine = ours(PRESETS["exact"].table(SCHEDULE, solver, T, **how), net, x)
            row: dict[str, Any] = dict(solver=solver, variance=variance, eta=eta, clip=clip, prediction=prediction)
            row.update(ours=error(mine, exact), theirs=None, apart=None, preset=None)
            if not (solver.startswith("dpm") and clip):  # diffusers' has no clip
                theirs = diffusers_loop(solver, prediction, variance, eta, clip, net, x)
                row.update(theirs=error(theirs, exact), apart=error(mine, theirs))
                same = ours(PRESETS["diffusers"].table(SCHEDULE, solver, T, **how), net, x)
                row.update(preset=error(same, diffusers_loop(solver, prediction, variance, eta, clip, net, x, default=True)))
            yield row


def inversion_rows() -> Iterator[dict[str, Any]]:
    """DDIM inversion against diffusers' DDIMInverseScheduler, whose network sees the timestep that a step leads to."""
    import diffusers

    for prediction in ("eps", "v"):  # from a clean image, x_0-prediction says nothing about eps: diffusers divides by zero
        net, x = network(prediction, ""), start() * 0.3
        theirs: Any = diffusers.DDIMInverseScheduler(prediction_type=NAMES[prediction], clip_sample=False)
        theirs.set_timesteps(len(T))
        y = x
        for t in theirs.timesteps.tolist():
            y = theirs.step(net(y, t), t, y).prev_sample
        table = ddim_inversion_table(SCHEDULE, T, prediction, sees="target")
        exact = x.double()
        for i, t in enumerate(table.t):
            bar, bar_to = 1.0 if i == 0 else SCHEDULE.alpha_bar[table.t[i - 1]], SCHEDULE.alpha_bar[t]
            out = net(exact, int(t))
            if prediction == "eps":
                x_0, eps = (exact - np.sqrt(1 - bar) * out) / np.sqrt(bar), out
            else:
                x_0, eps = np.sqrt(bar) * exact - np.sqrt(1 - bar) * out, np.sqrt(bar) * out + np.sqrt(1 - bar) * exact
            exact = np.sqrt(bar_to) * x_0 + np.sqrt(1 - bar_to) * eps
        mine = ours(table, net, x)
        row: dict[str, Any] = dict(solver="ddim inversion", variance="", eta=0.0, clip=None, prediction=prediction, preset=None)
        yield row | dict(ours=error(mine, exact), theirs=error(y, exact), apart=error(mine, y))


# ---- orders


def flow_error(solver: str, steps: int) -> float:
    """Largest distance from the exact probability-flow map over states from -3 to 3 deviations, N(MEAN, STD^2).

    The levels are uniform in lambda between the ends of the linear schedule; nothing is clipped; no step leads to alpha_bar = 1.
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
        eps = np.sqrt(chain.noise_var[t_i]) * (x - np.sqrt(chain.alpha_bar[t_i]) * MEAN) / spread(t_i) ** 2
        row = torch.full((len(z),), i)
        x, old = ddpm_step_reference(x, eps, torch.zeros_like(x), coef, row, old=old), x_0_reference(x, eps, coef, row)
    return float((x - (np.sqrt(chain.alpha_bar[0]) * MEAN + spread(0) * z)).abs().max())


STEPS = (20, 40, 80, 160, 320)


def order(solver: str) -> tuple[float, list[float]]:
    """(slope of the error over steps, log-log by least squares; the errors)"""
    errors = [flow_error(solver, n) for n in STEPS]
    return float(-np.polyfit(np.log(STEPS), np.log(errors), 1)[0]), errors


def report() -> str:
    def short(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    lines = [
        "| solver | variance or eta | clip | predicts | ours, fp64 | diffusers, fp64 | ours, diffusers | preset, diffusers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in [*rows(), *inversion_rows()]:
        how = r["variance"] or (f"eta {r['eta']:g}" if r["solver"] == "ddim" else "")
        figures = " | ".join(short(r[name]) for name in ("ours", "theirs", "apart", "preset"))
        lines.append(f"| {r['solver']} | {how} | {r['clip'] or 'none'} | {r['prediction']} | {figures} |")
    lines += ["", f"| order | {' | '.join(f'N = {n}' for n in STEPS)} | slope |", "|---" * (len(STEPS) + 2) + "|"]
    for solver in ("ddim", "dpm++2m"):
        slope, errors = order(solver)
        lines.append(f"| {solver} | {' | '.join(f'{e:.2e}' for e in errors)} | {slope:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file too")
    args = parser.parse_args()
    text = report()
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
