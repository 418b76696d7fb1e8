"""Trainer: a bit-exactly repeatable training step (Ho et al. 2020, algorithm 1).

    x_0 ~ data;  t ~ uniform;  eps ~ N(0, 1)
    gradient step on || eps - eps_theta(x_t, t) ||^2, or on another loss of `losses.Objective`

`q_sample` and the loss both compute eps from counters; it is never stored. Timesteps, flips and
noise are functions of (seed, image, epoch), and the order of the images of (seed, epoch). No
generator has a state, so a killed run resumes bit-exactly from its step number and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.datasets import ImageData
from ..data.pixels import from_uint8
from ..diffusion.losses import Objective
from ..diffusion.schedule import NoiseSchedule
from ..kernels.q_sample import q_sample
from ..models.unet import UNet
from ..utils.validation import seed_bits
from .config import TrainConfig
from .cpu_ops import use_fp32_for_slow_ops, use_fused_norms
from .data_loader import Batch, BatchLoader
from .ema import MAIN, Averages
from .flat_weights import as_vector, flatten, sum_in_order
from .gradient import (
    AUTOCAST,
    Noised,
    autocast,
    dropout_rng,
    keep_freed_memory,
    split_over_cores,
)
from .identity import check_batch, check_fit, run_identity
from .timestep_sampler import QUARTILES, LossAware, quartile_sums

VALIDATION_ROW = 2**24 - 1  # noise counter of validation, which no epoch reaches


class Trainer:
    """Trainer of a UNet on one device, with the optimizer and the averages of the weights.

    On a CPU every thread computes a part of the batch if each part has at least 8 images.

    Args:
        unet: The network; converted to fp32 and trained in place.
        schedule: Noise schedule.
        data: Training images and labels.
        config: Training configuration.
        device: Device of the network; default: the GPU if there is one.

    Attributes:
        unet: The network in training.
        ema: A `UNet` with the main average of the weights; `unet` itself if use_ema is off.
        averages: A `UNet` per average by name: "ema", "ema_0.9995", ... (see `ema.Averages`).
        done: Number of completed steps.

    Raises:
        ValueError: Network, data and configuration do not fit together.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        data: ImageData,
        config: TrainConfig,
        device: torch.device | str | None = None,
    ) -> None:
        self.config, self.schedule, self.data = config, schedule, data
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_fit(unet, data, config.learned_variance)
        check_batch(config, len(data))
        per_step = config.train_batch_size * config.gradient_accumulation_steps
        epochs = config.max_train_steps * per_step // len(data)
        if epochs >= VALIDATION_ROW:
            raise ValueError(
                f"max_train_steps is {config.max_train_steps}, {epochs} epochs of {len(data)} "
                f"images; expected fewer than {VALIDATION_ROW} epochs"
            )
        self.unet = unet.to(self.device, torch.float32).train()
        self._averages = Averages(self.unet, config)
        self.averages = self._averages.unets or {MAIN: self.unet}
        self.ema = self.averages[MAIN]
        self.weights = torch.nn.Parameter(flatten(self.unet))
        self._parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(
            [self.weights],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        self.loader = BatchLoader(
            data,
            config.seed,
            config.train_batch_size,
            self.device,
            config.random_flip,
            len(schedule),
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.mixed_precision == "fp16"
        )
        self.scaler.scale(torch.zeros((), device=self.device))  # initializes it before any thread
        self.done = 0
        self.objective = Objective(
            schedule, config.prediction_type, config.loss_type, config.snr_gamma, self.device
        )
        self.timesteps = (
            LossAware(len(schedule), self.device)
            if config.timestep_sampling == "loss_aware"
            else None
        )
        self._coef = schedule.q_sample_table(self.device)
        # since the last `means`: loss, gradient norm, steps taken, steps skipped; then losses and
        # numbers of images by quartile of t
        self._sums = torch.zeros(4 + 2 * QUARTILES, device=self.device)
        self._skips = torch.zeros((), dtype=torch.int64, device=self.device)
        self._model: Callable[..., Tensor] = (
            torch.compile(self.unet) if config.compile else self.unet
        )
        self._parts, self._pool = split_over_cores(self.unet, config, self.device)
        self.norm_fallback = ""  # reason for the fallback to PyTorch's GroupNorm on a CPU
        if self.device.type == "cpu":
            keep_freed_memory()
            if (dtype := AUTOCAST[config.mixed_precision]) is not None:
                use_fp32_for_slow_ops(self.unet, dtype)
            if not config.compile:  # torch.compile fuses, and cannot trace native code
                self.norm_fallback = use_fused_norms(self.unet)

    def step(self) -> None:
        """One optimizer step, without a sync. A gradient with NaN or Inf changes no weight."""
        config = self.config
        accumulate = config.gradient_accumulation_steps
        loss, self.weights.grad, quartiles = self._gradient(self.done * accumulate)
        for number in range(self.done * accumulate + 1, (self.done + 1) * accumulate):
            more, gradient, more_quartiles = self._gradient(number)
            loss, quartiles = loss + more, quartiles + more_quartiles
            self.weights.grad += gradient
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.done)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_([self.weights], config.max_grad_norm)
        is_finite = norm.isfinite() & loss.isfinite()
        skipped = (~is_finite).float()
        if not self.scaler.is_enabled():
            # the fused kernel changes nothing if this is 1
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._averages.update(self.weights.detach(), self.done)
        self._sums += torch.where(
            is_finite, torch.cat([torch.stack([loss, norm, 1 - skipped, skipped]), quartiles]), 0
        )
        self._sums[3] += skipped
        self._skips = torch.where(is_finite, 0, self._skips + 1)
        self.done += 1

    @property
    def consecutive_skips(self) -> int:
        """Number of consecutive skipped steps up to the last one. Waits for the device."""
        return int(self._skips)

    def is_finite(self) -> bool:
        """Whether weights and averages have finite losses on 64 images. Waits for the device."""
        networks = {id(unet): unet for unet in (self.unet, *self.averages.values())}
        count = min(64, self.config.train_batch_size)
        return all(
            math.isfinite(self.validation_loss(unet, self.data, count))
            for unet in networks.values()
        )

    def means(self, reset: bool = True) -> dict[str, float]:
        """Means over the steps since the last reset. Waits for the device.

        Args:
            reset: Starts new sums.

        Returns:
            loss and grad_norm, over the steps that were not skipped; skipped, the number of those
            that were; loss_q0, ..., loss_q3, the unweighted mean losses of the images with t in
            [0, T/4), ..., [3T/4, T). A mean of no values is NaN.
        """
        totals, losses, images = self._sums.cpu().split([4, QUARTILES, QUARTILES])
        loss, norm, steps, skipped = totals
        means = dict(loss=float(loss / steps), grad_norm=float(norm / steps), skipped=int(skipped))
        means |= {f"loss_q{i}": mean for i, mean in enumerate((losses / images).tolist())}
        if reset:
            self._sums.zero_()
        return means

    @torch.no_grad()
    def validation_loss(self, unet: UNet, data: ImageData, count: int = 512) -> float:
        """Mean loss of a network on fixed images, timesteps and noise.

        Args:
            unet: The network.
            data: Images, of which evenly spaced ones are used, with evenly spaced timesteps.
            count: Number of images, at most all.
        """
        count = min(count, len(data))
        number = torch.arange(count)
        chosen = number * len(data) // count
        # Multiples of the golden ratio are as even as a grid, and give every class of sorted data
        # all timesteps.
        times = ((number * 0.6180339887498949) % 1 * len(self.schedule)).long()
        total, training = 0.0, unet.training
        unet.eval()
        for part in number.split(min(64, self.config.train_batch_size)):
            image, t = chosen[part], times[part].to(self.device)
            x_0 = from_uint8(torch.from_numpy(data.images[image.numpy()]).to(self.device))
            labels = None
            if data.labels is not None:
                labels = torch.from_numpy(data.labels)[image].to(self.device)
            row = torch.full_like(t, VALIDATION_ROW)
            batch = Batch(image.to(self.device), row, t, t, x_0, labels)
            total += float(self._losses(unet, self._noised(batch)).sum())
        unet.train(training)
        return total / count

    # ---- the gradient

    def _gradient(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradient of batch `number`, divided by the batches per step; quartile sums."""
        batch, weight = self.loader.batch(number), None
        if self.timesteps is not None:
            t, weight = self.timesteps.draw(batch.word)
            batch = batch._replace(t=t)
        inputs = self._noised(batch, weight)
        share = 1 / (self._parts * self.config.gradient_accumulation_steps)

        def part(inputs: Noised) -> tuple[Tensor, Tensor, Tensor]:
            losses = self._losses(self._model, inputs)
            loss = (losses if inputs.weight is None else losses * inputs.weight).mean() * share
            gradients = torch.autograd.grad(self.scaler.scale(loss), self._parameters)
            return loss.detach(), losses.detach(), torch.cat([as_vector(g) for g in gradients])

        if self._pool is None:
            with dropout_rng(self.unet, self.config.seed, number):
                loss, losses, gradient = part(inputs)
        else:
            chunks = zip(
                *(v.chunk(self._parts) if v is not None else [None] * self._parts for v in inputs),
                strict=True,
            )
            results = self._pool.map(lambda chunk: part(Noised(*chunk)), chunks)
            scaled, unweighted, gradients = zip(*results, strict=True)
            loss, losses, gradient = sum(scaled), torch.cat(unweighted), sum_in_order(gradients)
        if self.timesteps is not None:
            self.timesteps.update(inputs.t, losses)
        return loss, gradient, quartile_sums(inputs.t, losses, len(self.schedule))

    def _noised(self, batch: Batch, weight: Tensor | None = None) -> Noised:
        labels = batch.labels if self.unet.config.num_classes else None
        seed = torch.full_like(batch.image, seed_bits(self.config.seed))
        x_t = q_sample(batch.x_0, self._coef, batch.t, batch.epoch, seed, batch.image)
        return Noised(batch.x_0, x_t, batch.t, batch.epoch, seed, batch.image, labels, weight)

    def _losses(self, model: Callable[..., Tensor], inputs: Noised) -> Tensor:
        with autocast(self.config, self.device):
            out = model(inputs.x_t, inputs.t, inputs.labels)
        return self.objective.losses(out, *inputs[:6])

    # ---- state and identity

    def state(self) -> dict[str, Tensor]:
        """Tensors that, with `done`, determine the rest of the run.

        Returns:
            By name: weights, averages, Adam's moments, the sums since the last reset of `means` and
            the history of loss-aware sampling; not copied.
        """
        moments = self.optimizer.state[self.weights]
        if not moments:  # as Adam itself initializes them
            moments["step"] = torch.zeros((), device=self.device)
            moments["exp_avg"] = torch.zeros_like(self.weights)
            moments["exp_avg_sq"] = torch.zeros_like(self.weights)
        state = dict(weights=self.weights.detach(), sums=self._sums, **moments)
        if self.timesteps is not None:
            state.update(loss_squares=self.timesteps.squares, loss_count=self.timesteps.count)
        return {**state, **self._averages.vectors}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], done: int) -> None:
        """Copies a `state` after `done` steps into this trainer.

        Raises:
            ValueError: The state's names or shapes differ from this trainer's.
        """
        self._averages.check_names(state)
        current = self.state()
        different = sorted(current.keys() ^ state.keys())
        different = different or [k for k in current if current[k].shape != state[k].shape]
        if different:
            raise ValueError(
                f"the state differs in {', '.join(different)}; expected a state of the same "
                "network and configuration"
            )
        for name, tensor in current.items():
            tensor.copy_(state[name])
        self.done = done

    def identity(self) -> dict[str, Any]:
        """Settings that must not change when a run resumes; see `identity.run_identity`."""
        return run_identity(self.unet.config, self.schedule, self.data, self.config)
