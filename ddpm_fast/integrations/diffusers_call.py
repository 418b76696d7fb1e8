"""Arguments of accelerated pipelines: those of diffusers and the additional ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sampling.request import check_indices
from ..utils.validation import integer

EXTRAS = dict(
    class_labels=None,
    seed=None,
    images=None,
    callback_on_step_end=None,
    callback_on_step_end_tensor_inputs=("latents",),
)


@dataclass
class Call:
    """Arguments of a call of an accelerated pipeline."""

    batch_size: int
    generator: Any
    steps: int
    eta: float
    use_clipped_model_output: bool
    output_type: str
    return_dict: bool
    class_labels: Any
    seed: int | None
    images: Any
    callback: Callable[..., Any] | None


def parsed(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Arguments of `kind.__call__`, checked.

    Raises:
        ValueError: Arguments contradict each other.
        TypeError: An argument is unknown or missing.
    """
    bound = inspect.signature(kind.__call__).bind(None, *args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    batch_size = a["batch_size"]
    if a["images"] is not None:
        indices = check_indices(a["images"])
        given = "batch_size" in kwargs or args
        if a["seed"] is None:
            raise ValueError("images was given without seed; give seed, or leave images out")
        if given and batch_size != len(indices):
            raise ValueError(
                f"batch_size is {batch_size} and images has {len(indices)} indices; "
                "expected as many"
            )
        batch_size = len(indices)
    batch_size = integer("batch_size", batch_size)
    if a["seed"] is not None and a["generator"] is not None:
        raise ValueError("seed and generator were both given; give one of them")
    generator = a["generator"]
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)} generators and batch_size is "
            f"{batch_size}; expected as many"
        )
    if extra := set(a["callback_on_step_end_tensor_inputs"]) - {"latents"}:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {', '.join(sorted(extra))}; "
            "expected latents only"
        )
    return Call(
        batch_size,
        generator,
        a["num_inference_steps"],
        float(a.get("eta", 0.0)),
        bool(a.get("use_clipped_model_output")),
        a["output_type"],
        a["return_dict"],
        a["class_labels"],
        a["seed"],
        a["images"],
        a["callback_on_step_end"],
    )


def labels_of(call: Call, classes: int | None, device: torch.device) -> Tensor | None:
    """The classes int64 [B] of a call, or None for an unconditional network."""
    labels = call.class_labels
    if classes is None:
        if labels is not None:
            raise ValueError("class_labels was given for an unconditional network; leave it out")
        return None
    if labels is None:
        raise ValueError(
            f"class_labels is missing; expected one class or one per image in 0..{classes - 1}"
        )
    labels = torch.as_tensor(labels, device=device)
    if labels.is_floating_point() or labels.ndim > 1 or labels.dtype == torch.bool:
        raise ValueError(f"class_labels is {labels.dtype} {tuple(labels.shape)}; expected integers")
    if labels.ndim == 1 and len(labels) != call.batch_size:
        raise ValueError(
            f"class_labels has {len(labels)} classes; expected one, or {call.batch_size}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"class_labels has {int(labels.min())}..{int(labels.max())}; expected 0..{classes - 1}"
        )
    return labels.long().expand(call.batch_size)
