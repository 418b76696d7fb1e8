"""Flags of OpenAI's scripts: what a network's weights do not say, and checks of what they do say.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.validation import shown

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as in the scripts
# No flag's default is critical but these: no weight contradicts a wrong value.
REQUIRED = ("image_size", "diffusion_steps", "noise_schedule")
_COMMON: dict[str, Any] = dict(
    image_size=64,
    num_channels=128,
    num_res_blocks=2,
    num_heads=4,
    num_heads_upsample=-1,
    attention_resolutions="16,8",
    dropout=0.0,
    learn_sigma=False,
    class_cond=False,
    diffusion_steps=1000,
    noise_schedule="linear",
    predict_xstart=False,
    use_scale_shift_norm=True,
    clip_denoised=True,
)
# what no weight says
SILENT = (
    *REQUIRED,
    "rescale_timesteps",
    "num_heads",
    "num_head_channels",
    "use_new_attention_order",
    "predict_xstart",
    "learn_sigma",
    "sigma_small",
    "clip_denoised",
    "dropout",
)
# defaults of the flags that decide what the network computes and how it is sampled
DEFAULTS: dict[str, dict[str, Any]] = {
    "improved-diffusion": dict(_COMMON, rescale_timesteps=True, sigma_small=False),
    "guided-diffusion": dict(
        _COMMON,
        rescale_timesteps=False,
        num_head_channels=-1,
        channel_mult="",
        resblock_updown=False,
        use_new_attention_order=False,
    ),
}
# flags of training and of single sampling runs: accepted, without effect on the checkpoint
_WITHOUT_EFFECT = frozenset(
    {
        "use_checkpoint",
        "use_fp16",
        "use_kl",
        "rescale_learned_sigmas",
        "timestep_respacing",
        "data_dir",
        "schedule_sampler",
        "lr",
        "weight_decay",
        "lr_anneal_steps",
        "batch_size",
        "microbatch",
        "ema_rate",
        "log_interval",
        "save_interval",
        "resume_checkpoint",
        "fp16_scale_growth",
        "num_samples",
        "use_ddim",
        "model_path",
        "classifier_path",
        "classifier_scale",
        "classifier_use_fp16",
        "classifier_width",
        "classifier_depth",
        "classifier_pool",
        "classifier_attention_resolutions",
        "classifier_use_scale_shift_norm",
        "classifier_resblock_updown",
    }
)
_MULTIPLIERS: dict[str, dict[int, tuple[float, ...]]] = {
    "improved-diffusion": {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
    "guided-diffusion": {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
    },
}


@dataclass(frozen=True)
class OpenAIFlags:
    """Flags of one model, complete.

    Attributes:
        codebase: "improved-diffusion" or "guided-diffusion".
        values: The value of every flag in `DEFAULTS`.
        stated: The flags that were given; the others have the codebase's defaults.
        ignored: Given flags without effect on the checkpoint.
    """

    codebase: str
    values: Mapping[str, Any]
    stated: frozenset[str]
    ignored: tuple[str, ...] = field(default=())

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Width of each level as a multiple of num_channels."""
        text = self.values.get("channel_mult", "")
        if text:
            return tuple(_numbers("channel_mult", text, self.codebase))
        known = _MULTIPLIERS[self.codebase]
        if (size := self.values["image_size"]) not in known:
            raise ValueError(
                f"--image_size {size} has no channel_mult in {self.codebase}; "
                f"expected one of {', '.join(map(str, sorted(known)))}"
            )
        return known[size]

    @property
    def attention(self) -> tuple[bool, ...]:
        """Per level, finest first: does it attend?"""
        size = self.values["image_size"]
        text = self.values["attention_resolutions"]
        factors = {size // r for r in _numbers("attention_resolutions", text, self.codebase)}
        return tuple(2**i in factors for i in range(len(self.multipliers)))

    @property
    def time_scale(self) -> float:
        """What the network's timesteps are multiplied by."""
        return 1000.0 / self.values["diffusion_steps"] if self.values["rescale_timesteps"] else 1.0

    @property
    def prediction(self) -> str:
        return "x_0" if self.values["predict_xstart"] else "eps"

    @property
    def variance(self) -> str:
        if self.values["learn_sigma"]:
            return "learned_range"
        return "fixed_small" if self.values.get("sigma_small") else "fixed_large"

    def heads(self, channels: int) -> int:
        """Attention heads at a width. ValueError if they do not divide it."""
        head_channels, heads = self.values.get("num_head_channels", -1), self.values["num_heads"]
        divisor, name = (
            (heads, "num_heads") if head_channels == -1 else (head_channels, "num_head_channels")
        )
        if channels % divisor:
            raise ValueError(
                f"--{name} {divisor} contradicts the weights, which attend at {channels} channels; "
                f"expected a divisor: give --{name} as in training"
            )
        return heads if head_channels == -1 else channels // head_channels

    def origin(self, name: str) -> str:
        """Where the value of a flag comes from."""
        return "given" if name in self.stated else f"default of {self.codebase}"


def parse_flags(text: str, codebase: str) -> OpenAIFlags:
    """Flags of OpenAI's scripts, as on their command line.

    Args:
        text: Such as "--image_size 64 --num_channels 192"; line breaks are allowed.
        codebase: Whose defaults the flags left out have.

    Raises:
        ValueError: A flag is unknown, has no or an invalid value, is given twice with two values,
            or one of `REQUIRED` is missing.
    """
    defaults = DEFAULTS[codebase]
    given: dict[str, str] = {}
    for name, value in _pairs(text):
        if given.setdefault(name, value) != value:
            raise ValueError(f"--{name} is {given[name]} and {value}; give it once")
    if {"large_size", "small_size"} & set(given):
        raise ValueError("--large_size is a flag of an upsampler; upsamplers are unsupported")
    for name in given:
        if name not in defaults and name not in _WITHOUT_EFFECT:
            raise ValueError(
                f"--{name:.60} is not a flag of {codebase}; known: {', '.join(sorted(defaults))}"
            )
    if missing := [f"--{name}" for name in REQUIRED if name not in given]:
        raise ValueError(
            f"the flags do not name {', '.join(missing)}, which no weight says; "
            "give them as in training"
        )
    stated = {name: _value(name, given[name], defaults[name]) for name in given if name in defaults}
    values = {**defaults, **stated}
    _check_values(values)
    ignored = tuple(name for name in given if name not in defaults)
    return OpenAIFlags(codebase, values, frozenset(stated), ignored)


def _pairs(text: str) -> list[tuple[str, str]]:
    try:
        words = [part for word in shlex.split(text) for part in _separated(word)]
    except ValueError as error:  # an open quotation mark
        raise ValueError(f"--flags cannot be parsed: {error}") from None
    pairs = []
    while words:
        name, *words = words
        if not name.startswith("--") or not words or words[0].startswith("--"):
            raise ValueError(f"--flags has {shown(name)}; expected --NAME VALUE pairs")
        value, *words = words
        pairs.append((name.removeprefix("--"), value))
    return pairs


def _separated(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name.startswith("--") else [word]


def _value(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"--{name} is {shown(text)}; expected True or False")
        return text.lower() in _TRUE
    try:
        if len(text) > 64:
            raise ValueError
        return kind(text)
    except ValueError:
        raise ValueError(
            f"--{name} is {shown(text)}; expected {'a number' if kind is float else 'an integer'}"
        ) from None


def _check_values(values: Mapping[str, Any]) -> None:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = dict(
        image_size=(lambda v: 1 <= v <= 16_384, "1 to 16384"),
        num_channels=(lambda v: 1 <= v <= 16_384, "1 to 16384"),
        num_res_blocks=(lambda v: 1 <= v <= 128, "1 to 128"),
        num_heads=(lambda v: 1 <= v <= 16_384, "1 to 16384"),
        num_head_channels=(lambda v: v == -1 or 1 <= v <= 16_384, "-1 or 1 to 16384"),
        dropout=(lambda v: 0 <= v < 1, "0 to below 1"),
        diffusion_steps=(lambda v: 1 <= v < 2**24, "1 to 2^24 - 1"),
        noise_schedule=(lambda v: v in ("linear", "cosine"), "linear or cosine"),
    )
    for name, (fits, expected) in rules.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"--{name} is {shown(values[name])}; expected {expected}")
    if values["num_heads_upsample"] not in (-1, values["num_heads"]):
        raise ValueError(
            f"--num_heads_upsample is {values['num_heads_upsample']}; expected -1 or num_heads: "
            "other heads on the way up are unsupported"
        )


def _numbers(name: str, text: str, codebase: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 6 and int(part) for part in parts):
        raise ValueError(
            f"--{name} is {shown(text)}; expected integers separated by commas, as in {codebase}"
        )
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Architecture:
    """What the weights say about a `UNetModel`. Per-level fields begin with the finest level.

    Attributes:
        widths: Channels per level.
        layers: Residual blocks per level, on the way down.
        attention: Per level.
        in_channels, out_channels: Of the network.
        num_channels: Width of the sinusoid of the timestep.
        time_dim: Width of the time embedding.
        num_classes: None: unconditional.
        scale_shift: OpenAI's use_scale_shift_norm.
        resblock_updown: Whether residual blocks resample.
    """

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    attention: tuple[bool, ...]
    in_channels: int
    out_channels: int
    num_channels: int
    time_dim: int
    num_classes: int | None
    scale_shift: bool
    resblock_updown: bool


def check_flags(flags: OpenAIFlags, weights: Architecture) -> None:
    """Compares flags with the weights.

    Raises:
        ValueError: They contradict each other; the message names the flag and both values.
    """
    values, w = flags.values, weights
    widths = tuple(int(m * values["num_channels"]) for m in flags.multipliers)
    outputs = w.in_channels * (2 if values["learn_sigma"] else 1)
    for name, by_flags, by_weights in (
        ("num_channels", values["num_channels"], w.num_channels),
        ("image_size or channel_mult", widths, w.widths),
        ("num_res_blocks", (values["num_res_blocks"],) * len(w.layers), w.layers),
        ("attention_resolutions", flags.attention, w.attention),
        ("class_cond", values["class_cond"], w.num_classes is not None),
        ("use_scale_shift_norm", values["use_scale_shift_norm"], w.scale_shift),
        ("resblock_updown", values.get("resblock_updown", False), w.resblock_updown),
        ("learn_sigma", outputs, w.out_channels),
    ):
        if by_flags != by_weights:
            what = _MEANING.get(name, "")
            raise ValueError(
                f"--{name} ({flags.origin(name.partition(' ')[0])}) contradicts the weights: "
                f"{what}{shown(by_flags)} by the flags, {shown(by_weights)} in the file; "
                "give the flags of training"
            )


_MEANING = {
    "image_size or channel_mult": "widths ",
    "num_res_blocks": "blocks per level ",
    "attention_resolutions": "attention per level ",
    "learn_sigma": "output channels ",
}
