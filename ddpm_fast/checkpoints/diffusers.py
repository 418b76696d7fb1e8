"""diffusers' folder layout, its weight names and its scheduler configuration.

model_index.json
unet/config.json, unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.schedule import NoiseSchedule
from ..models.config import UNetConfig
from ..models.unet import UNet

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
# The "_log" forms differ in how the likelihood code stores them, not in the samples.
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
_SCHEDULER_DEFAULTS: dict[str, Any] = dict(
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    variance_type="fixed_small",
    clip_sample=True,
    clip_sample_range=1.0,
    prediction_type="epsilon",
    thresholding=False,
    rescale_betas_zero_snr=False,
    timestep_values=None,
)
# Sampling options, which do not describe what was trained: chosen at each call instead.
_SCHEDULER_CHOICES = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "skip_prk_steps",
}


def read_unet(directory: Path) -> UNet:
    """The network in unet/, on the CPU in fp32, in eval mode."""
    unet = UNet(UNetConfig.from_diffusers(read_json(directory / "unet" / "config.json")))
    unet.load_state_dict(read_weights(directory / "unet", unet))
    return unet.eval()


def folder_files(
    unet: UNet, schedule: NoiseSchedule, prediction: str, variance: str, clip: float | None
) -> dict[str, bytes]:
    """The files of a checkpoint by relative path."""
    from safetensors.torch import save

    classes = dict(unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"])
    weights = {k: v.detach().cpu().contiguous() for k, v in unet.state_dict().items()}
    return {
        INDEX: _json(dict(_class_name="DDPMPipeline", **classes)),
        "unet/config.json": _json(unet.config.to_diffusers()),
        f"unet/{WEIGHTS}": save(weights, metadata={"format": "pt"}),
        SCHEDULER: _json(scheduler_config(schedule, prediction, variance, clip)),
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; expected a diffusers folder with unet/ and scheduler/"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def read_weights(folder: Path, unet: UNet) -> dict[str, torch.Tensor]:
    """The state dict of `unet` from its safetensors file, checked for names, shapes and finiteness."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        others = (
            ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix != ".json"))
            or "no weights"
        )
        raise ValueError(
            f"{path} is missing ({others} found); only one safetensors file is read, never a pickle"
        )
    try:
        weights = {_current_name(k): v for k, v in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    expected = unet.state_dict()
    if wrong := sorted(set(weights) ^ set(expected)):
        kind = "unexpected" if wrong[0] in weights else "missing"
        raise ValueError(
            f"{path}: {kind} parameter {wrong[0]} ({len(wrong)} names differ from the configuration's network)"
        )
    for name, value in weights.items():
        # attention layers of old checkpoints are 1x1 convolutions
        value = weights[name] = (
            value.reshape(expected[name].shape)
            if value.numel() == expected[name].numel()
            else value
        )
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}; expected {tuple(expected[name].shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} contains NaN or Inf")
    return weights


def _current_name(name: str) -> str:
    """diffusers' names before 2023 (the google/ddpm-* repositories): attention's query, key, value, proj_attn."""
    if ".attentions." in name:
        for old, new in (
            ("query", "to_q"),
            ("key", "to_k"),
            ("value", "to_v"),
            ("proj_attn", "to_out.0"),
        ):
            name = name.replace(f".{old}.", f".{new}.")
    return name


def read_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, str, float | None]:
    """(schedule, prediction, variance, clip) from diffusers' scheduler_config.json."""
    values = {
        k: v for k, v in config.items() if not k.startswith("_") and k not in _SCHEDULER_CHOICES
    }
    if unknown := sorted(set(values) - set(_SCHEDULER_DEFAULTS)):
        raise ValueError(f"unknown key {', '.join(unknown)} in scheduler_config.json")
    d = {**_SCHEDULER_DEFAULTS, **values}
    for key in ("thresholding", "timestep_values"):
        if d[key] not in (False, None):
            raise ValueError(f"scheduler_config.json: {key}={d[key]} is not supported")
    for key, known in (("prediction_type", PREDICTIONS), ("variance_type", VARIANCES)):
        if str(d[key]) not in known:
            raise ValueError(
                f"scheduler_config.json: {key}={d[key]!r} is not supported; supported: {', '.join(known)}"
            )
    for key in ("beta_start", "beta_end", "clip_sample_range"):
        if not isinstance(d[key], (int, float)) or not d[key] > 0:
            raise ValueError(f"scheduler_config.json: {key}={d[key]!r}; expected a positive number")
    clip = float(d["clip_sample_range"]) if d["clip_sample"] else None
    schedule = _read_schedule(d)
    if d["rescale_betas_zero_snr"]:
        schedule = schedule.zero_terminal_snr()
    return schedule, PREDICTIONS[d["prediction_type"]], VARIANCES[d["variance_type"]], clip


def schedule_of_diffusers(name: str, timesteps: int = 1000) -> NoiseSchedule:
    """The schedule of diffusers' DDPMScheduler(beta_schedule=name): linear, scaled_linear, squaredcos_cap_v2 or sigmoid."""
    return _read_schedule(
        {**_SCHEDULER_DEFAULTS, "beta_schedule": name, "num_train_timesteps": timesteps}
    )


def _read_schedule(d: Mapping[str, Any]) -> NoiseSchedule:
    start, end, count = d["beta_start"], d["beta_end"], d["num_train_timesteps"]
    if d["trained_betas"] is not None:
        betas = d["trained_betas"]
        if (
            not isinstance(betas, list)
            or len(betas) != count
            or not all(isinstance(b, float) for b in betas)
        ):
            raise ValueError(
                f"scheduler_config.json: trained_betas must be a list of num_train_timesteps={count!r} numbers"
            )
        return NoiseSchedule.from_betas(betas)
    if d["beta_schedule"] == "linear":
        return NoiseSchedule.linear(start, end, count)
    if d["beta_schedule"] == "scaled_linear":
        return NoiseSchedule.scaled_linear(start, end, count)
    if d["beta_schedule"] == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(count)
    if (
        d["beta_schedule"] == "sigmoid"
    ):  # beta itself is a sigmoid here, unlike NoiseSchedule.sigmoid
        unit = NoiseSchedule.linear(timesteps=count)  # validates the count
        return NoiseSchedule.from_betas(
            start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, len(unit))))
        )
    raise ValueError(
        f"scheduler_config.json: beta_schedule={d['beta_schedule']!r} is not supported; "
        "supported: linear, scaled_linear, squaredcos_cap_v2, sigmoid, or trained_betas"
    )


def scheduler_config(
    schedule: NoiseSchedule, prediction: str, variance: str, clip: float | None
) -> dict[str, Any]:
    """The scheduler_config.json of diffusers' DDPMScheduler."""
    names = {prediction: name for name, prediction in PREDICTIONS.items()}
    linear = NoiseSchedule.linear(schedule.beta[0], schedule.beta[-1], len(schedule))
    return dict(
        _class_name="DDPMScheduler",
        num_train_timesteps=len(schedule),
        beta_start=float(schedule.beta[0]),
        beta_end=float(schedule.beta[-1]),
        beta_schedule="linear",
        trained_betas=None
        if np.array_equal(schedule.beta, linear.beta)
        else schedule.beta.tolist(),
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=1.0 if clip is None else clip,
        prediction_type=names[prediction],
    )
