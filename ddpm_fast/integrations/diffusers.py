"""Acceleration of diffusers' DDPMPipeline, DDIMPipeline and UNet2DModel in one line."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from ..utils.validation import shown
from .diffusers_networks import is_diffusers_unet
from .diffusers_pipeline import Accelerator, accelerated_class
from .diffusers_tables import UnsupportedError
from .diffusers_unet import accelerated_unet

OTHERWISE = ("error", "diffusers")
_ACCELERATOR = "_ddpm_fast_accelerator"


def accelerate(pipe: Any, engine: str = "auto", dtype: Any = None, otherwise: str = "error") -> Any:
    """Accelerated copy of a diffusers pipeline or network.

    The copy shares all components with the original, which does not change. It belongs to a
    subclass with the original's name, module and signature, and `save_pretrained` writes the same
    files. Noise comes from the caller's generators, or from torch's global one, in the order in
    which diffusers draws it. Further keyword arguments of the accelerated pipeline:

        class_labels: One class or one per image, for a class-conditional network.
        seed: Draw Philox noise, as `Sampler.sample` does: an image depends on its seed and index
            only. The whole loop then runs on the device.
        images: The image indices for `seed`; default: range(batch_size).
        callback_on_step_end: Called as callback(pipe, step, t, {"latents": x}) after every step;
            may return {"latents": x} to replace the state.

    Args:
        pipe: A DDPMPipeline, a DDIMPipeline or a UNet2DModel.
        engine: See `Sampler`.
        dtype: Of the network's computation, see `Sampler`; default: that of the network.
        otherwise: What to do with a scheduler, network or call that cannot be accelerated: "error"
            raises ValueError, "diffusers" warns once and runs the code of diffusers.

    Returns:
        The accelerated copy. Its attribute `report` is a dict of engine, reason, noise and dtype.

    Raises:
        ValueError: The object is of another class, or cannot be accelerated.
    """
    if otherwise not in OTHERWISE:
        raise ValueError(f"otherwise is {shown(otherwise)}; expected one of {', '.join(OTHERWISE)}")
    _check_diffusers()
    from diffusers import DDIMPipeline, DDPMPipeline

    original = restore(pipe)
    if is_diffusers_unet(original):
        return _or_original(lambda: accelerated_unet(original, engine, dtype), original, otherwise)
    kind = next((k for k in (DDPMPipeline, DDIMPipeline) if isinstance(original, k)), None)
    if kind is None:
        raise ValueError(
            f"pipe is a {type(original).__name__}; expected a DDPMPipeline, DDIMPipeline or UNet2DModel"
        )
    if type(original).__call__ is not kind.__call__:
        raise ValueError(
            f"{type(original).__name__} overrides the sampling loop of {kind.__name__}; "
            "accelerate its network instead: accelerate(pipe.unet)"
        )
    accelerator = Accelerator(original, kind, engine, dtype, otherwise, accelerate)
    fast = copy.copy(original)
    object.__setattr__(fast, "__class__", accelerated_class(type(original)))
    vars(fast)[_ACCELERATOR] = accelerator
    accelerator.start(fast)
    return fast


def restore(fast: Any) -> Any:
    """The original of an accelerated pipeline or network; releases the engine.

    Args:
        fast: From `accelerate`. Any other object is returned as it is.
    """
    accelerator = getattr(fast, "__dict__", {}).get(_ACCELERATOR)
    if accelerator is None:
        return fast
    accelerator.free()
    return accelerator.original


def _or_original(make: Any, original: Any, otherwise: str) -> Any:
    try:
        return make()
    except UnsupportedError as error:
        if otherwise == "error":
            raise
        warnings.warn(f"not accelerated: {error}", stacklevel=3)
        return original


def _check_diffusers() -> None:
    try:
        import diffusers
    except ImportError:
        raise ValueError("diffusers is not installed: pip install 'ddpm-fast[diffusers]'") from None
    version = tuple(int(n) for n in diffusers.__version__.split(".")[:2] if n.isdigit())
    if version < (0, 41):
        raise ValueError(
            f"diffusers is {diffusers.__version__}; expected 0.41 or newer: "
            "pip install -U 'ddpm-fast[diffusers]'"
        )
