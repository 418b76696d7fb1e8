"""Training configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..diffusion.losses import LEARNING_VARIANCE, LOSSES
from ..diffusion.prediction import PREDICTIONS
from ..utils.validation import integer, is_number, seed_bits

TIMESTEP_SAMPLING = ("uniform", "loss_aware")
PRECISIONS = ("no", "bf16", "fp16")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "linear")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Names as in diffusers' train_unconditional.py where it has them.

    train_batch_size             images of one forward pass; `gradient_accumulation_steps` of them make one step
    learning_rate, lr_scheduler  "constant", "constant_with_warmup", "cosine" or "linear" (to zero at the last step)
    lr_warmup_steps              the rate rises linearly over so many steps; "constant" has none
    lr_decay_start               fraction of max_train_steps before which "cosine" and "linear" stay at learning_rate, 0 to below 1
    max_grad_norm                gradients longer than this are shortened to it
    ema_decays                   one average of the weights per decay, all different; the first is the main one
    ema_inv_gamma, ema_power     decay at step n: min(decay, 1 - (1 + n / inv_gamma)^-power), zero at the first
    mixed_precision              "no", "bf16" or "fp16" (with loss scaling): of the network's operations; weights stay fp32
    prediction_type              "eps", "x_0" or "v"
    loss_type                    "simple", "min_snr" (with snr_gamma), "hybrid" or "vlb": see `losses.Objective`; the last two
                                 teach the variance and need a network that gives twice the channels
    timestep_sampling            "uniform" or "loss_aware", in proportion to the root of the mean squared loss
    random_flip                  half of the images are mirrored, drawn again in every epoch
    seed                         0 ... 2^64-1: of everything that is drawn
    compile                      the network through torch.compile

    Raises ValueError for an invalid value, which it names.
    """

    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 100_000
    learning_rate: float = 1e-4
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 500
    lr_decay_start: float = 0.0
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_ema: bool = True
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    ema_decays: tuple[float, ...] = (0.9999,)
    mixed_precision: str = "no"
    prediction_type: str = "eps"
    loss_type: str = "simple"
    snr_gamma: float = 5.0
    timestep_sampling: str = "uniform"
    random_flip: bool = False
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps"):
            if integer(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1")
        if integer("lr_warmup_steps", self.lr_warmup_steps) < 0:
            raise ValueError(f"lr_warmup_steps = {self.lr_warmup_steps}; expected at least 0")
        for name in (
            "learning_rate",
            "adam_epsilon",
            "max_grad_norm",
            "ema_inv_gamma",
            "ema_power",
            "snr_gamma",
        ):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected a positive number")
        for name in ("adam_beta1", "adam_beta2", "lr_decay_start"):
            if not is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected 0 to below 1")
        if self.lr_decay_start and self.lr_scheduler not in ("cosine", "linear"):
            raise ValueError(
                f"lr_decay_start = {self.lr_decay_start} with lr_scheduler {self.lr_scheduler!r}, which never decays; "
                "expected 0, or choose cosine or linear"
            )
        object.__setattr__(self, "ema_decays", _decays(self.ema_decays))
        if not is_number(self.adam_weight_decay) or self.adam_weight_decay < 0:
            raise ValueError(f"adam_weight_decay = {self.adam_weight_decay!r}; expected 0 or more")
        for name, known in (
            ("lr_scheduler", LR_SCHEDULERS),
            ("mixed_precision", PRECISIONS),
            ("prediction_type", PREDICTIONS),
            ("loss_type", LOSSES),
            ("timestep_sampling", TIMESTEP_SAMPLING),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        seed_bits(self.seed)

    @property
    def learned_variance(self) -> bool:
        """Does the network learn its variance, in a second half of its channels?"""
        return self.loss_type in LEARNING_VARIANCE

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if self.lr_scheduler == "constant":
            return self.learning_rate
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        if self.lr_scheduler == "constant_with_warmup":
            return self.learning_rate
        start = max(self.lr_warmup_steps, self.lr_decay_start * self.max_train_steps)
        left = 1 - (step - start) / max(1, self.max_train_steps - start)
        left = min(1.0, max(0.0, left))
        return self.learning_rate * (
            left if self.lr_scheduler == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        )

    def ema_decays_at(self, step: int) -> tuple[float, ...]:
        """What each average keeps of itself at step 0, 1, ...: nothing at first, so that it forgets the random start."""
        warm = 1 - (1 + step / self.ema_inv_gamma) ** -self.ema_power
        return tuple(min(decay, warm) for decay in self.ema_decays)


def config_warnings(config: TrainConfig, images: int) -> list[str]:
    """What probably is not meant, one line each: a valid configuration for `images` images that wastes its run."""
    steps, lines = config.max_train_steps, []
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= steps:
        highest = config.rate(steps - 1)
        lines.append(
            f"lr_warmup_steps is {config.lr_warmup_steps} in a run of {steps} steps: the learning rate only rises, "
            f"to {highest:.2g}; set --lr_warmup_steps {steps // 10}"
        )
    elif 0 < config.lr_decay_start * steps < config.lr_warmup_steps:
        lines.append(
            f"lr_decay_start is {config.lr_decay_start}, step {config.lr_decay_start * steps:.0f} of {steps}, before the "
            f"end of the {config.lr_warmup_steps} warm-up steps: the decay starts after them; lower --lr_warmup_steps"
        )
    if config.train_batch_size > images:
        lines.append(
            f"train_batch_size is {config.train_batch_size} with {images} images: a batch repeats images; "
            f"lower --train_batch_size"
        )
    return lines


def _decays(value: Any) -> tuple[float, ...]:
    """`ema_decays` as a tuple of floats. ValueError for anything else than different numbers from 0 to below 1."""
    decays = tuple(value) if isinstance(value, (tuple, list)) else ()
    if (
        not decays
        or not all(is_number(decay) and 0 <= decay < 1 for decay in decays)
        or len(set(decays)) < len(decays)
    ):
        raise ValueError(
            f"ema_decays = {value!r}; expected different numbers from 0 to below 1, such as (0.999, 0.9999)"
        )
    return tuple(map(float, decays))
