"""Parity presets: the conventions in which codebases differ for the same solver.

Report the preset with every figure.
"""

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

# None: the whole chain
DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpm++2m": 20, "dpm++2m-sde": 20}


@dataclass(frozen=True)
class Preset:
    """Conventions of a codebase for sampling and for bits per dimension.

    Args:
        choose: (T, solver, number of steps) -> timesteps, decreasing, for a subset of the chain.
        single_precision: Compute the tables in fp32 from alpha_bar, as those codebases do, instead
            of in fp64. This changes beta by a relative error of 5e-4 near t = 4.
        eps_from: What DDIM's eps is computed from: the clipped "x_0", or the "network".
        ddim_clip: Clip x_0 under DDIM.
        rounding: To 0 ... 255: "rounded to the nearest", "cut off" or "half rounded up".
        erf: Normal distribution function of the decoder: exact in fp64, or approximated by tanh.
        decoder_variance: Variance of the decoder p(x_0 | x_1). It changes the likelihood only: the
            last step of sampling adds no noise.
            "beta": beta_0 for fixed_large, the posterior's at t = 1 for fixed_small (at t = 0 it
            is 0);
            "posterior": the posterior's at t = 1 for both, as in the code of Ho et al.;
            "floor": beta_0 for fixed_large, 1e-20 for fixed_small.
    """

    choose: Callable[[int, str, int], NDArray[np.int64]] = lambda total, solver, steps: (
        choose_timesteps(total, steps)
    )
    single_precision: bool = False
    eps_from: str = "x_0"
    ddim_clip: bool = True
    rounding: str = "rounded to the nearest"
    erf: bool = True
    decoder_variance: str = "beta"

    @property
    def level(self) -> Callable[[Tensor], Tensor]:
        """Rounding function from [-1, 1] to 0 ... 255."""
        return {
            "rounded to the nearest": nearest,
            "cut off": _cut_off,
            "half rounded up": _half_up,
        }[self.rounding]

    def timesteps(
        self, total: int, solver: str, steps: Steps, spacing: str | None = None
    ) -> NDArray[np.int64]:
        """Returns the timesteps that a solver visits, decreasing.

        Args:
            total: T, the length of the training chain.
            solver: Name of the solver; decides the default number of steps.
            steps: As in `choose_timesteps`; None: `DEFAULT_STEPS`.
            spacing: Overrides the preset's spacing.

        Raises:
            ValueError: As in `choose_timesteps`.
        """
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
        """Returns the step table of a solver at the timesteps t; see `solvers`.

        "ddpm" uses `variance`, "ddim" uses `eta`.

        Raises:
            ValueError: An option is unknown, out of range or of another solver.
        """
        check_eta(solver, eta)
        chain = SinglePrecision(schedule.beta) if self.single_precision else schedule
        if solver == "ddpm":
            return ddpm_table(chain, t, prediction, variance, clip)
        if solver == "ddim":
            return ddim_table(
                chain, t, prediction, eta, clip if self.ddim_clip else None, self.eps_from
            )
        return dpm_solver_table(chain, t, prediction, solver == "dpm++2m-sde", clip)


class SinglePrecision(NoiseSchedule):
    """Schedule in fp32 with the order of operations of diffusers and ermongroup/ddim.

    Everything is computed from alpha_bar; beta is 1 minus a ratio of alpha_bar.
    """

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
        f"{steps} steps: the preset ho visits all {total} timesteps; omit steps, or give a spacing"
    )


def _sections(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    return choose_timesteps(total, steps, "openai")


def _leading(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    if solver.startswith("dpm++"):  # the first n of n + 1: T-1 is visited, 0 is not
        return np.round(np.linspace(0, total - 1, steps + 1)).astype(np.int64)[:0:-1]
    return choose_timesteps(total, steps, "leading")


def _uniform(total: int, solver: str, steps: int) -> NDArray[np.int64]:
    return np.arange(0, total, total // steps)[::-1]  # more than `steps` if it does not divide T


def _cut_off(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).floor()


def _half_up(x: Tensor) -> Tensor:
    return ((x + 1) * 0.5 * 255 + 0.5).floor()


EXACT = Preset()
PRESETS: dict[str, Preset] = {
    "exact": EXACT,
    "ho": Preset(_all, rounding="cut off", erf=False, decoder_variance="posterior"),
    "openai": Preset(_sections, rounding="cut off", erf=False, decoder_variance="posterior"),
    "diffusers": Preset(
        _leading, single_precision=True, eps_from="network", decoder_variance="floor"
    ),
    "ddim": Preset(
        _uniform,
        single_precision=True,
        eps_from="network",
        ddim_clip=False,
        rounding="half rounded up",
        decoder_variance="posterior",
    ),
}
"""
exact      Default: fp64 tables, both ends of the chain visited, rounding to the nearest, exact
           decoder.
ho         hojonathanho/diffusion (Ho et al. 2020): all timesteps. Files are rounded down, which
           darkens every pixel by half a level on average. The FID was computed from floats
           (output="float").
openai     improved-diffusion, guided-diffusion (Nichol & Dhariwal 2021): sections of timesteps, eps
           from the clipped x_0, rounded down; tanh in the decoder, as in the code of Ho et al.
diffusers  Defaults of DDPMScheduler, DDIMScheduler and DPMSolverMultistepScheduler: leading
           spacing, which omits the noisiest timesteps and increases the FID (Lin et al. 2024,
           table 2); x_0 is clipped but DDIM's eps is not; fp32 tables.
ddim       ermongroup/ddim (Song et al. 2021): no clipping under DDIM; half rounds up. Spacing is
           uniform by default and quadratic for the FID of the paper (CIFAR-10: 4.16; uniform 5.68,
           ermongroup/ddim#3).

At 50 steps, spacing and clipping change the FID by whole points, at 1000 steps hardly at all;
rounding changes it little. Measurements: docs/solvers.md.
"""


def preset_of(name: str) -> Preset:
    """Returns the preset of a name. ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
