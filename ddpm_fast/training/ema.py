"""Exponential moving averages of the weights, several in one run.

    average <- d_n average + (1 - d_n) weights
    d_n = min(decay, 1 - (1 + n / inv_gamma)^-power)     at step n = 0, 1, ...

Each average has its own maximum decay. The first one is the main average, "ema"; each further one
is named after its decay, such as "ema_0.9995".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.unet import UNet
from .config import TrainConfig
from .flat_weights import flatten

MAIN = "ema"


def names_of(config: TrainConfig) -> tuple[str, ...]:
    """Names of a configuration's averages, the main one first; empty without EMA."""
    if not config.use_ema:
        return ()
    return (MAIN, *(f"{MAIN}_{decay!r}" for decay in config.ema_decays[1:]))


class Averages:
    """Averages of one network: for each name a `UNet` in eval mode and its flat vector.

    Args:
        unet: The network; copied before its parameters become views of a vector.
        config: Source of use_ema, ema_decays, ema_inv_gamma and ema_power.
    """

    def __init__(self, unet: UNet, config: TrainConfig) -> None:
        self._config = config
        self.unets = {
            name: copy.deepcopy(unet).eval().requires_grad_(False) for name in names_of(config)
        }
        self.vectors: dict[str, Tensor] = {
            name: flatten(average) for name, average in self.unets.items()
        }

    @torch.no_grad()
    def update(self, weights: Tensor, step: int) -> None:
        """Updates every average with the flat `weights` after step 0, 1, ... without a sync."""
        decays = self._config.ema_decays_at(step)
        for vector, decay in zip(self.vectors.values(), decays, strict=False):  # none without EMA
            vector.lerp_(weights, 1 - decay)

    def check_names(self, state: Mapping[str, Tensor]) -> None:
        """ValueError if the checkpoint `state` has other averages: none can start in mid-run."""
        saved = sorted(name for name in state if name == MAIN or name.startswith(f"{MAIN}_"))
        if saved != sorted(self.vectors):
            raise ValueError(
                f"the averages are {_listed(sorted(self.vectors))}; expected {_listed(saved)}, as "
                "in the checkpoint: resume with the same number and order of ema_decays "
                "(the first value may change)"
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
