"""Unknown keywords of sampling methods: an error that names the method and the likely keyword."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

DIFFUSERS = {
    "num_inference_steps": "use steps=",
    "num_steps": "use steps=",
    "timesteps": "use steps=, with the timesteps in decreasing order",
    "generator": "use seed=, an integer: noise is a function of (seed, image index)",
    "seeds": "use seed=, one per call; images of one seed differ by their indices",
    "guidance_scale": "classifier-free guidance is not supported; leave it out",
    "negative_prompt": "classifier-free guidance is not supported; leave it out",
    "prompt": "text conditioning is not supported; use labels= with a class-conditional network",
    "class_labels": "use labels=",
    "scheduler": "use solver=, and preset= for the conventions of a scheduler",
    "num_images_per_prompt": "the first argument is the number of images, or their indices",
    "num_images": "the first argument is the number of images, or their indices",
    "images": "the first argument is the number of images, or their indices",
    "output_type": 'use output="uint8", "float" or "pil"',
    "return_dict": "images are returned directly; leave it out",
    "latents": "use start=(x_t, t)",
    "image": "use start=(sampler.diffuse(x_0, t), t)",
    "strength": "use start=(sampler.diffuse(x_0, t), t)",
    "callback_on_step_end": "use callback=, called as callback(step, t, x)",
    "callback_steps": "use callback=Trajectory(every=...)",
    "use_clipped_model_output": 'use preset="diffusers" or "exact"',
    "progress_bar": "use progress=True",
    "device": "use Sampler.to(device)",
    "dtype": "use Sampler.to(dtype=...)",
    "torch_dtype": "use Sampler.to(dtype=...)",
}


def check_keywords(method: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Validates the names of keywords.

    Args:
        method: Name of the method that was called.
        names: Keywords of the call.
        known: Keywords that the method takes.

    Raises:
        TypeError: A keyword is unknown. The message suggests a replacement.
    """
    known = list(known)
    for name in names:
        if name in known:
            continue
        nearest = difflib.get_close_matches(name, known, 1)
        hint = DIFFUSERS.get(name) or (
            f"did you mean {nearest[0]}?" if nearest else f"expected some of {', '.join(known)}"
        )
        raise TypeError(f"{method}() got an unknown keyword {name!r}: {hint}")
