"""The shape of a DDPM UNet, and its translation from and to the `config.json` of diffusers' `UNet2DModel`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

# diffusers' own defaults: a key that a config.json leaves out means these.
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

_COUNT = ("an integer of at least 1", lambda v: _is_int(v) and v >= 1)
_NUMBER = ("a number", lambda v: _is_number(v))
_POSITIVE = ("a positive number", lambda v: _is_number(v) and v > 0)
_FLAG = ("true or false", lambda v: isinstance(v, bool))
_NAMES = ("a list of names", lambda v: isinstance(v, (list, tuple)) and bool(v) and all(isinstance(n, str) for n in v))
_OPTIONAL_COUNT = ("an integer of at least 1, or null", lambda v: v is None or _COUNT[1](v))
# What each key that holds a number, a flag or a list must be: a damaged file is one clear line.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = dict(
    sample_size=("an integer, a pair of them, or null", lambda v: v is None or _COUNT[1](v) or _is_counts(v, 2)),
    in_channels=_COUNT,
    out_channels=_COUNT,
    center_input_sample=_FLAG,
    time_embedding_dim=_OPTIONAL_COUNT,
    freq_shift=_NUMBER,
    flip_sin_to_cos=_FLAG,
    down_block_types=_NAMES,
    up_block_types=_NAMES,
    block_out_channels=("a list of integers of at least 1", lambda v: _is_counts(v, None)),
    layers_per_block=_COUNT,
    mid_block_scale_factor=_POSITIVE,
    dropout=("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1),
    attention_head_dim=_OPTIONAL_COUNT,
    norm_num_groups=_COUNT,
    attn_norm_num_groups=_OPTIONAL_COUNT,
    norm_eps=_POSITIVE,
    add_attention=_FLAG,
    num_class_embeds=_OPTIONAL_COUNT,
)

# The values for which this network computes what diffusers computes; everything else is refused.
# num_train_timesteps is absent on purpose: diffusers reads it for time_embedding_type="learned" only.
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

# block name -> (attention, resampling); None: whatever downsample_type / upsample_type says
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


class LevelConfig(NamedTuple):
    """One level of a `UNetConfig`, every choice spelled out."""

    channels: int
    layers: int
    attention: bool
    up_attention: bool
    heads: int
    down_resample: str
    up_resample: str


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides which function a `UNet` is. Defaults: the CIFAR-10 network of Ho et al. 2020.

    Levels are counted from the finest (0). A scalar given for a per-level field means the same on every level.

    sample_size      training size in pixels, one number or (H, W); other sizes run too. None: not said.
    channels         width of each level.
    layers           residual blocks of each level on the way down; the way up has one more.
    attention        self-attention after each residual block of the level, on the way down.
    up_attention     the same on the way up; None: as on the way down.
    mid_attention    self-attention at the bottom.
    heads            attention heads of each level (the bottom uses the last). Give either this or
    head_dim           channels per head of each level; constructor only, stored as `heads`.
    down_resample    "conv" (strided 3x3) or "resnet" (average pooling inside a residual block, as in ADM), per level;
                     the coarsest level has none
    up_resample      "conv" (nearest 2x, 3x3) or "resnet", per level; the finest level has none
    downsample_padding  1: symmetric (OpenAI); 0: right and bottom only (Ho, TensorFlow's SAME)
    norm_groups, norm_eps   of every GroupNorm
    mid_norm_groups  of the bottom's attention; None: norm_groups; 0: that attention has no norm
    scale_shift      the time embedding scales and shifts the second norm instead of being added before it
    time_dim         width of the time embedding; 0: 4 * channels[0]
    cos_first        order of the sinusoid's halves; freq_shift: its frequencies are 1e4^(-i / (half - freq_shift))
    num_classes      size of the class embedding, added to the time embedding; None: unconditional
    mid_scale        outputs at the bottom are divided by this
    center_input     the network sees 2 x - 1

    Raises ValueError for a combination that no network has, and says which.
    """

    sample_size: int | tuple[int, int] | None = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers: int | tuple[int, ...] = 2
    attention: bool | tuple[bool, ...] = (False, True, False, False)
    up_attention: bool | tuple[bool, ...] | None = None
    mid_attention: bool = True
    heads: int | tuple[int, ...] = 1
    head_dim: InitVar[int | tuple[int, ...] | None] = None
    down_resample: str | tuple[str, ...] = "conv"
    up_resample: str | tuple[str, ...] = "conv"
    downsample_padding: int = 0
    norm_groups: int = 32
    mid_norm_groups: int | None = None
    norm_eps: float = 1e-6
    scale_shift: bool = False
    time_dim: int = 0
    cos_first: bool = False
    freq_shift: float = 1
    num_classes: int | None = None
    dropout: float = 0.0
    mid_scale: float = 1.0
    center_input: bool = False

    def __post_init__(self, head_dim: int | tuple[int, ...] | None) -> None:
        if not _is_counts(self.channels, None):
            raise ValueError(f"channels={self.channels!r}; expected a tuple of integers of at least 1, one per level")
        self._store("channels", tuple(self.channels))
        if isinstance(self.sample_size, list):
            self._store("sample_size", tuple(self.sample_size))
        if self.up_attention is None:
            self._store("up_attention", self.attention)
        for name in ("layers", "attention", "up_attention", "heads", "down_resample", "up_resample"):
            self._store(name, self._per_level(name, getattr(self, name)))
        self._store("time_dim", self.time_dim or 4 * self.channels[0])
        if self.mid_norm_groups is None:
            self._store("mid_norm_groups", self.norm_groups)
        if head_dim is not None:
            if set(self.levels_of("heads")) != {1}:
                raise ValueError(f"heads={self.heads} and head_dim={head_dim} were both given: give one of them")
            self._store("heads", tuple(self._split(head_dim)))
        # what no layer reads is set to one value, so that equal networks have equal configurations
        self._store("heads", tuple(h if a else 1 for h, a in zip(self.levels_of("heads"), self.attends, strict=True)))
        self._store("down_resample", (*self.levels_of("down_resample")[:-1], "conv"))
        self._store("up_resample", ("conv", *self.levels_of("up_resample")[1:]))
        self._check()

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else

    def _per_level(self, name: str, value: Any) -> tuple[Any, ...]:
        levels = len(self.channels)
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * levels
        if len(value) != levels:
            raise ValueError(f"{name}={value} has {len(value)} entries, channels={self.channels} has {levels} levels")
        return value

    def _split(self, head_dim: int | tuple[int, ...]) -> Iterator[int]:
        for c, d, attends in zip(self.channels, self._per_level("head_dim", head_dim), self.attends, strict=True):
            if attends and c % d:
                raise ValueError(f"a level of {c} channels cannot be split into attention heads of {d}")
            yield c // d

    def _check(self) -> None:
        numbers = (self.in_channels, self.out_channels, self.time_dim, self.norm_groups, *self.channels, *self.levels_of("layers"))
        if not all(_is_int(n) and n >= 1 for n in (*numbers, self.num_classes or 1)) or self.num_classes == 0:
            raise ValueError(f"{self}: channels, layers, time_dim, norm_groups and num_classes must be integers of at least 1")
        if not (self.norm_eps > 0 and self.mid_scale > 0 and 0 <= self.dropout < 1):
            raise ValueError(
                f"norm_eps={self.norm_eps}, mid_scale={self.mid_scale}, dropout={self.dropout}; expected > 0, > 0, 0 to 1"
            )
        for level, attends in zip(self.levels, self.attends, strict=True):
            if level.channels % self.norm_groups:
                raise ValueError(
                    f"a level of {level.channels} channels cannot be split into norm_groups={self.norm_groups} equal groups"
                )
            if attends and (level.heads < 1 or level.channels % level.heads):
                raise ValueError(f"a level of {level.channels} channels cannot be split into {level.heads} attention heads")
            for resample in (level.down_resample, level.up_resample):
                if resample not in ("conv", "resnet"):
                    raise ValueError(f'resampling {resample!r}; expected "conv" or "resnet"')
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding={self.downsample_padding}; expected 0 (right and bottom) or 1 (symmetric)")
        if self.channels[0] % 2:
            raise ValueError(f"channels[0]={self.channels[0]}; the sinusoid needs an even number")

    def levels_of(self, name: str) -> tuple[Any, ...]:
        """A per-level field as the tuple that it is once constructed."""
        return getattr(self, name)

    @property
    def levels(self) -> list[LevelConfig]:
        """The levels, finest first."""
        return [LevelConfig(*values) for values in zip(*map(self.levels_of, LevelConfig._fields), strict=True)]

    @property
    def attends(self) -> tuple[bool, ...]:
        """Per level: does any attention run at its width (down, up, or at the bottom)?"""
        both = [down or up for down, up in zip(self.levels_of("attention"), self.levels_of("up_attention"), strict=True)]
        return (*both[:-1], both[-1] or self.mid_attention)

    @property
    def size(self) -> tuple[int, int] | None:
        """`sample_size` as (H, W)."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """From the dictionary in diffusers' `unet/config.json` (class `UNet2DModel`).

        A missing key takes diffusers' default, a key that starts with "_" is metadata. ValueError for an unknown
        key and for a value that this network does not implement: neither is ever ignored.
        """
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        if unknown := sorted(set(given) - set(_DIFFUSERS_DEFAULTS)):
            raise ValueError(
                f"unknown key {', '.join(unknown)} in the UNet2DModel configuration; known: {', '.join(_DIFFUSERS_DEFAULTS)}"
            )
        d = {**_DIFFUSERS_DEFAULTS, **given}
        for key, supported in _SUPPORTED.items():
            if d[key] not in supported:
                raise ValueError(f"{key}={d[key]!r} is not supported; supported: {', '.join(map(repr, supported))}")
        for key, (expected, fits) in _KINDS.items():
            if not fits(d[key]):
                raise ValueError(f"{key}={d[key]!r} in the UNet2DModel configuration; expected {expected}")
        down = [_block(name, _DOWN_BLOCKS, d["downsample_type"]) for name in d["down_block_types"]]
        up = [_block(name, _UP_BLOCKS, d["upsample_type"]) for name in reversed(d["up_block_types"])]
        if not len(down) == len(up) == len(d["block_out_channels"]):
            raise ValueError("down_block_types, up_block_types and block_out_channels must have one entry per level")
        mid_groups = d["attn_norm_num_groups"]
        if mid_groups is None and d["resnet_time_scale_shift"] == "scale_shift":
            mid_groups = 0  # diffusers then leaves this norm out
        return cls(
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

    def to_diffusers(self) -> dict[str, Any]:
        """The dictionary for diffusers' `unet/config.json`. ValueError where `UNet2DModel` cannot express this network."""
        levels = self.levels
        if len({level.layers for level in levels}) > 1:
            raise ValueError(f"layers={self.layers}: diffusers has one layers_per_block for all levels")
        split = [(level.channels, level.heads) for level, attends in zip(levels, self.attends, strict=True) if attends]
        head_dims = {c // h for c, h in split}
        single = all(h == 1 for _, h in split)
        if len(head_dims) > 1 and not single:
            raise ValueError(f"heads={self.heads} at channels={self.channels}: diffusers has one attention_head_dim for all levels")
        if self.mid_attention and not self.scale_shift and not self.mid_norm_groups:
            raise ValueError("mid_norm_groups=0: diffusers leaves this norm out only under scale_shift")
        down, down_type = _names([(level.attention, level.down_resample) for level in levels], len(levels) - 1, _DOWN_BLOCKS)
        up, up_type = _names([(level.up_attention, level.up_resample) for level in levels], 0, _UP_BLOCKS)
        return dict(
            _class_name="UNet2DModel",
            sample_size=list(self.sample_size) if isinstance(self.sample_size, tuple) else self.sample_size,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            center_input_sample=self.center_input,
            time_embedding_type="positional",
            time_embedding_dim=self.time_dim,
            freq_shift=self.freq_shift,
            flip_sin_to_cos=self.cos_first,
            down_block_types=down,
            mid_block_type="UNetMidBlock2D",
            up_block_types=up[::-1],
            block_out_channels=list(self.channels),
            layers_per_block=levels[0].layers,
            mid_block_scale_factor=self.mid_scale,
            downsample_padding=self.downsample_padding,
            downsample_type=down_type,
            upsample_type=up_type,
            dropout=self.dropout,
            act_fn="silu",
            attention_head_dim=None if single else head_dims.pop(),
            norm_num_groups=self.norm_groups,
            attn_norm_num_groups=self.mid_norm_groups or None,
            norm_eps=self.norm_eps,
            resnet_time_scale_shift="scale_shift" if self.scale_shift else "default",
            add_attention=self.mid_attention,
            class_embed_type=None,
            num_class_embeds=self.num_classes,
            num_train_timesteps=None,
        )


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)


def _is_counts(v: Any, length: int | None) -> bool:
    return isinstance(v, (list, tuple)) and length in (None, len(v)) and bool(v) and all(_is_int(n) and n >= 1 for n in v)


def _block(name: str, known: Mapping[str, tuple[bool, str | None]], resample: str) -> tuple[bool, str]:
    """(attention, resampling) of a diffusers block name."""
    name = name.removeprefix("UNetRes")
    if name not in known:
        raise ValueError(f"block type {name!r} is not supported; supported: {', '.join(known)}")
    attention, own = known[name]
    return attention, own or resample


def _names(levels: list[tuple[bool, str]], without: int, known: Mapping[str, tuple[bool, str | None]]) -> tuple[list[str], str]:
    """diffusers' block names for (attention, resampling) per level, and the one resampling that its attention blocks share.

    `without` is the level that does not resample.
    """
    plain, attending, resnet = known
    shared = {resample for i, (attention, resample) in enumerate(levels) if attention and i != without}
    if len(shared) > 1:
        raise ValueError(f"(attention, resampling) {levels}: diffusers has one resampling for all its attention blocks")
    names = [attending if attention else resnet if resample == "resnet" else plain for attention, resample in levels]
    return names, (shared or {"conv"}).pop()
