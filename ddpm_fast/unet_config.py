"""The shape of a DDPM UNet, and its translation from and to the `config.json` of diffusers' `UNet2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any

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
    down_resample    "conv" (strided 3x3) or "resnet" (average pooling inside a residual block, as in ADM), per level
    up_resample      "conv" (nearest 2x, 3x3) or "resnet", per level
    downsample_padding  1: symmetric (OpenAI); 0: right and bottom only (Ho, TensorFlow's SAME)
    norm_groups, norm_eps   of every GroupNorm; mid_attention_norm_groups None: the bottom's attention has no norm
    scale_shift      the time embedding scales and shifts the second norm instead of being added before it
    time_dim         width of the time embedding; None: 4 * channels[0]
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
    mid_attention_norm_groups: int | None = 32
    norm_eps: float = 1e-6
    scale_shift: bool = False
    time_dim: int | None = None
    cos_first: bool = False
    freq_shift: float = 1
    num_classes: int | None = None
    dropout: float = 0.0
    mid_scale: float = 1.0
    center_input: bool = False

    def __post_init__(self, head_dim: int | tuple[int, ...] | None) -> None:
        store = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen)
        store("channels", tuple(self.channels))
        if isinstance(self.sample_size, list):
            store("sample_size", tuple(self.sample_size))
        for name in ("layers", "attention", "heads", "down_resample", "up_resample"):
            store(name, self._per_level(name, getattr(self, name)))
        store("up_attention", self._per_level("up_attention", self.attention if self.up_attention is None else self.up_attention))
        store("time_dim", self.time_dim or 4 * self.channels[0])
        if head_dim is not None:
            if set(self.heads) != {1}:
                raise ValueError(f"heads={self.heads} and head_dim={head_dim} were both given: give one of them")
            dims = self._per_level("head_dim", head_dim)
            for c, d, a in zip(self.channels, dims, self.attends, strict=True):
                if a and c % d:
                    raise ValueError(f"a level of {c} channels cannot be split into attention heads of {d}")
            store("heads", tuple(c // d if a else 1 for c, d, a in zip(self.channels, dims, self.attends, strict=True)))
        else:
            store("heads", tuple(h if a else 1 for h, a in zip(self.heads, self.attends, strict=True)))
        self._check()

    def _per_level(self, name: str, value: Any) -> tuple[Any, ...]:
        levels = len(self.channels)
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * levels
        if len(value) != levels:
            raise ValueError(f"{name}={value} has {len(value)} entries, channels={self.channels} has {levels} levels")
        return value

    def _check(self) -> None:
        for c, h, a in zip(self.channels, self.heads, self.attends, strict=True):
            if c % self.norm_groups:
                raise ValueError(f"a level of {c} channels cannot be split into norm_groups={self.norm_groups} equal groups")
            if a and (h < 1 or c % h):
                raise ValueError(f"a level of {c} channels cannot be split into {h} attention heads")
        for name in ("down_resample", "up_resample"):
            if bad := set(getattr(self, name)) - {"conv", "resnet"}:
                raise ValueError(f'{name} has {bad}; expected "conv" or "resnet"')
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding={self.downsample_padding}; expected 0 (right and bottom) or 1 (symmetric)")
        if self.channels[0] % 2:
            raise ValueError(f"channels[0]={self.channels[0]}; the sinusoid needs an even number")

    @property
    def attends(self) -> tuple[bool, ...]:
        """Per level: does any attention run at its width (down, up, or at the bottom)?"""
        both = [bool(d or u) for d, u in zip(self.attention, self.up_attention, strict=True)]  # type: ignore[arg-type]
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
            raise ValueError(f"unknown key {', '.join(unknown)} in the UNet2DModel configuration; known: {', '.join(_DIFFUSERS_DEFAULTS)}")
        d = {**_DIFFUSERS_DEFAULTS, **given}
        for key, supported in _SUPPORTED.items():
            if d[key] not in supported:
                raise ValueError(f"{key}={d[key]!r} is not supported; supported: {', '.join(map(repr, supported))}")
        if not isinstance(d["norm_num_groups"], int):
            raise ValueError(f"norm_num_groups={d['norm_num_groups']!r} is not supported; expected a number of groups")
        down = [_block(name, _DOWN_BLOCKS, d["downsample_type"]) for name in d["down_block_types"]]
        up = [_block(name, _UP_BLOCKS, d["upsample_type"]) for name in reversed(d["up_block_types"])]
        if not len(down) == len(up) == len(d["block_out_channels"]):
            raise ValueError("down_block_types, up_block_types and block_out_channels must have one entry per level")
        mid_groups = d["attn_norm_num_groups"]
        if mid_groups is None and d["resnet_time_scale_shift"] == "default":
            mid_groups = d["norm_num_groups"]
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
            mid_attention_norm_groups=mid_groups,
            norm_eps=d["norm_eps"],
            scale_shift=d["resnet_time_scale_shift"] == "scale_shift",
            time_dim=d["time_embedding_dim"],
            cos_first=d["flip_sin_to_cos"],
            freq_shift=d["freq_shift"],
            num_classes=d["num_class_embeds"],
            dropout=d["dropout"],
            mid_scale=d["mid_block_scale_factor"],
            center_input=d["center_input_sample"],
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The dictionary for diffusers' `unet/config.json`. ValueError where `UNet2DModel` cannot express this network."""
        if len(set(self.layers)) > 1:  # type: ignore[arg-type]
            raise ValueError(f"layers={self.layers}: diffusers has one layers_per_block for all levels")
        heads: tuple[int, ...] = self.heads  # type: ignore[assignment]
        split = [(c, h) for c, h, a in zip(self.channels, heads, self.attends, strict=True) if a]
        head_dims = {c // h for c, h in split}
        single = all(h == 1 for _, h in split)
        if len(head_dims) > 1 and not single:
            raise ValueError(f"heads={heads} at channels={self.channels}: diffusers has one attention_head_dim for all levels")
        if self.mid_attention and not self.scale_shift and self.mid_attention_norm_groups is None:
            raise ValueError("mid_attention_norm_groups=None: diffusers drops this norm only under scale_shift")
        down, down_type = _names(self.attention, self.down_resample, _DOWN_BLOCKS)
        up, up_type = _names(self.up_attention, self.up_resample, _UP_BLOCKS)
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
            layers_per_block=self.layers[0],  # type: ignore[index]
            mid_block_scale_factor=self.mid_scale,
            downsample_padding=self.downsample_padding,
            downsample_type=down_type,
            upsample_type=up_type,
            dropout=self.dropout,
            act_fn="silu",
            attention_head_dim=None if single else head_dims.pop(),
            norm_num_groups=self.norm_groups,
            attn_norm_num_groups=self.mid_attention_norm_groups,
            norm_eps=self.norm_eps,
            resnet_time_scale_shift="scale_shift" if self.scale_shift else "default",
            add_attention=self.mid_attention,
            class_embed_type=None,
            num_class_embeds=self.num_classes,
            num_train_timesteps=None,
        )


def _block(name: str, known: Mapping[str, tuple[bool, str | None]], resample: str) -> tuple[bool, str]:
    """(attention, resampling) of a diffusers block name."""
    name = name.removeprefix("UNetRes")
    if name not in known:
        raise ValueError(f"block type {name!r} is not supported; supported: {', '.join(known)}")
    attention, own = known[name]
    return attention, own or resample


def _names(attention: Any, resample: Any, known: Mapping[str, tuple[bool, str | None]]) -> tuple[list[str], str]:
    """diffusers' block names, and the one resampling type that its attention blocks share."""
    plain, attending, resnet = known
    shared = {r for a, r in zip(attention, resample, strict=True) if a}
    # The last level has no resampling, so a block that would only differ there is free to take either name.
    if len(shared) > 1:
        raise ValueError(f"resampling {resample} at attention {attention}: diffusers has one type for all its attention blocks")
    names = [attending if a else resnet if r == "resnet" else plain for a, r in zip(attention, resample, strict=True)]
    return names, (shared or {"conv"}).pop()


CONFIG_FIELDS = tuple(f.name for f in fields(UNetConfig))
