"""Sampler: the reverse process (Ho et al. 2020, algorithm 2) for any solver and any network.

The noise of an image is counted by (seed, image index, step, element), so an image does not depend
on the batch size or on its position in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, load_pretrained
from ..diffusion.prediction import check_prediction
from ..diffusion.presets import preset_of
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import LEARNED, VARIANCES, StepTable
from ..diffusion.timesteps import Steps
from ..engines.base import DTYPES, Engine, SamplingState, dtype_name
from ..engines.eager import EagerEngine
from ..engines.fused.calibration import Calibration, load_calibration
from ..engines.select import EngineRequest, choose
from ..kernels import noise
from ..models.fingerprint import weights_fingerprint
from ..models.unet import UNet, channels_last
from ..utils.validation import integer, seed_bits
from . import img2img
from .callbacks import Callback
from .request import (
    Indices,
    Labels,
    SamplingOptions,
    SamplingParams,
    StreamOptions,
    as_params,
    check_indices,
    check_start,
    check_timestep,
    indices_tensor,
    random_labels,
)
from .stream import BatchStream

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Sampler:
    """Draws images from a network and a noise schedule.

    Args:
        model: callable (x_t [B, C, H, W], t int64 [B]) -> [B, C, H, W], or [B, 2C, H, W] if it
            predicts its variance; with classes (x_t, t, labels int64 [B]). A module runs in eval mode.
        schedule: the `NoiseSchedule` the network was trained with.
        shape: (C, H, W) of an image.
        prediction: what the model predicts: "eps", "x_0" or "v".
        variance: of the solver "ddpm": "fixed_small", "fixed_large", "learned" or "learned_range".
        clip: bound on the predicted |x_0| at every step; None: no clipping.
        num_classes: of a class-conditional callable; a `UNet` has its own.
        device: default: the device of the model's parameters, or the CPU.
        engine: what computes the steps; `sampler.engine.reason` reports why "auto" chose an engine.
            "fused": Triton kernels in a CUDA graph, for a `UNet`, verified before use;
            "cpu": the CPU engine, for a `UNet` in fp32;
            "compile": torch.compile of the model;
            "reference": the model as it is.
        dtype: "fp32", "fp16", "bf16", or "fp8" with the fused engine; default: that of the weights.
            Engine "reference" casts the input of a module with fp16 or bf16 weights and computes
            without TF32 for fp32 weights. The state x_t is always fp32.
        calibration: of fp8 layers (`ddpm-fast calibrate`); None: ranges by rule.

    Raises:
        ValueError: an argument is out of range, or the engine cannot run this model.
    """

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
        request = EngineRequest(self._given, self.shape, self.precision, self.device, len(self.schedule), self._calibration)
        self.engine: Engine = choose(self._engine_name, request)
        plain = self.engine if isinstance(self.engine, EagerEngine) else None
        self.model = plain.model if plain is not None else self._given
        self.dtype = plain.dtype if plain is not None else torch.float32
        self._weights = self._fingerprint()

    def _fingerprint(self) -> bytes:
        """Of the model's weights, if the engine computes with a copy of them; otherwise empty."""
        uncopied = isinstance(self.engine, EagerEngine) and self.model is self._given
        return b"" if uncopied or not isinstance(self._given, nn.Module) else weights_fingerprint(self._given)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        variance: str | None = None,
        engine: str = "auto",
    ) -> Sampler:
        """Sampler of a checkpoint in a diffusers folder; see `from_checkpoint`.

        dtype "fp8" uses the folder's calibration, if there is one.
        """
        checkpoint = load_pretrained(directory)
        calibration = load_calibration(directory, checkpoint.unet) if dtype == "fp8" else None
        return cls.from_checkpoint(checkpoint, device, dtype, size, variance, engine, calibration)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        variance: str | None = None,
        engine: str = "auto",
        calibration: Calibration | None = None,
    ) -> Sampler:
        """Sampler of a loaded checkpoint. Its network is moved to the device, not copied.

        Args:
            checkpoint: from `load_pretrained`.
            device: default: the GPU if there is one.
            dtype: default: "fp32".
            size: (H, W); default: the size the network was trained at.
            variance: default: the checkpoint's.
            engine, calibration: see `Sampler`.
        """
        size = size or checkpoint.unet.config.size
        if size is None:
            raise ValueError("the configuration has no sample_size; give size=(height, width)")
        unet = channels_last(checkpoint.unet.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        c, shape = checkpoint, (unet.config.in_channels, *size)
        model = (unet, c.schedule, shape, c.prediction, variance or c.variance, c.clip)
        return cls(*model, engine=engine, dtype=dtype or "fp32", calibration=calibration)

    # ---- whole images

    def sample(
        self,
        indices: Indices,
        params: SamplingParams | None = None,
        **options: Unpack[StreamOptions],
    ) -> Tensor:
        """Draws images: `sample(64, seed=0, solver="ddim", steps=50)`.

        Args:
            indices: a count (images 0 ... N-1), or a range or list of image indices.
            params: seed, solver, steps, spacing, eta and preset; or give these as keywords.
            labels: one class, or one per image; None with a class-conditional network: each image
                draws its class from its noise.
            output: "uint8" (default) or "float".
            batch_size: images per batch; default: 64.
            start: (x_t [N, C, H, W], t): start from partly noised images instead of noise.
            pad: pad the last batch, so that every batch has the same size.
            progress: show a progress bar.
            callback: called as callback(step, t, x) after every step; x is the state [B, C, H, W]
                and must not be modified.
            stop: polled between steps; once it returns True, only finished batches are returned.

        Returns:
            uint8 [N, H, W, C] on the CPU: round((x + 1) 127.5) of x clipped to [-1, 1], or as the
            preset rounds. With output="float" fp32 [N, C, H, W] on the device.

        Raises:
            ValueError: an argument is invalid.
            RuntimeError: an image contains NaN or Inf.
        """
        return BatchStream.of(self, indices, params, **options).collect()

    def stream(
        self,
        indices: Indices,
        params: SamplingParams | None = None,
        **options: Unpack[StreamOptions],
    ) -> Iterator[tuple[int, Tensor]]:
        """Draws images batch by batch, for runs that do not fit in memory. Arguments as in `sample`.

        Yields (index of the first image, images) per batch. On a GPU a batch is copied to the host
        while the next one is drawn. If a batch does not fit in memory, smaller ones follow.
        """
        # invalid arguments raise at the call, not at the first image
        return iter(BatchStream.of(self, indices, params, **options))

    # ---- one batch

    def table(
        self, params: SamplingParams | None = None, *, start: int | None = None, **options: Unpack[SamplingOptions]
    ) -> StepTable:
        """The step table of the parameters, or of the same keywords; `start` replaces the first t."""
        p = as_params(params, options)
        preset = preset_of(p.preset)
        t = preset.timesteps(len(self.schedule), p.solver, p.steps, p.spacing)
        if start is not None:
            t = np.concatenate([[check_timestep(start, len(self.schedule))], t[t < start]])
        return preset.table(self.schedule, p.solver, t, self.prediction, self.variance, self.clip, p.eta)

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, image: Tensor, seed: int, labels: Tensor | None = None, x: Tensor | None = None) -> SamplingState:
        """The state before the first step, from `x` or x_T, with `labels` or random classes."""
        c, h, w = self.shape
        image = image.to(self.device)
        seeds = torch.full_like(image, seed)
        row = torch.zeros(len(image), dtype=torch.int32, device=self.device)
        if self.num_classes is not None and labels is None:
            labels = random_labels(seeds, image, self.num_classes)
        if x is None:
            x = noise.noise(seeds, image, row, noise.X_T, c, h, w)
        else:
            x = x.to(self.device, torch.float32, copy=True).contiguous(memory_format=torch.channels_last)
        return SamplingState(x, row, seeds, image, None if labels is None else labels.to(self.device))

    def run(self, state: SamplingState, table: StepTable, callback: Callback | None = None) -> None:
        """Advances the state through the whole table, in place."""
        self.refresh()
        self.engine.prepare(len(state.x))
        for _ in self.steps(state, table, callback):
            pass

    def steps(
        self, state: SamplingState, table: StepTable, callback: Callback | None = None, stop: Callable[[], bool] | None = None
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

    # ---- images to start from

    def labels(self, indices: Indices, seed: int = 0) -> Tensor:
        """The classes int64 [N] that images draw from their noise if no labels are given."""
        if self.num_classes is None:
            raise ValueError("the network is unconditional: its images have no labels")
        image = indices_tensor(check_indices(indices)).to(self.device)
        return random_labels(torch.full_like(image, seed_bits(seed)), image, self.num_classes)

    def check_start(self, start: tuple[Tensor, int], count: int) -> tuple[Tensor, int]:
        """Validates (x_t, t) for `count` images. ValueError for a wrong shape or timestep."""
        return check_start(start, (count, *self.shape), len(self.schedule))

    def diffuse(self, x_0: Tensor, t: int, indices: Indices | None = None, seed: int = 0) -> Tensor:
        """x_t of images x_0, for variations of given images: see `img2img.diffuse`."""
        return img2img.diffuse(self, x_0, t, indices, seed)

    def invert(
        self, x_0: Tensor, steps: Steps = 50, labels: Labels = None, spacing: str = "linspace", batch_size: int = 64
    ) -> tuple[Tensor, int]:
        """(x_t, t) from which DDIM leads back to images x_0: see `img2img.invert`."""
        return img2img.invert(self, x_0, steps, labels, spacing, batch_size)
