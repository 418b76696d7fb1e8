"""Translation between the fields of `UNetConfig` and diffusers' `config.json` of a `UNet2DModel`.

Both are plain dictionaries. Unknown keys raise, except metadata. As an extension,
`layers_per_block` may be a list with one entry per level, finest first, as in diffusers'
`UNet2DConditionModel`; `UNet2DModel` raises TypeError for a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.validation import is_count, is_counts, shown
from .limits import FIELDS, FLAG, MAX_LAYERS, MAX_WIDTH, Rule, count, optional

MODEL = "UNet2DModel"
# diffusers' defaults, for the keys that a config.json omits
_DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    sample_size=None,
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(224, 448, 672, 896),
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=1,
    downsample_type="conv",
    upsample_type="conv",
    dropout=0.0,
    act_fn="silu",
    attention_head_dim=8,
    norm_num_groups=32,
    attn_norm_num_groups=None,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
    num_class_embeds=None,
    num_train_timesteps=None,
)

_NAMES: Rule = (
    "a list of names",
    lambda v: isinstance(v, (list, tuple)) and bool(v) and all(isinstance(n, str) for n in v),
)
# Valid values of each key that holds a number, a flag or a list
_RULES: dict[str, Rule] = dict(
    sample_size=FIELDS["sample_size"],
    in_channels=FIELDS["in_channels"],
    out_channels=FIELDS["out_channels"],
    center_input_sample=FLAG,
    time_embedding_dim=optional(FIELDS["time_dim"]),
    freq_shift=FIELDS["freq_shift"],
    flip_sin_to_cos=FLAG,
    down_block_types=_NAMES,
    up_block_types=_NAMES,
    block_out_channels=FIELDS["channels"],
    layers_per_block=(
        FIELDS["layers"][0],
        lambda v: is_count(v, MAX_LAYERS) or is_counts(v, None, MAX_LAYERS),
    ),
    mid_block_scale_factor=FIELDS["mid_scale"],
    dropout=FIELDS["dropout"],
    attention_head_dim=optional(count(MAX_WIDTH)),
    norm_num_groups=FIELDS["norm_groups"],
    attn_norm_num_groups=optional(count(MAX_WIDTH)),
    norm_eps=FIELDS["norm_eps"],
    add_attention=FLAG,
    num_class_embeds=FIELDS["num_classes"],
    # validated but unused: diffusers reads it for time_embedding_type="learned" only
    num_train_timesteps=optional(count(2**24 - 1)),
)

# Values for which `UNet` computes the same as diffusers; others raise.
_SUPPORTED: dict[str, tuple[Any, ...]] = dict(
    time_embedding_type=("positional",),
    mid_block_type=("UNetMidBlock2D",),
    act_fn=("silu", "swish"),
    downsample_type=("conv", "resnet"),
    upsample_type=("conv", "resnet"),
    downsample_padding=(0, 1),
    resnet_time_scale_shift=("default", "scale_shift"),
    class_embed_type=(None,),
)

# block name -> (attention, resampling); None: downsample_type / upsample_type decides
_DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP_BLOCKS = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}


def arguments_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `UNetConfig` for a UNet2DModel configuration."""
    if (model := config.get("_class_name", MODEL)) != MODEL:
        raise ValueError(f"this model class is unsupported: {shown(model)}; supported: {MODEL}")
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    if unknown := sorted(set(values) - set(_DIFFUSERS_DEFAULTS)):
        raise ValueError(
            f"unknown key {', '.join(map(shown, unknown[:5]))} in the {MODEL} configuration "
            f"({len(unknown)} in all); known: {', '.join(_DIFFUSERS_DEFAULTS)}"
        )
    d = {**_DIFFUSERS_DEFAULTS, **values}
    for key, supported in _SUPPORTED.items():
        # by type too: True == 1
        if not any(type(d[key]) is type(value) and d[key] == value for value in supported):
            raise ValueError(
                f"{key}={shown(d[key])} is not supported; "
                f"supported: {', '.join(map(repr, supported))}"
            )
    for key, (expected, fits) in _RULES.items():
        if not fits(d[key]):
            raise ValueError(
                f"{key}={shown(d[key])} in the {MODEL} configuration; expected {expected}"
            )
    down = [_block(name, _DOWN_BLOCKS, d["downsample_type"]) for name in d["down_block_types"]]
    up = [_block(name, _UP_BLOCKS, d["upsample_type"]) for name in reversed(d["up_block_types"])]
    if not len(down) == len(up) == len(d["block_out_channels"]):
        raise ValueError(
            "down_block_types, up_block_types and block_out_channels must have one entry per level"
        )
    mid_groups = d["attn_norm_num_groups"]
    if mid_groups is None and d["resnet_time_scale_shift"] == "scale_shift":
        mid_groups = 0  # diffusers then omits this norm
    return dict(
        sample_size=d["sample_size"],
        in_channels=d["in_channels"],
        out_channels=d["out_channels"],
        channels=tuple(d["block_out_channels"]),
        layers=d["layers_per_block"],
        attention=tuple(a for a, _ in down),
        up_attention=tuple(a for a, _ in up),
        mid_attention=d["add_attention"],
        head_dim=d["attention_head_dim"],
        down_resample=tuple(r for _, r in down),
        up_resample=tuple(r for _, r in up),
        downsample_padding=d["downsample_padding"],
        norm_groups=d["norm_num_groups"],
        mid_norm_groups=mid_groups,
        norm_eps=d["norm_eps"],
        scale_shift=d["resnet_time_scale_shift"] == "scale_shift",
        time_dim=d["time_embedding_dim"] or 0,
        cos_first=d["flip_sin_to_cos"],
        freq_shift=d["freq_shift"],
        num_classes=d["num_class_embeds"],
        dropout=d["dropout"],
        mid_scale=d["mid_block_scale_factor"],
        center_input=d["center_input_sample"],
    )


def to_diffusers(c: Mapping[str, Any], attends: Sequence[bool]) -> dict[str, Any]:
    """Returns the UNet2DModel configuration for the fields of a `UNetConfig`.

    Args:
        c: The fields; per-level fields are tuples, finest level first.
        attends: `UNetConfig.attends`.
    """
    layers, size = list(c["layers"]), c["sample_size"]
    split = [
        (width, heads)
        for width, heads, a in zip(c["channels"], c["heads"], attends, strict=True)
        if a
    ]
    head_dims = {width // heads for width, heads in split}
    single = all(heads == 1 for _, heads in split)
    if len(head_dims) > 1 and not single:
        raise ValueError(
            f"heads={c['heads']} at channels={c['channels']}: diffusers has one attention_head_dim "
            "for all levels"
        )
    for name, value in (("time_scale", 1), ("sinusoid_dim", c["channels"][0])):
        if c[name] != value:
            raise ValueError(f"{name}={c[name]}: diffusers has no such option, expected {value}")
    if c["mid_attention"] and not c["scale_shift"] and not c["mid_norm_groups"]:
        raise ValueError("mid_norm_groups=0: diffusers omits this norm only with scale_shift")
    down, down_type = _names(
        list(zip(c["attention"], c["down_resample"], strict=True)), len(attends) - 1, _DOWN_BLOCKS
    )
    up, up_type = _names(list(zip(c["up_attention"], c["up_resample"], strict=True)), 0, _UP_BLOCKS)
    return dict(
        _class_name=MODEL,
        sample_size=list(size) if isinstance(size, tuple) else size,
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        center_input_sample=c["center_input"],
        time_embedding_type="positional",
        time_embedding_dim=c["time_dim"],
        freq_shift=c["freq_shift"],
        flip_sin_to_cos=c["cos_first"],
        down_block_types=down,
        mid_block_type="UNetMidBlock2D",
        up_block_types=up[::-1],
        block_out_channels=list(c["channels"]),
        layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
        mid_block_scale_factor=c["mid_scale"],
        downsample_padding=c["downsample_padding"],
        downsample_type=down_type,
        upsample_type=up_type,
        dropout=c["dropout"],
        act_fn="silu",
        attention_head_dim=None if single else head_dims.pop(),
        norm_num_groups=c["norm_groups"],
        attn_norm_num_groups=c["mid_norm_groups"] or None,
        norm_eps=c["norm_eps"],
        resnet_time_scale_shift="scale_shift" if c["scale_shift"] else "default",
        add_attention=c["mid_attention"],
        class_embed_type=None,
        num_class_embeds=c["num_classes"],
        num_train_timesteps=None,
    )


def _block(
    name: str, known: Mapping[str, tuple[bool, str | None]], resample: str
) -> tuple[bool, str]:
    """(attention, resampling) of a diffusers block name."""
    name = name.removeprefix("UNetRes")
    if name not in known:
        raise ValueError(
            f"block type {shown(name)} is not supported; supported: {', '.join(known)}"
        )
    attention, fixed = known[name]
    return attention, fixed or resample


def _names(
    levels: list[tuple[bool, str]], without: int, known: Mapping[str, tuple[bool, str | None]]
) -> tuple[list[str], str]:
    """diffusers' block names for (attention, resampling) per level, and its attention's resampling.

    `without` is the level that does not resample.
    """
    plain, attending, resnet = known
    shared = {
        resample for i, (attention, resample) in enumerate(levels) if attention and i != without
    }
    if len(shared) > 1:
        raise ValueError(
            f"(attention, resampling) {levels}: diffusers has one resampling for all attention "
            "blocks"
        )
    names = [
        attending if attention else resnet if resample == "resnet" else plain
        for attention, resample in levels
    ]
    return names, (shared or {"conv"}).pop()
