"""Parity presets: the conventions in which four codebases differ for one solver. State the preset
with every figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.pixels import nearest
from .schedule import Array, NoiseSchedule
from .solvers import StepTable, check_eta, ddim_table, ddpm_table, dpm_solver_table
from .timesteps import Steps, choose_timesteps

DEFAULT_STEPS = {
    "ddpm": None,
    "ddim": 50,
    "dpm++2m": 20,
    "dpm++2m-sde": 20,
}  # None: the whole chain


@dataclass(frozen=True)
class Preset:
    """How a codebase samples and counts bits.

    choose        (T, solver, how many) -> the timesteps, decreasing, where a solver does not visit all
    single        tables in fp32 from alpha_bar, as those codebases compute them, instead of fp64: beta is off by 5e-4 near t = 4
    eps_from      what DDIM's eps follows from: the clipped "x_0", or the "network"
    ddim_clip     does DDIM clip x_0?
    rounding      to 0 ... 255: "rounded to the nearest", "cut off" or "half rounded up"
    erf           the decoder's normal distribution function: exact in fp64, or approximated by tanh
    first_var     the variance of p(x_0 | x_1). No image depends on it, since no noise is added there; the likelihood does.
                    "beta"       fixed_large: beta_0; fixed_small: the posterior's at t = 1, for at t = 0 it is 0
                    "posterior"  both: the posterior's at t = 1, with which Ho et al. found better bits for images
                    "floor"      fixed_large: beta_0; fixed_small: 1e-20
    """

    choose: Callable[[int, str, int], NDArray[np.int64]] = lambda total, solver, steps: (
        choose_timesteps(total, steps)
    )
    single: bool = False
    eps_from: str = "x_0"
    ddim_clip: bool = True
    rounding: str = "rounded to the nearest"
    erf: bool = True
    first_var: str = "beta"

    @property
    def level(self) -> Callable[[Tensor], Tensor]:
        """Which of 0 ... 255 a value in [-1, 1] becomes."""
        return {
            "rounded to the nearest": nearest,
            "cut off": _cut_off,
            "half rounded up": _half_up,
        }[self.rounding]

    def timesteps(
        self, total: int, solver: str, steps: Steps, spacing: str | None = None
    ) -> NDArray[np.int64]:
        """The timesteps that `solver` visits, decreasing; a spacing that is asked for counts more than the preset's."""
        if steps is None:
            steps = DEFAULT_STEPS.get(solver)
            steps = steps and min(steps, total)
        if spacing is None and isinstance(steps, int) and 1 <= steps < total:
            return self.choose(total, solver, steps)
        return choose_timesteps(total, steps, spacing or "linspace")

    def table(
        self,
        schedule: NoiseSchedule,
        solver: str,
        t: NDArray[np.int64],
        prediction: str = "eps",
        variance: str = "fixed_large",
        clip: float | None = 1.0,
        eta: float = 0.0,
    ) -> StepTable:
        """The table of a solver by name: "ddpm" reads `variance`, "ddim" reads `eta`."""
        check_eta(solver, eta)
        chain = SinglePrecision(schedule.beta) if self.single else schedule
        if solver == "ddpm":
            return ddpm_table(chain, t, prediction, variance, clip)
        if solver == "ddim":
            return ddim_table(
                chain, t, prediction, eta, clip if self.ddim_clip else None, self.eps_from
            )
        return dpm_solver_table(chain, t, prediction, solver == "dpm++2m-sde", clip)


class SinglePrecision(NoiseSchedule):
    """A schedule in fp32, in the order of operations of diffusers and ermongroup/ddim: all from alpha_bar, beta by a ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        bar = torch.from_numpy(1 - self.beta.astype(np.float32)).cumprod(0).numpy()
        object.__setattr__(self, "alpha_bar", bar)

    def respaced(self, timesteps: NDArray[np.int64]) -> NoiseSchedule:  # type: ignore[override]
        chain = SinglePrecision(super().respaced(timesteps).beta)
        bar = self.alpha_bar[timesteps]
        alpha = bar / np.concatenate([np.ones(1, np.float32), bar[:-1]])
        for name, value in dict(alpha_bar=bar, alpha=alpha, beta=1 - alpha).items():
            object.__setattr__(chain, name, value)
        return chain

    @cached_property
    def alpha_bar_prev(self) -> Array:
        return np.concatenate([np.ones(1, np.float32), self.alpha_bar[:-1]])

    @cached_property
    def noise_var(self) -> Array:
        return 1 - self.alpha_bar

    @cached_property
    def noise_var_prev(self) -> Array:
        return 1 - self.alpha_bar_prev


def _all(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    raise ValueError(
        f"{steps} steps: the preset ho visits all {total} timesteps; leave steps out, or name a spacing"
    )


def _sections(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    return choose_timesteps(total, steps, "openai")


def _leading(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    if solver.startswith(
        "dpm++"
    ):  # one more than asked for, and not the last: T-1 is visited, 0 is not
        return np.round(np.linspace(0, total - 1, steps + 1)).astype(np.int64)[:0:-1]
    return choose_timesteps(total, steps, "leading")


def _uniform(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    return np.arange(0, total, total // steps)[::-1]  # more than `steps` where it does not divide T


def _cut_off(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).floor()


def _half_up(x: Tensor) -> Tensor:
    return ((x + 1) * 0.5 * 255 + 0.5).floor()


EXACT = Preset()
PRESETS: dict[str, Preset] = {
    "exact": EXACT,
    "ho": Preset(_all, rounding="cut off", erf=False, first_var="posterior"),
    "openai": Preset(_sections, rounding="cut off", erf=False, first_var="posterior"),
    "diffusers": Preset(_leading, single=True, eps_from="network", first_var="floor"),
    "ddim": Preset(
        _uniform,
        single=True,
        eps_from="network",
        ddim_clip=False,
        rounding="half rounded up",
        first_var="posterior",
    ),
}
"""
exact      this package's own: fp64 tables, both ends of the chain visited, rounding to the nearest, exact decoder.
ho         hojonathanho/diffusion (Ho et al. 2020): every timestep, nothing respaced. Its FID was taken from floats, which no file
           holds (output="float"); files are cut off towards black, which darkens every pixel by half a level on average.
openai     improved-diffusion, guided-diffusion (Nichol & Dhariwal 2021): respaced in sections, eps from the clipped x_0, cut
           off; bits per dimension with a tanh for the normal distribution function, as Ho's.
diffusers  DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler by default: leading spacing, so that few steps never see
           the noisiest timesteps (the start is treated as less noisy than it is, which costs FID: Lin et al. 2024, table 2);
           DDIM's eps unclipped beside a clipped x_0; fp32 tables.
ddim       ermongroup/ddim (Song et al. 2021): x_0 never clipped under DDIM; uniform steps by default, quadratic for the FID in
           the paper (CIFAR-10: 4.16 against 5.68 with uniform ones, ermongroup/ddim#3); half rounds up.

Rounding moves FID by what half a level is worth to the features, which is small but not nothing; spacing and clipping move
it by whole points at 50 steps and hardly at 1000. Measured on the network that ships: docs/solvers.md.
"""


def preset_of(name: str) -> Preset:
    """ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
