"""The sampling loop (Ho et al. 2020, algorithm 2), for any solver that is a table and any network that is a function.

Image i of seed s has noise of its own, counted by (seed, image, step, element). So it does not matter in which batch it is
drawn, at which place, or beside which others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import load_pretrained
from ..data.pixels import Images, Labels, check_images, check_labels, image_indices, seed_bits
from ..diffusion.prediction import check_prediction
from ..diffusion.presets import preset_of
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import LEARNED, VARIANCES, StepTable, ddim_inversion_table
from ..diffusion.timesteps import Steps, choose_timesteps
from ..engines.base import DTYPES, Engine, SamplingState, dtype_name
from ..engines.eager import EagerEngine
from ..engines.fused.calibration import Calibration, load_calibration
from ..engines.select import EngineRequest, choose
from ..kernels import noise
from ..kernels.q_sample import q_sample
from ..models.unet import UNet, channels_last
from ..utils.validation import integer
from .callbacks import Callback, bar_of, of_first
from .output import Outbox, arrived

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What `sample` and `stream` take besides: see `Sampler.sample`."""

    spacing: str | None
    eta: float
    preset: str
    start: tuple[Tensor, int] | None
    pad: bool
    progress: bool
    callback: Callback | None
    stop: Callable[[], bool] | None


class Sampler:
    """Draws images from a network and a schedule.

    model       any callable (x_t [B, C, H, W], t int64 [B]) -> [B, C, H, W], or [B, 2C, H, W] if it predicts its variance;
                with classes (x_t, t, labels int64 [B])
    schedule    the `NoiseSchedule` it was trained with
    shape       (C, H, W)
    prediction  what the model predicts: "eps", "x_0" or "v"
    variance    of the "ddpm" solver: "fixed_small", "fixed_large", "learned" or "learned_range"
    clip        bound on the predicted |x_0| at every step, None for none
    num_classes for a class-conditional callable; read from the model where it is a `UNet`
    device      default: where the model's parameters are, or the CPU
    engine      what computes the steps; `sampler.engine.reason` says why "auto" took which
                "fused"      our own kernels in a CUDA graph, for a `UNet` (`FusedUNet`); self-checked first
                "cpu"        the fastest exact way on a CPU, for a `UNet` in fp32 (`CPUEngine`)
                "compile"    torch.compile of the model
                "reference"  the model as it is
    dtype       "fp32", "fp16", "bf16", or "fp8" with the fused engine; default: the weights'
    calibration of fp8 layers (`ddpm-fast calibrate`); None: units by rule

    A module runs in eval mode. Engine "reference" gives a module with fp16 or bf16 weights its input in that type; one with fp32
    weights computes in fp32 (TF32 is switched off around it). The state x_t is always fp32.
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
        if variance in LEARNED and isinstance(model, UNet) and model.config.out_channels != 2 * shape[0]:
            raise ValueError(
                f"variance {variance!r} needs a network that gives {2 * shape[0]} channels, mean and variance; "
                f"this one gives {model.config.out_channels}: take a fixed variance"
            )
        c, h, w = shape
        self.schedule, self.shape = schedule, (c, h, w)
        self.prediction, self.variance, self.clip = prediction, variance, clip
        self.num_classes = model.config.num_classes if isinstance(model, UNet) else num_classes
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None) if isinstance(model, nn.Module) else None
        self.device = torch.device(device if device is not None else parameter.device if parameter is not None else "cpu")
        own = parameter.dtype if parameter is not None and parameter.dtype.itemsize == 2 else torch.float32
        self.precision = dtype_name(own if dtype is None else dtype)
        if DTYPES[self.precision].activations != own and not isinstance(model, UNet):
            raise ValueError(f"dtype {self.precision} with a model of {own}: only a UNet is cast; cast the model yourself")
        self._engine_name, self._given, self._calibration = engine, model, calibration
        self._choose()

    def _choose(self) -> None:
        request = EngineRequest(self._given, self.shape, self.precision, self.device, len(self.schedule), self._calibration)
        self.engine: Engine = choose(self._engine_name, request)
        plain = self.engine if isinstance(self.engine, EagerEngine) else None
        self.model = plain.model if plain is not None else self._given
        self.dtype = plain.dtype if plain is not None else torch.float32
        self._weights = _fingerprint(self._given) if self._copied else b""

    @property
    def _copied(self) -> bool:
        """Does the engine compute with weights of its own?"""
        return isinstance(self._given, nn.Module) and not (isinstance(self.engine, EagerEngine) and self.model is self._given)

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
        """From a diffusers folder. By default on the GPU if there is one, in fp32, for the size (H, W) it was trained at, and with
        the variance that the folder names; in fp8 with its calibration, if it has one.
        """
        checkpoint = load_pretrained(directory)
        size = size or checkpoint.unet.config.size
        if size is None:
            raise ValueError(f"{directory} names no sample_size; give size=(height, width)")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        unet = channels_last(checkpoint.unet.to(device))
        shape, variance = (unet.config.in_channels, *size), variance or checkpoint.variance
        prediction, clip, dtype = checkpoint.prediction, checkpoint.clip, dtype or "fp32"
        calibration = load_calibration(directory, unet) if dtype == "fp8" else None
        how = (checkpoint.schedule, shape, prediction, variance, clip)
        return cls(unet, *how, engine=engine, dtype=dtype, calibration=calibration)

    # ---- whole images

    def sample(
        self,
        images: Images,
        seed: int = 0,
        solver: str = "ddpm",
        steps: Steps = None,
        labels: Labels = None,
        output: str = "uint8",
        batch_size: int = 64,
        **options: Unpack[Options],
    ) -> Tensor:
        """Images of seed `seed`: uint8 [N, H, W, C] on the CPU, or with output="float" fp32 [N, C, H, W] on the device.

        images      how many (0 ... N-1), or a range or list of image indices
        seed        0 ... 2^64-1
        solver      "ddpm", "ddim", "dpm++2m" or "dpm++2m-sde"; eta (DDIM): 0 deterministic ... 1
        steps       how many, the timesteps themselves, sections such as "10,20,30"; None: all for "ddpm", 50 for "ddim", else 20
        spacing     "linspace", "leading", "trailing", "quadratic" or "openai"; None: the preset's ("linspace")
        preset     "exact", or as another codebase computes it: "ho", "openai", "diffusers", "ddim" (`preset.PRESETS`)
        labels      one class, or one per image; None with a class-conditional network: each image draws its own from its noise
        start       (x_t [N, C, H, W], t): go on from partly noised images instead of from noise
        batch_size  how many are drawn at once; pad: fill the last batch up, so that every batch has one size
        progress    show a bar
        callback    called as callback(step, t, x) after every step; x is the state [B, C, H, W], not to be changed
        stop        asked between steps; once it says yes, the images that are finished are the last to come

        uint8 is round((x + 1) 127.5) of x clipped to [-1, 1], or as the preset rounds. ValueError for bad arguments,
        RuntimeError when an image comes out with values that are not finite.
        """
        stream = self.stream(images, batch_size, seed=seed, solver=solver, steps=steps, labels=labels, output=output, **options)
        batches = [x for _, x in stream]
        if not batches:
            c, h, w = self.shape
            return torch.empty(0, h, w, c, dtype=torch.uint8) if output == "uint8" else torch.empty(0, c, h, w, device=self.device)
        return torch.cat(batches)

    def stream(
        self,
        images: Images,
        batch_size: int = 64,
        *,
        seed: int = 0,
        solver: str = "ddpm",
        steps: Steps = None,
        labels: Labels = None,
        output: str = "uint8",
        spacing: str | None = None,
        eta: float = 0.0,
        preset: str = "exact",
        start: tuple[Tensor, int] | None = None,
        pad: bool = False,
        progress: bool = False,
        callback: Callback | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (index of the first image, images) batch by batch, for runs that should not be held in memory. See `sample`.

        On a GPU a batch is handed over while the next one is being drawn. Where memory does not suffice for a batch, smaller ones
        are drawn from there on: the images are the same.
        """
        indices = check_images(images)
        if integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size}; expected at least 1")
        if output not in ("uint8", "float"):
            raise ValueError(f'output {output!r}; expected "uint8" or "float"')
        x_start, t_start = (None, None) if start is None else self._check_start(start, len(indices))
        table = self.table(solver, steps, spacing=spacing, eta=eta, preset=preset, start=t_start)
        wanted = check_labels(labels, len(indices), self.num_classes)
        bits = seed_bits(seed)

        def batches() -> Iterator[tuple[int, Tensor]]:
            self._refresh()
            first, size = 0, batch_size if pad else min(batch_size, len(indices))
            sent: list[Outbox] = []
            with bar_of(progress, len(table) * len(indices)) as bar:
                while first < len(indices) and not (stop is not None and stop()):
                    place = torch.arange(first, min(first + size, len(indices)), device="cpu")
                    image, count = image_indices(indices[first : first + size]), len(place)
                    if pad:
                        place, image = (torch.cat([v, v[-1:].expand(size - count)]) for v in (place, image))
                    tight = False
                    try:
                        self.engine.prepare(size)
                        state = self.begin(image, bits, _at(wanted, place), _at(x_start, place))
                        done = 0
                        for completed in self._steps(state, table, of_first(count, callback), stop):
                            bar.update(count * (completed - done))
                            done = completed
                            yield from arrived(sent)
                    except torch.OutOfMemoryError:
                        if size == 1:
                            raise
                        tight = True
                    if tight:  # by now the error holds nothing any more
                        size = self._smaller(size)
                        continue
                    if done < len(table):
                        break  # told to stop
                    sent.append(Outbox.send(state.x[:count], image[:count], output, preset, self.precision))
                    yield from arrived(sent)
                    first += count
            yield from arrived(sent, wait=True)

        return batches()  # so that bad arguments are refused here, not at the first image

    # ---- one batch

    def table(
        self,
        solver: str = "ddpm",
        steps: Steps = None,
        *,
        spacing: str | None = None,
        eta: float = 0.0,
        preset: str = "exact",
        start: int | None = None,
    ) -> StepTable:
        """The step table of a solver; from timestep `start` down where the images are noised only so far."""
        rules = preset_of(preset)
        t = rules.timesteps(len(self.schedule), solver, steps, spacing)
        if start is not None:
            t = np.concatenate([[self._check_t(start)], t[t < start]])
        return rules.table(self.schedule, solver, t, self.prediction, self.variance, self.clip, eta)

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, image: Tensor, seed: int, labels: Tensor | None = None, x: Tensor | None = None) -> SamplingState:
        """The state before the first step: x, or x_T drawn from the images' own noise; labels, or each image's own."""
        c, h, w = self.shape
        image = image.to(self.device)
        seeds = torch.full_like(image, seed)
        row = torch.zeros(len(image), dtype=torch.int32, device=self.device)
        if self.num_classes is not None and labels is None:
            labels = self._own_labels(seeds, image)
        if x is None:
            x = noise.noise(seeds, image, row, noise.X_T, c, h, w)
        else:
            x = x.to(self.device, torch.float32, copy=True).contiguous(memory_format=torch.channels_last)
        return SamplingState(x, row, seeds, image, None if labels is None else labels.to(self.device))

    def run(self, state: SamplingState, table: StepTable, callback: Callback | None = None) -> None:
        """Takes the state through the whole table, in place."""
        self._refresh()
        self.engine.prepare(len(state.x))
        for _ in self._steps(state, table, callback):
            pass

    def _steps(
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

    def _refresh(self) -> None:
        """Chooses the engine anew where it computes with weights that are no longer the model's: it was trained on meanwhile."""
        if self._copied and _fingerprint(self._given) != self._weights:
            self.engine.free()
            self._choose()

    def _smaller(self, size: int) -> int:
        """Half the batch, after memory ran out."""
        self.engine.free()
        warnings.warn(f"out of memory with {size} images at once; going on with {size // 2}", stacklevel=3)
        return size // 2

    def labels(self, images: Images, seed: int = 0) -> Tensor:
        """The classes int64 [N] that images draw for themselves where none is asked for. ValueError without classes."""
        if self.num_classes is None:
            raise ValueError("the network is unconditional: its images have no labels")
        image = image_indices(check_images(images)).to(self.device)
        return self._own_labels(torch.full_like(image, seed_bits(seed)), image)

    def _own_labels(self, seeds: Tensor, image: Tensor) -> Tensor:
        word = noise.words(seeds, image, torch.zeros_like(image), noise.LABEL, 1)[:, 0]
        return (word * int(self.num_classes or 0)) >> 32  # equal shares of 2^32

    def diffuse(self, x_0: Tensor, t: int, images: Images | None = None, seed: int = 0) -> Tensor:
        """x_t of x_0 [N, C, H, W] in [-1, 1]: noised up to timestep t with the images' own noise (default: images 0 ... N-1).

        With `sample(..., start=(x_t, t))`, the way to vary given images (Meng et al. 2022).
        """
        image = image_indices(check_images(len(x_0) if images is None else images)).to(self.device)
        x_0, t = self._check_start((x_0, t), len(image))
        times = torch.full_like(image, t)
        coef = self.schedule.q_sample_table(self.device)
        return q_sample(x_0.to(self.device), coef, times, times, torch.full_like(image, seed_bits(seed)), image)

    def invert(
        self, x_0: Tensor, steps: Steps = 50, labels: Labels = None, spacing: str = "linspace", batch_size: int = 64
    ) -> tuple[Tensor, int]:
        """(x_t, t) from which DDIM with the same steps leads back to images x_0 [N, C, H, W] in [-1, 1], but for its error.

        To be given as `sample(..., solver="ddim", start=...)` (Song et al. 2021, section 4.3). The sampler must not clip on the
        way back (clip=None): what clipping did cannot be undone. labels: as in `sample`, needed with classes.
        """
        x_0, _ = self._check_start((x_0, 0), len(x_0))
        if self.num_classes is not None and labels is None:
            raise ValueError("the network has classes: say which the images are, labels=...")
        t = choose_timesteps(len(self.schedule), steps, spacing)
        table, wanted = ddim_inversion_table(self.schedule, t, self.prediction), check_labels(labels, len(x_0), self.num_classes)
        inverted = []
        for place in torch.arange(len(x_0)).split(batch_size):
            state = self.begin(place, 0, _at(wanted, place), _at(x_0, place))
            self.run(state, table)
            inverted.append(state.x)
        return torch.cat(inverted), int(t[0])

    # ---- borders

    def _check_start(self, start: tuple[Tensor, int], count: int) -> tuple[Tensor, int]:
        if not isinstance(start, tuple) or len(start) != 2 or not isinstance(start[0], Tensor):
            raise ValueError(f"start is {type(start).__name__}; expected (x_t tensor [N, C, H, W], timestep)")
        x, t = start
        if tuple(x.shape) != (count, *self.shape) or not x.is_floating_point():
            raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; expected floating {(count, *self.shape)}")
        return x, self._check_t(t)

    def _check_t(self, t: int) -> int:
        if not 0 <= integer("timestep", t) < len(self.schedule):
            raise ValueError(f"timestep = {t}; expected 0..{len(self.schedule) - 1}")
        return int(t)


def _at(per_image: Tensor | None, chosen: Tensor) -> Tensor | None:
    return None if per_image is None else per_image[chosen.to(per_image.device)]


@torch.no_grad()
def _fingerprint(model: Callable[..., Tensor]) -> bytes:
    """Changes when a weight does. By their bits, added up as integers: training may write where torch does not count it (`.data`,
    fused optimizers). Reads every weight once.
    """
    assert isinstance(model, nn.Module)
    sums = [_bits(p) for p in model.parameters()]
    return torch.stack(sums).cpu().numpy().tobytes() if sums else b""


def _bits(p: Tensor) -> Tensor:
    last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    flat = (p.permute(0, 2, 3, 1) if last else p).flatten()
    places = math.gcd(flat.nbytes, flat.storage_offset() * flat.itemsize)  # a parameter may be a view into a larger tensor
    whole = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if places % kind.itemsize == 0)
    return flat.view(whole).sum(dtype=torch.int64)
