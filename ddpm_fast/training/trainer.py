"""Trainer: a bit-exactly repeatable training step (Ho et al. 2020, algorithm 1).

    x_0 ~ data;  t ~ uniform;  eps ~ N(0, 1);  descend the gradient of || eps - eps_theta(x_t, t) ||^2

or of another loss of `losses.Objective`. eps is drawn by `q_sample` and again by the loss, and never stored.

Nothing is drawn from a generator with a state. The order of the images, each one's timestep, flip and noise are functions of
(seed, image, epoch), so a run that was killed resumes bit-exactly from its step number and tensors.
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

VALIDATION_ROW = 2**24 - 1  # the noise of validation: a row that no epoch reaches


class Trainer:
    """A UNet in training, its averages and its optimizer, on one device.

    unet      changed in place, to be read at any time; fp32
    ema       a `UNet` with the main running average of the weights (the weights themselves where use_ema is off)
    averages  name -> `UNet` of every average: "ema", then such as "ema_0.9995" for further decays (see `ema.Averages`)
    done      steps taken

    On a CPU every thread computes a part of the batch if each part has at least 8 images.
    ValueError where network, data and configuration do not fit together.
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
        epochs = (
            config.max_train_steps
            * config.train_batch_size
            * config.gradient_accumulation_steps
            // len(data)
        )
        if epochs >= VALIDATION_ROW:
            raise ValueError(
                f"{epochs} epochs of {len(data)} images; expected fewer than {VALIDATION_ROW}"
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
        self.scaler.scale(
            torch.zeros((), device=self.device)
        )  # made here, not by whichever thread comes first
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
        # since the last `means`: loss, gradient norm, steps kept and skipped; then losses and images by quartile of t
        self._sums = torch.zeros(4 + 2 * QUARTILES, device=self.device)
        self._skips = torch.zeros((), dtype=torch.int64, device=self.device)
        self._model: Callable[..., Tensor] = (
            torch.compile(self.unet) if config.compile else self.unet
        )
        self._parts, self._pool = split_over_cores(self.unet, config, self.device)
        self.norm_fallback = ""  # why PyTorch computes GroupNorm on a CPU, if it does
        if self.device.type == "cpu":
            keep_freed_memory()
            if (dtype := AUTOCAST[config.mixed_precision]) is not None:
                use_fp32_for_slow_ops(self.unet, dtype)
            if not config.compile:  # the compiler fuses by itself and cannot look into machine code
                self.norm_fallback = use_fused_norms(self.unet)

    def step(self) -> None:
        """One optimizer step. Nothing here waits for the device. A step whose gradient is not finite changes no weight."""
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
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # the fused kernel then leaves all as it is
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
        """The latest steps in a row whose gradient was not finite. Waits for the device."""
        return int(self._skips)

    def is_finite(self) -> bool:
        """Whether weights and averages give a finite loss on up to 64 images. Waits for the device."""
        networks = {id(unet): unet for unet in (self.unet, *self.averages.values())}
        count = min(64, self.config.train_batch_size)
        return all(
            math.isfinite(self.validation_loss(unet, self.data, count))
            for unet in networks.values()
        )

    def means(self, reset: bool = True) -> dict[str, float]:
        """Loss and gradient norm, averaged since the last reset over the steps that were not skipped, and how many were.

        loss_q0 ... loss_q3 are the mean losses of the images whose t was in [0, T/4), ... [3T/4, T), unweighted by how t was
        drawn. NaN for a mean over nothing. Waits for the device.
        """
        (loss, norm, steps, skipped), losses, images = self._sums.cpu().split(
            [4, QUARTILES, QUARTILES]
        )
        by_quartile = {f"loss_q{i}": mean for i, mean in enumerate((losses / images).tolist())}
        means = dict(
            loss=float(loss / steps),
            grad_norm=float(norm / steps),
            skipped=int(skipped),
            **by_quartile,
        )
        if reset:
            self._sums.zero_()
        return means

    @torch.no_grad()
    def validation_loss(self, unet: UNet, data: ImageData, count: int = 512) -> float:
        """The loss of a network on `count` images of `data`, spread over it and over t; noise and choice never change."""
        count = min(count, len(data))
        place = torch.arange(count)
        chosen = place * len(data) // count
        # multiples of the golden ratio: as even as a grid, and no class of sorted data is limited to certain timesteps
        times = ((place * 0.6180339887498949) % 1 * len(self.schedule)).long()
        total, training = 0.0, unet.training
        unet.eval()
        for some in place.split(min(64, self.config.train_batch_size)):
            image, t = chosen[some], times[some].to(self.device)
            x_0 = from_uint8(torch.from_numpy(data.images[image.numpy()]).to(self.device))
            labels = (
                None
                if data.labels is None
                else torch.from_numpy(data.labels)[image].to(self.device)
            )
            batch = Batch(
                image.to(self.device), torch.full_like(t, VALIDATION_ROW), t, t, x_0, labels
            )
            total += float(self._losses(unet, self._noised(batch)).sum())
        unet.train(training)
        return total / count

    # ---- the gradient

    def _gradient(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and flat gradient of batch `number`, scaled so that the step's batches add up to their mean; `quartile_sums`."""
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

    # ---- everything that a resumed run needs

    def state(self) -> dict[str, Tensor]:
        """Weights, averages, Adam's moments, the sums since the last `means`, and the losses of the timesteps where those count.

        Beside the number `done`, that is everything.
        """
        moments = self.optimizer.state[self.weights]
        if not moments:  # as Adam itself initializes them
            moments.update(
                step=torch.zeros((), device=self.device), exp_avg=torch.zeros_like(self.weights)
            )
            moments.update(exp_avg_sq=torch.zeros_like(self.weights))
        state = dict(weights=self.weights.detach(), sums=self._sums, **moments)
        if self.timesteps is not None:
            state.update(loss_squares=self.timesteps.squares, loss_count=self.timesteps.count)
        return {**state, **self._averages.vectors}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], done: int) -> None:
        """Goes on from `state` after `done` steps. ValueError for vectors that are missing, too many or of another length.

        Averages can be neither added nor removed on the way.
        """
        self._averages.check_names(state)
        current = self.state()
        if wrong := sorted(current.keys() ^ state.keys()) or [
            k for k in current if current[k].shape != state[k].shape
        ]:
            raise ValueError(
                f"the state belongs to another network or configuration: {', '.join(wrong)} differ"
            )
        for name, tensor in current.items():
            tensor.copy_(state[name])
        self.done = done

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of a run: see `identity.run_identity`."""
        return run_identity(self.unet.config, self.schedule, self.data, self.config)
