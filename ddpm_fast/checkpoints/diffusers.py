"""diffusers' folder layout and scheduler configuration.

model_index.json
unet/config.json, unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..models.config import UNetConfig
from ..models.diffusers_format import MODEL as DIFFUSERS_MODEL
from ..models.limits import FLAG, Rule, count, number
from ..models.unet import UNet
from ..utils.input_files import JSON_LIMIT, MIB, naming, read_json_object
from ..utils.validation import is_number, shown
from .weights import WEIGHTS, read_unet

INDEX, CONFIG, UNET = "model_index.json", "config.json", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
SCHEDULER_LIMIT = 16 * MIB  # bytes; trained_betas has about 25 per step
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
# The "_log" forms give the same samples; only the likelihood code stores them differently.
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
CLIP = number(1e-6, 1e6)
MIN_BETA_START = 1e-8  # below it, 1 - beta is 1 in fp32
_SCHEDULER_RULES: dict[str, Rule] = dict(
    num_train_timesteps=count(MAX_TIMESTEPS),
    beta_start=number(0, 1),
    beta_end=number(0, 1),
    clip_sample=FLAG,
    clip_sample_range=CLIP,
    rescale_betas_zero_snr=FLAG,
)
# Sampling options: validated but unused, because they do not describe the training.
_CHOICE_RULES: dict[str, Rule] = dict(
    dynamic_thresholding_ratio=number(0, 1),
    sample_max_value=number(0, 1e6),
    timestep_spacing=("a name", lambda v: isinstance(v, str)),
    steps_offset=("an integer of at least 0", lambda v: type(v) is int and v >= 0),
    set_alpha_to_one=FLAG,
    skip_prk_steps=FLAG,
)
# Classes whose configuration describes the process of Ho et al. 2020 with these keys.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
)


def folder_files(
    unet: UNet, schedule: NoiseSchedule, prediction: str, variance: str, clip: float | None
) -> dict[str, bytes]:
    """The files of a checkpoint by relative path."""
    network = network_files(unet)
    unet_class = unet.config.to_config()["_class_name"]
    library = "diffusers" if unet_class == DIFFUSERS_MODEL else "ddpm_fast"
    classes = dict(unet=[library, unet_class], scheduler=["diffusers", "DDPMScheduler"])
    return {
        INDEX: _json(dict(_class_name="DDPMPipeline", **classes)),
        **{f"unet/{name}": content for name, content in network.items()},
        SCHEDULER: _json(scheduler_config(schedule, prediction, variance, clip)),
    }


def network_files(unet: UNet) -> dict[str, bytes]:
    """The files of a network without its process."""
    from safetensors.torch import save

    weights = {k: v.detach().cpu().contiguous() for k, v in unet.state_dict().items()}
    return {
        CONFIG: _json(unet.config.to_config()),
        WEIGHTS: save(weights, metadata={"format": "pt"}),
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def read_folder(directory: Path) -> tuple[UNet, NoiseSchedule, str, str, float | None]:
    """(network, schedule, prediction, variance, clip) of a folder."""
    # older repositories have all files at the top
    flat = (directory / CONFIG).is_file() and not (directory / "unet").is_dir()
    unet, scheduler = (CONFIG, Path(SCHEDULER).name) if flat else (UNET, SCHEDULER)
    unet_config = _read_json(directory / unet, JSON_LIMIT)
    if flat and not os.path.lexists(directory / scheduler):
        raise ValueError(
            f"{directory} holds a network without its noise schedule, which no weight says: "
            "convert it with ddpm-fast convert --from diffusers-unet --schedule ..."
        )
    scheduler_config = _read_json(directory / scheduler, SCHEDULER_LIMIT)
    with naming(directory / unet):
        config = UNetConfig.from_config(unet_config)
    with naming(directory / scheduler):
        process = read_scheduler(scheduler_config)
    return read_unet((directory / unet).parent, config), *process


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise ValueError(
            f"{path} is missing; expected a diffusers folder with unet/ and scheduler/"
        )
    return read_json_object(path, limit)


def read_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, str, float | None]:
    """(schedule, prediction, variance, clip) from diffusers' scheduler_config.json."""
    if (name := config.get("_class_name", SCHEDULERS[0])) not in SCHEDULERS:
        raise ValueError(
            f"this scheduler class is unsupported: {shown(name)}; "
            f"supported: {', '.join(SCHEDULERS)}"
        )
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    if unknown := sorted(set(values) - set(_SCHEDULER_DEFAULTS) - set(_CHOICE_RULES)):
        raise ValueError(
            f"unknown key {', '.join(map(shown, unknown[:5]))} ({len(unknown)} in all); "
            f"known: {', '.join([*_SCHEDULER_DEFAULTS, *_CHOICE_RULES])}"
        )
    d = {**_SCHEDULER_DEFAULTS, **values}
    for key in ("thresholding", "timestep_values"):
        if d[key] is not False and d[key] is not None:
            raise ValueError(f"{key}={shown(d[key])} is not supported; expected false or null")
    for key, known in (("prediction_type", PREDICTIONS), ("variance_type", VARIANCES)):
        if not isinstance(d[key], str) or d[key] not in known:
            raise ValueError(
                f"{key}={shown(d[key])} is not supported; supported: {', '.join(known)}"
            )
    for key, (expected, fits) in (_SCHEDULER_RULES | _CHOICE_RULES).items():
        if key in d and not fits(d[key]):
            raise ValueError(f"{key}={shown(d[key])}; expected {expected}")
    clip = float(d["clip_sample_range"]) if d["clip_sample"] else None
    schedule = _read_schedule(d)
    if d["rescale_betas_zero_snr"]:
        schedule = schedule.zero_terminal_snr()
    return schedule, PREDICTIONS[d["prediction_type"]], VARIANCES[d["variance_type"]], clip


def schedule_of_diffusers(name: str, timesteps: int = 1000) -> NoiseSchedule:
    """Schedule of diffusers' DDPMScheduler(beta_schedule=name).

    name: "linear", "scaled_linear", "squaredcos_cap_v2" or "sigmoid".
    """
    return read_scheduler({"beta_schedule": name, "num_train_timesteps": timesteps})[0]


def _read_schedule(d: Mapping[str, Any]) -> NoiseSchedule:
    start, end, steps = d["beta_start"], d["beta_end"], d["num_train_timesteps"]
    if (betas := d["trained_betas"]) is not None:
        if not isinstance(betas, list) or len(betas) != steps or not all(map(is_number, betas)):
            raise ValueError(
                f"trained_betas={shown(betas)}; expected a list of "
                f"num_train_timesteps={steps} numbers"
            )
        return NoiseSchedule.from_betas(betas)
    if not _is_beta_range(start, end):
        raise ValueError(
            f"beta_start={start}, beta_end={end}; "
            f"expected {MIN_BETA_START:g} <= beta_start <= beta_end < 1"
        )
    if d["beta_schedule"] == "linear":
        return NoiseSchedule.linear(start, end, steps)
    if d["beta_schedule"] == "scaled_linear":
        return NoiseSchedule.scaled_linear(start, end, steps)
    if d["beta_schedule"] == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(steps)
    if d["beta_schedule"] == "sigmoid":  # of beta itself, unlike NoiseSchedule.sigmoid
        return NoiseSchedule.from_betas(
            start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))
        )
    raise ValueError(
        f"beta_schedule={shown(d['beta_schedule'])} is not supported; "
        "supported: linear, scaled_linear, squaredcos_cap_v2, sigmoid, or trained_betas"
    )


def _is_beta_range(start: float, end: float) -> bool:
    return MIN_BETA_START <= start <= end < 1


def scheduler_config(
    schedule: NoiseSchedule, prediction: str, variance: str, clip: float | None
) -> dict[str, Any]:
    """The scheduler_config.json of diffusers' DDPMScheduler."""
    names = {prediction: name for name, prediction in PREDICTIONS.items()}
    start, end = float(schedule.beta[0]), float(schedule.beta[-1])
    is_linear = _is_beta_range(start, end) and schedule == NoiseSchedule.linear(
        start, end, len(schedule)
    )
    return dict(
        _class_name="DDPMScheduler",
        num_train_timesteps=len(schedule),
        beta_start=start,
        beta_end=end,
        beta_schedule="linear",
        trained_betas=None if is_linear else schedule.beta.tolist(),
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=1.0 if clip is None else float(clip),
        prediction_type=names[prediction],
    )
