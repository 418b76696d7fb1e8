"""Batch sampler: the reverse process (Ho et al. 2020, algorithm 2) for one batch, any solver and any network.

The noise of an image is counted by (seed, image index, step, element), so an image does not depend
on the batch size or on its position in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.prediction import check_prediction
from ..diffusion.presets import preset_of
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import LEARNED, VARIANCES, StepTable
from ..engines.base import DTYPES, Engine, SamplingState, dtype_name
from ..engines.eager import EagerEngine
from ..engines.fused.calibration import Calibration
from ..engines.select import EngineRequest, choose
from ..kernels import noise
from ..models.fingerprint import weights_fingerprint
from ..models.unet import UNet
from ..utils.validation import integer
from .callbacks import Callback
from .request import (
    SamplingOptions,
    SamplingParams,
    as_params,
    check_start,
    check_timestep,
    random_labels,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BatchSampler:
    """A network, its schedule and its engine, for one batch at a time; arguments as for `Sampler`."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: NoiseSchedule,
        shape: tuple[int, int, int],
        prediction: str = "eps",
        variance: str = "fixed_large",
        clip: float | None = 1.0,
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        engine: str = "auto",
        dtype: str | torch.dtype | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        if len(shape) != 3 or min(integer("shape", n) for n in shape) < 1:
            raise ValueError(f"shape {tuple(shape)}; expected (channels, height, width)")
        check_prediction(prediction)
        if variance not in VARIANCES:
            raise ValueError(f"variance {variance!r}; expected one of {', '.join(VARIANCES)}")
        if num_classes is not None and integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes = {num_classes}; expected at least 1, or None")
        learned = variance in LEARNED
        if learned and isinstance(model, UNet) and model.config.out_channels != 2 * shape[0]:
            raise ValueError(
                f"variance {variance!r} needs a network with {2 * shape[0]} output channels, mean and variance; "
                f"this one has {model.config.out_channels}: use a fixed variance"
            )
        c, h, w = shape
        self.schedule, self.shape = schedule, (c, h, w)
        self.prediction, self.variance, self.clip = prediction, variance, clip
        self.num_classes = model.config.num_classes if isinstance(model, UNet) else num_classes
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        default = torch.empty(0, dtype=torch.float32, device="cpu")
        parameter = next((p for p in parameters if p.is_floating_point()), default)
        self.device = torch.device(parameter.device if device is None else device)
        weights_dtype = parameter.dtype if parameter.dtype.itemsize == 2 else torch.float32
        self.precision = dtype_name(weights_dtype if dtype is None else dtype)
        if DTYPES[self.precision].activations != weights_dtype and not isinstance(model, UNet):
            raise ValueError(
                f"dtype {self.precision} with a model of {weights_dtype}; expected that of the model, because only a UNet is "
                "cast: cast the model"
            )
        self._engine_name, self._given, self._calibration = engine, model, calibration
        self._choose()

    def _choose(self) -> None:
        request = EngineRequest(
            self._given,
            self.shape,
            self.precision,
            self.device,
            len(self.schedule),
            self._calibration,
        )
        self.engine: Engine = choose(self._engine_name, request)
        plain = self.engine if isinstance(self.engine, EagerEngine) else None
        self.model = plain.model if plain is not None else self._given
        self.dtype = plain.dtype if plain is not None else torch.float32
        self._weights = self._fingerprint()

    def _fingerprint(self) -> bytes:
        """Of the model's weights, if the engine computes with a copy of them; otherwise empty."""
        uncopied = isinstance(self.engine, EagerEngine) and self.model is self._given
        return (
            b""
            if uncopied or not isinstance(self._given, nn.Module)
            else weights_fingerprint(self._given)
        )

    def table(
        self,
        params: SamplingParams | None = None,
        *,
        start: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> StepTable:
        """The step table of the parameters, or of the same keywords; `start` replaces the first t."""
        p = as_params(params, options)
        preset = preset_of(p.preset)
        t = preset.timesteps(len(self.schedule), p.solver, p.steps, p.spacing)
        if start is not None:
            t = np.concatenate([[check_timestep(start, len(self.schedule))], t[t < start]])
        return preset.table(
            self.schedule, p.solver, t, self.prediction, self.variance, self.clip, p.eta
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(
        self, image: Tensor, seed: int, labels: Tensor | None = None, x: Tensor | None = None
    ) -> SamplingState:
        """The state before the first step, from `x` or x_T, with `labels` or random classes.

        It lies in memory of the engine: release it (`with sampler.begin(...) as state`).
        """
        (c, h, w), classes = self.shape, self.num_classes
        state = self.engine.new_state(len(image), self.shape, self.device, classes is not None)
        try:
            state.image.copy_(image)
            state.seed.fill_(seed)
            state.step_index.zero_()
            if state.labels is not None and classes is not None:
                if labels is None:
                    labels = random_labels(state.seed, state.image, classes)
                state.labels.copy_(labels)
            if x is None:
                x = noise.noise(state.seed, state.image, state.step_index, noise.X_T, c, h, w)
            state.x.copy_(x)
        except BaseException:
            state.release()
            raise
        return state

    def run(self, state: SamplingState, table: StepTable, callback: Callback | None = None) -> None:
        """Advances the state through the whole table, in place."""
        for _ in self.steps(state, table, callback):
            pass

    def steps(
        self,
        state: SamplingState,
        table: StepTable,
        callback: Callback | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[int]:
        """Yields the number of steps completed so far; ends early if `stop()` returns True."""
        with closing(self.engine.steps(state, table, every_step=callback is not None)) as steps:
            for done in steps:
                if callback is not None:
                    callback(done - 1, int(table.t[done - 1]), state.x)
                yield done
                if stop is not None and done < len(table) and stop():
                    return

    def refresh(self) -> None:
        """Rebuilds the engine if the model's weights have changed since they were copied."""
        if self._fingerprint() != self._weights:
            self.engine.free()
            self._choose()

    def check_start(self, start: tuple[Tensor, int], count: int) -> tuple[Tensor, int]:
        """Validates (x_t, t) for `count` images. ValueError for a wrong shape or timestep."""
        return check_start(start, (count, *self.shape), len(self.schedule))
