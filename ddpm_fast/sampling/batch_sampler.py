"""Batch sampler: the reverse process (Ho et al. 2020, algorithm 2) for one batch.

Noise is a function of (seed, image index, step, element), so an image does not depend on the batch
size or on its position in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.prediction import check_prediction
from ..diffusion.presets import preset_of
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import LEARNED, VARIANCES, StepTable
from ..engines.base import (
    DTYPES,
    Engine,
    SamplingState,
    check_device,
    default_numerics,
    dtype_name,
    isolated,
)
from ..engines.eager import EagerEngine
from ..engines.fused.calibration import Calibration
from ..engines.select import EngineRequest, choose
from ..kernels import noise
from ..models.fingerprint import weights_fingerprint
from ..models.unet import UNet
from ..utils.validation import integer
from . import fork
from .callbacks import Callback
from .model import check_model
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
    """Network, schedule and engine for one batch at a time. Arguments as in `Sampler`."""

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
            raise ValueError(f"shape is {tuple(shape)}; expected (channels, height, width)")
        check_prediction(prediction)
        if variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}; expected one of {', '.join(VARIANCES)}")
        if num_classes is not None and integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes = {num_classes}; expected at least 1, or None")
        learned = variance in LEARNED
        if learned and isinstance(model, UNet) and model.config.out_channels != 2 * shape[0]:
            raise ValueError(
                f"variance {variance!r} needs a network with {2 * shape[0]} output channels, mean "
                f"and variance; this one has {model.config.out_channels}: use a fixed variance"
            )
        c, h, w = shape
        self.schedule, self.shape = schedule, (c, h, w)
        self.prediction, self.variance, self.clip = prediction, variance, clip
        self.num_classes = model.config.num_classes if isinstance(model, UNet) else num_classes
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        default = torch.empty(0, dtype=torch.float32, device="cpu")
        parameter = next((p for p in parameters if p.is_floating_point()), default)
        self.device = parameter.device if device is None else check_device(device)
        self.precision = _precision(model, parameter, dtype)
        if not isinstance(model, UNet):
            check_model(model, num_classes, parameter, self.device)
        self._engine_name, self._source_model, self._calibration = engine, model, calibration
        self._choose_engine()

    def arguments(self) -> dict[str, Any]:
        """Returns the constructor arguments of an equal sampler."""
        return dict(
            model=self._source_model,
            schedule=self.schedule,
            shape=self.shape,
            prediction=self.prediction,
            variance=self.variance,
            clip=self.clip,
            num_classes=self.num_classes,
            device=self.device,
            engine=self._engine_name,
            dtype=self.precision,
            calibration=self._calibration,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.arguments()  # the engine is rebuilt: it has threads, machine code or graphs

    def __setstate__(self, state: dict[str, Any]) -> None:
        BatchSampler.__init__(self, **state)

    def __repr__(self) -> str:
        model = type(self._source_model).__name__
        if isinstance(self._source_model, nn.Module):
            model += f" of {sum(p.numel() for p in self._source_model.parameters()):,} parameters"
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return (
            f"{type(self).__name__}({model}, shape {self.shape}{classes}, "
            f"{len(self.schedule)} timesteps, {self.prediction}, {self.variance}, "
            f"clip {self.clip}, {self.precision} on {self.device}, engine {self.engine.name!r})"
        )

    def _choose_engine(self) -> None:
        fork.check()
        request = EngineRequest(
            self._source_model,
            self.shape,
            self.precision,
            self.device,
            len(self.schedule),
            self._calibration,
        )
        with default_numerics(torch.device("cpu")):
            self.engine: Engine = choose(self._engine_name, request)
        eager = self.engine if isinstance(self.engine, EagerEngine) else None
        self.model = eager.model if eager is not None else self._source_model
        self.dtype = eager.dtype if eager is not None else torch.float32
        self._weights = self._fingerprint()

    def _fingerprint(self) -> bytes:
        """Fingerprint of the weights if the engine computes with a copy of them; else empty."""
        shared = isinstance(self.engine, EagerEngine) and self.model is self._source_model
        if shared or not isinstance(self._source_model, nn.Module):
            return b""
        return weights_fingerprint(self._source_model)

    def table(
        self,
        params: SamplingParams | None = None,
        *,
        start: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> StepTable:
        """Returns the step table of `params` or of the same fields as keywords.

        Args:
            params: Sampling parameters.
            start: First timestep; the table then has the timesteps from there to the end.
            **options: Fields of `SamplingParams`, instead of `params`.
        """
        p = as_params(params, options, "Sampler.table")
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
        self,
        image: Tensor,
        seed: int,
        labels: Tensor | None = None,
        x: Tensor | None = None,
        given_noise: bool = False,
    ) -> SamplingState:
        """Returns the state before the first step; release it (`with sampler.begin(...) as state`).

        Args:
            image: Image indices, int64 [B].
            seed: The seed's 64 bits as int64.
            labels: Classes, int64 [B]; default: random classes.
            x: State [B, C, H, W]; default: x_T.
            given_noise: Give the state a buffer z, which `steps` fills by its argument `draw`.
        """
        (c, h, w), classes = self.shape, self.num_classes
        with default_numerics(self.device):
            state = self.engine.new_state(
                len(image), self.shape, self.device, classes is not None, given_noise
            )
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
        """Computes all steps of the table, in place."""
        for _ in self.steps(state, table, callback):
            pass

    def steps(
        self,
        state: SamplingState,
        table: StepTable,
        callback: Callback | None = None,
        stop: Callable[[], bool] | None = None,
        draw: Callable[[int, Tensor], object] | None = None,
    ) -> Iterator[int]:
        """Yields the number of steps completed so far; ends early if `stop()` returns True.

        Args:
            state: From `begin`.
            table: The step table.
            callback: Called after every step.
            stop: Called between steps.
            draw: Called before each step as draw(step, z), for a state with given noise; it fills
                z [B, C, H, W] fp32 in place.
        """
        every_step = callback is not None or draw is not None
        advance = self.engine.steps(state, table, every_step)
        completed = 0
        with closing(isolated(advance, self.device)) as steps:
            while True:
                if draw is not None and state.z is not None and completed < len(table):
                    draw(completed, state.z)
                completed = next(steps, -1)
                if completed < 0:
                    return
                if callback is not None:
                    callback(completed - 1, int(table.t[completed - 1]), state.x)
                yield completed
                if stop is not None and completed < len(table) and stop():
                    return

    def refresh(self) -> None:
        """Rebuilds the engine if the model's weights have changed since they were copied.

        Raises:
            RuntimeError: This process was forked from one that has sampled.
        """
        fork.check()
        if self._fingerprint() != self._weights:
            self.engine.free()
            self._choose_engine()

    def check_start(self, start: tuple[Tensor, int], count: int) -> tuple[Tensor, int]:
        """Returns (x_t, t) for `count` images. ValueError for a wrong shape or timestep."""
        return check_start(start, (count, *self.shape), len(self.schedule))


def _precision(
    model: Callable[..., Tensor], parameter: Tensor, dtype: str | torch.dtype | None
) -> str:
    """Key in `DTYPES` of the dtype that a network computes in. ValueError if its weights differ."""
    weights = parameter.dtype
    if weights == torch.float64 and isinstance(model, UNet):
        weights = torch.float32  # a fp64 UNet, for comparisons, converts x_t itself
    if weights not in {kind.activations for kind in DTYPES.values()}:
        raise ValueError(
            f"the model has weights of {weights}; expected float32, float16 or bfloat16: "
            "convert it, for example with model.float()"
        )
    precision = dtype_name(weights if dtype is None else dtype)
    if DTYPES[precision].activations != weights and not isinstance(model, UNet):
        raise ValueError(
            f"dtype is {precision} and the model has weights of {weights}; expected the same, "
            "because only a UNet is cast: cast the model"
        )
    return precision
