"""Sampler: draws images from a network and a noise schedule.

Noise is a function of (seed, image index, step, element), so an image does not depend on the batch
size or on its position in the batch.
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
        model: Callable (x_t [B, C, H, W], t int64 [B]) -> [B, C, H, W], or [B, 2C, H, W] if it
            predicts its variance. With classes: (x_t, t, labels int64 [B]). A module runs in eval
            mode.
        schedule: The `NoiseSchedule` the network was trained with.
        shape: (C, H, W) of an image.
        prediction: What the model predicts: "eps", "x_0" or "v".
        variance: Variance of solver "ddpm": "fixed_small", "fixed_large", "learned" or
            "learned_range".
        clip: Bound on the predicted |x_0| at every step; None: no clipping.
        num_classes: Number of classes of a class-conditional callable; ignored for a `UNet`.
        device: Default: the device of the model's parameters, or the CPU.
        engine: Implementation of the steps; `sampler.engine.reason` is why "auto" selected one.
            "fused": Triton kernels in a CUDA graph, for a `UNet`, verified before use;
            "cpu": the CPU engine, for a `UNet` in fp32;
            "compile": torch.compile of the model;
            "reference": the model as it is.
        dtype: "fp32", "fp16", "bf16", or "fp8" with the fused engine; PyTorch's name of the dtype
            or the torch dtype; default: the dtype of the weights. Engine "reference" casts the
            input of a module with fp16 or bf16 weights, and disables TF32 for fp32 weights. The
            state x_t is always fp32. `torch.autocast` and the default dtype have no effect.
        calibration: Ranges of fp8 layers (`ddpm-fast calibrate`); None: default ranges.

    Pickling and `copy.deepcopy` store the arguments and rebuild the engine. In a process that was
    forked from one that has sampled, methods raise RuntimeError: start processes with "spawn".

    Raises:
        ValueError: An argument is out of range, or the engine cannot run this model.
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
        """Loads a checkpoint from a diffusers folder; other arguments as in `from_checkpoint`.

        dtype "fp8" uses the folder's calibration if it exists.
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
        """Returns a sampler of a loaded checkpoint; moves its network to the device in place.

        Args:
            checkpoint: From `load_pretrained`.
            device: Default: the GPU if available, else the CPU.
            dtype: Default: "fp32".
            size: (H, W); default: the size the network was trained at.
            variance: Default: the checkpoint's.
            engine, calibration: See `Sampler`.
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
        """Moves the sampler to a device or another dtype, in place, and rebuilds its engine.

        Also moves the module. The weights of a `UNet` keep their dtype; another module is cast.

        Args:
            device: Default: unchanged. A torch dtype is used as `dtype`.
            dtype: Default: unchanged.

        Returns:
            The sampler itself.

        Raises:
            ValueError: The device or dtype is not available, or the engine does not support it. The
                sampler is then unchanged.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = self.device if device is None else check_device(device)
        precision = self.precision if dtype is None else dtype_name(dtype)
        arguments, model, previous = self.arguments(), self._source_model, self.device
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
            indices: A count (images 0 ... N-1), or a range or list of image indices.
            params: Seed, solver, steps, spacing, eta and preset; or give these as keywords.
            labels: One class, or one per image; None with a class-conditional network: a random
                class per image, which depends on the seed and the image index.
            output: "uint8" (default), "float" or "pil".
            batch_size: Images per batch; default: 64.
            start: (x_t [N, C, H, W], t): start from partly noised images instead of noise.
            pad: Pad the last batch, so that every batch has the same size.
            progress: Show a progress bar.
            callback: Called as callback(step, t, x) after every step. x is the state [B, C, H, W]:
                do not modify it, and clone it to store it, because the next step overwrites it.
            stop: Polled between steps; once it returns True, only finished batches are returned.

        Returns:
            uint8 [N, H, W, C] on the CPU: round((x + 1) 127.5) of x clipped to [-1, 1], or rounded
            as the preset defines. With output="float", fp32 [N, C, H, W] on the device; with
            output="pil", a list of the uint8 images as `PIL.Image.Image`.

        Raises:
            ValueError: An argument is invalid, or the images do not fit in memory.
            RuntimeError: An image contains NaN or Inf.
            TypeError: A keyword is unknown.
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
        """Draws images batch by batch, if they do not fit in memory. Arguments as in `sample`.

        On a GPU, a batch is copied to the host while the next one is computed. If a batch does not
        fit in memory, the batch size is halved. To resume a run that was stopped after n images,
        call it with the indices range(n, N).

        Yields:
            A `Batch` per batch: the pair (index of the first image, images), with the indices of
            all its images as `batch.indices`.
        """
        # invalid arguments raise at the call, not at the first image
        return iter(
            BatchStream.of(self, "Sampler.stream", indices, params, output=output, **options)
        )

    # ---- labels and start images

    def labels(self, indices: Indices, seed: int = 0) -> Tensor:
        """Returns the random classes of images that are drawn without labels: int64 [N]."""
        if self.num_classes is None:
            raise ValueError("the network is unconditional: its images have no labels")
        image = indices_tensor(check_indices(indices)).to(self.device)
        return random_labels(torch.full_like(image, seed_bits(seed)), image, self.num_classes)

    def diffuse(self, x_0: Tensor, t: int, indices: Indices | None = None, seed: int = 0) -> Tensor:
        """Samples x_t of images x_0 by the forward process: see `img2img.diffuse`."""
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
        """Returns (x_t, t) from which DDIM reconstructs images x_0: see `img2img.invert`."""
        return img2img.invert(self, x_0, steps, labels, spacing, batch_size, progress)
