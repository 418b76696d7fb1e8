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
    """Training configuration; most names are those of diffusers' train_unconditional.py.

    Args:
        train_batch_size: Images per forward pass.
        gradient_accumulation_steps: Batches per optimizer step.
        max_train_steps: Optimizer steps of the whole run.
        learning_rate: Maximum learning rate.
        lr_scheduler: "constant", "constant_with_warmup", "cosine" or "linear"; the last two decay
            to zero at the last step.
        lr_warmup_steps: Steps of linear warm-up; "constant" has none.
        lr_decay_start: Fraction of max_train_steps, in [0, 1), at which "cosine" and "linear" start
            to decay.
        adam_beta1: AdamW's first beta, in [0, 1).
        adam_beta2: AdamW's second beta, in [0, 1).
        adam_weight_decay: AdamW's weight decay, at least 0.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: Gradients with a larger norm are scaled to it.
        use_ema: Whether the weights are averaged.
        ema_inv_gamma: At step n = 0, 1, ... the decay is
            min(decay, 1 - (1 + n / ema_inv_gamma)^-ema_power).
        ema_power: See ema_inv_gamma.
        ema_decays: Maximum decays, all different, one average for each; the first is the main one.
        mixed_precision: "no", "bf16" or "fp16" (with loss scaling), for the network's operations;
            weights stay fp32.
        prediction_type: "eps", "x_0" or "v".
        loss_type: "simple", "min_snr", "hybrid" or "vlb"; see `losses.Objective`. The last two
            train the variance and need a network with twice the output channels.
        snr_gamma: Gamma of "min_snr".
        timestep_sampling: "uniform" or "loss_aware"; see `timestep_sampler.LossAware`.
        random_flip: Mirrors half of the images, chosen again in every epoch.
        seed: Seed of all random draws, 0 to 2^64 - 1.
        compile: Whether the network runs through torch.compile.

    Raises:
        ValueError: A value is invalid; the message names it.
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
        positive = ("learning_rate", "adam_epsilon", "max_grad_norm")
        for name in (*positive, "ema_inv_gamma", "ema_power", "snr_gamma"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected a positive number")
        for name in ("adam_beta1", "adam_beta2", "lr_decay_start"):
            if not is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected 0 to below 1")
        if self.lr_decay_start and self.lr_scheduler not in ("cosine", "linear"):
            raise ValueError(
                f"lr_decay_start = {self.lr_decay_start} with lr_scheduler {self.lr_scheduler!r}, "
                "which never decays; expected 0, or choose cosine or linear"
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
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(known)}")
        seed_bits(self.seed)

    @property
    def learned_variance(self) -> bool:
        """Whether the network predicts its variance, in a second half of its channels."""
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
        """Decay of each average at step 0, 1, ...; 0 at step 0, which drops the random start."""
        warm = 1 - (1 + step / self.ema_inv_gamma) ** -self.ema_power
        return tuple(min(decay, warm) for decay in self.ema_decays)


def config_warnings(config: TrainConfig, images: int) -> list[str]:
    """Warnings, one line each, about valid settings that waste a run on `images` images."""
    steps, lines = config.max_train_steps, []
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= steps:
        highest = config.rate(steps - 1)
        lines.append(
            f"lr_warmup_steps is {config.lr_warmup_steps} in a run of {steps} steps: the learning "
            f"rate only rises, to {highest:.2g}; set --lr_warmup_steps {steps // 10}"
        )
    elif 0 < config.lr_decay_start * steps < config.lr_warmup_steps:
        lines.append(
            f"lr_decay_start is {config.lr_decay_start}, step {config.lr_decay_start * steps:.0f} "
            f"of {steps}, before the end of the {config.lr_warmup_steps} warm-up steps: the decay "
            "starts after them; lower --lr_warmup_steps"
        )
    if config.train_batch_size > images:
        lines.append(
            f"train_batch_size is {config.train_batch_size} with {images} images: a batch repeats "
            "images; lower --train_batch_size"
        )
    return lines


def _decays(value: Any) -> tuple[float, ...]:
    """`ema_decays` as a tuple of floats. ValueError unless all differ and lie in [0, 1)."""
    decays = tuple(value) if isinstance(value, (tuple, list)) else ()
    in_range = all(is_number(decay) and 0 <= decay < 1 for decay in decays)
    if not decays or not in_range or len(set(decays)) < len(decays):
        raise ValueError(
            f"ema_decays = {value!r}; expected different numbers from 0 to below 1, "
            "such as (0.999, 0.9999)"
        )
    return tuple(map(float, decays))
