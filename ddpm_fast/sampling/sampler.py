"""Sampler: images of a network and a noise schedule, by any solver.

The noise of an image is counted by (seed, image index, step, element), so an image does not depend
on the batch size or on its position in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, load_pretrained
from ..diffusion.timesteps import Steps
from ..engines.base import DTYPES, check_device, default_numerics, dtype_name
from ..engines.fused.calibration import Calibration, load_calibration
from ..models.unet import UNet, channels_last
from ..utils.validation import seed_bits
from . import img2img
from .batch_sampler import BatchSampler
from .output import Batch
from .request import (
    Indices,
    Labels,
    SamplingParams,
    StreamOptions,
    check_indices,
    indices_tensor,
    random_labels,
)
from .stream import BatchStream

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self, Unpack


class Sampler(BatchSampler):
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
        dtype: "fp32", "fp16", "bf16", or "fp8" with the fused engine, or PyTorch's name of the dtype,
            or the torch dtype; default: that of the weights. Engine "reference" casts the input of a
            module with fp16 or bf16 weights and computes without TF32 for fp32 weights. The state
            x_t is always fp32. `torch.autocast` and the default dtype of the caller have no effect.
        calibration: of fp8 layers (`ddpm-fast calibrate`); None: ranges by rule.

    Pickling and `copy.deepcopy` keep the arguments and rebuild the engine. After a fork, a process
    whose parent has computed raises RuntimeError: start processes with "spawn".

    Raises:
        ValueError: an argument is out of range, or the engine cannot run this model.
    """

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
        name = dtype_name(dtype or "fp32")
        with default_numerics(torch.device("cpu")):
            checkpoint = load_pretrained(directory)
            fp8 = name == "fp8"
            calibration = load_calibration(directory, checkpoint.unet) if fp8 else None
        return cls.from_checkpoint(checkpoint, device, name, size, variance, engine, calibration)

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
        default = "cuda" if torch.cuda.is_available() else "cpu"
        unet = channels_last(checkpoint.unet.to(check_device(device or default)))
        c, shape = checkpoint, (unet.config.in_channels, *size)
        model = (unet, c.schedule, shape, c.prediction, variance or c.variance, c.clip)
        return cls(*model, engine=engine, dtype=dtype or "fp32", calibration=calibration)

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Moves the sampler to a device, or to another dtype, in place; its engine is rebuilt.

        A module moves with it. A `UNet` keeps the dtype of its weights, another module is cast.

        Args:
            device: default: unchanged. A torch dtype is taken as `dtype`.
            dtype: default: unchanged.

        Returns:
            The sampler itself.

        Raises:
            ValueError: the device or dtype is not available, or the engine does not support it. The
                sampler is then unchanged.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = self.device if device is None else check_device(device)
        precision = self.precision if dtype is None else dtype_name(dtype)
        arguments, model, previous = self.arguments(), self._given, self.device
        casts = not isinstance(model, UNet) and precision != self.precision
        weights = None  # rounding cannot be undone
        if isinstance(model, nn.Module):
            weights = copy.deepcopy(model.state_dict()) if casts else None
            model.to(target)
            if casts:
                model.to(DTYPES[precision].activations)
        try:
            moved = type(self)(**{**arguments, "device": target, "dtype": precision})
        except Exception:
            if isinstance(model, nn.Module):
                model.to(previous)
            if isinstance(model, nn.Module) and weights is not None:
                model.to(DTYPES[self.precision].activations)
                model.load_state_dict(weights)
            raise
        self.engine.free()
        self.__dict__.update(moved.__dict__)
        return self

    # ---- whole images

    @overload
    def sample(  # type: ignore[overload-overlap]
        self,
        indices: Indices,
        params: SamplingParams | None = None,
        *,
        output: Literal["pil"],
        **options: Unpack[StreamOptions],
    ) -> list[Image]: ...

    @overload
    def sample(
        self,
        indices: Indices,
        params: SamplingParams | None = None,
        *,
        output: str = "uint8",
        **options: Unpack[StreamOptions],
    ) -> Tensor: ...

    def sample(
        self,
        indices: Indices,
        params: SamplingParams | None = None,
        *,
        output: str = "uint8",
        **options: Unpack[StreamOptions],
    ) -> Any:
        """Draws images: `sample(64, seed=0, solver="ddim", steps=50)`.

        Args:
            indices: a count (images 0 ... N-1), or a range or list of image indices.
            params: seed, solver, steps, spacing, eta and preset; or give these as keywords.
            labels: one class, or one per image; None with a class-conditional network: each image
                draws its class from its noise.
            output: "uint8" (default), "float" or "pil".
            batch_size: images per batch; default: 64.
            start: (x_t [N, C, H, W], t): start from partly noised images instead of noise.
            pad: pad the last batch, so that every batch has the same size.
            progress: show a progress bar.
            callback: called as callback(step, t, x) after every step; x is the state [B, C, H, W],
                must not be modified, and is overwritten by the next step: clone what you keep.
            stop: polled between steps; once it returns True, only finished batches are returned.

        Returns:
            uint8 [N, H, W, C] on the CPU: round((x + 1) 127.5) of x clipped to [-1, 1], or as the
            preset rounds. With output="float" fp32 [N, C, H, W] on the device; with output="pil" a
            list of the uint8 images as `PIL.Image.Image`.

        Raises:
            ValueError: an argument is invalid, or the images do not fit in memory.
            RuntimeError: an image contains NaN or Inf.
            TypeError: a keyword is unknown.
        """
        stream = BatchStream.of(self, "Sampler.sample", indices, params, output=output, **options)
        return stream.collect()

    def stream(
        self,
        indices: Indices,
        params: SamplingParams | None = None,
        *,
        output: str = "uint8",
        **options: Unpack[StreamOptions],
    ) -> Iterator[Batch]:
        """Draws images batch by batch, for runs that do not fit in memory. Arguments as in `sample`.

        Yields a `Batch` per batch: the pair (index of the first image, images), with the indices of
        all its images as `batch.indices`. On a GPU a batch is copied to the host while the next one
        is drawn. If a batch does not fit in memory, smaller ones follow. A run that was stopped
        after n images continues with the indices range(n, N).
        """
        # invalid arguments raise at the call, not at the first image
        return iter(
            BatchStream.of(self, "Sampler.stream", indices, params, output=output, **options)
        )

    # ---- images to start from

    def labels(self, indices: Indices, seed: int = 0) -> Tensor:
        """The classes int64 [N] that images draw from their noise if no labels are given."""
        if self.num_classes is None:
            raise ValueError("the network is unconditional: its images have no labels")
        image = indices_tensor(check_indices(indices)).to(self.device)
        return random_labels(torch.full_like(image, seed_bits(seed)), image, self.num_classes)

    def diffuse(self, x_0: Tensor, t: int, indices: Indices | None = None, seed: int = 0) -> Tensor:
        """x_t of images x_0, for variations of given images: see `img2img.diffuse`."""
        return img2img.diffuse(self, x_0, t, indices, seed)

    def invert(
        self,
        x_0: Tensor,
        steps: Steps = 50,
        labels: Labels = None,
        spacing: str = "linspace",
        batch_size: int = 64,
        progress: bool = False,
    ) -> tuple[Tensor, int]:
        """(x_t, t) from which DDIM leads back to images x_0: see `img2img.invert`."""
        return img2img.invert(self, x_0, steps, labels, spacing, batch_size, progress)
