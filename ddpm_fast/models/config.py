"""Configuration of a DDPM UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.validation import is_count, shown
from .diffusers_format import arguments_from_diffusers, to_diffusers
from .limits import FIELDS, WIDTHS
from .own_format import MODEL, arguments_from_own, to_own


class LevelConfig(NamedTuple):
    """One level of a `UNetConfig`."""

    channels: int
    layers: int
    attention: bool
    up_attention: bool
    heads: int
    down_resample: str
    up_resample: str


@dataclass(frozen=True)
class UNetConfig:
    """Configuration of a `UNet`. Defaults: the CIFAR-10 network of Ho et al. 2020.

    Per-level fields are tuples, finest level (0) first; a scalar applies to all levels.

    Args:
        sample_size: Training size in pixels, one number or (H, W), or None; other sizes run too.
        in_channels, out_channels: Channels of the input and the output.
        channels: Width of each level.
        layers: Residual blocks per level on the way down; the way up has one more.
        attention: Per level, self-attention after each residual block on the way down.
        up_attention: Likewise on the way up; None: `attention`.
        mid_attention: Self-attention at the bottom.
        heads: Attention heads per level; the bottom uses the last. Give `heads` or `head_dim`.
        head_dim: Channels per head and level; stored as `heads`.
        down_resample: Per level, "conv" (strided 3x3) or "resnet" (average pooling in a residual
            block, as in ADM); the coarsest level has none.
        up_resample: Per level, "conv" (nearest 2x, 3x3) or "resnet"; the finest level has none.
        downsample_padding: 1: symmetric (OpenAI); 0: right and bottom (Ho et al., SAME padding).
        norm_groups, norm_eps: Of every GroupNorm.
        mid_norm_groups: Of the attention at the bottom; None: `norm_groups`; 0: no norm there.
        scale_shift: The time embedding scales and shifts the second norm, instead of an addition
            before it.
        time_dim: Width of the time embedding; 0: 4 * channels[0].
        cos_first: The sinusoid starts with its cosines.
        freq_shift: The frequencies of the sinusoid are 1e4^(-i / (half - freq_shift)).
        time_scale: The sinusoid is that of time_scale * t: 1000 / T for OpenAI's
            `rescale_timesteps`.
        sinusoid_dim: Width of the sinusoid; 0: channels[0].
        num_classes: Size of the class embedding, which is added to the time embedding; None:
            unconditional.
        dropout: Probability of dropout in the residual blocks.
        mid_scale: Divisor of the outputs at the bottom.
        center_input: The network receives 2 x - 1.

    Bounds: sample_size 16,384 per side; in_channels and out_channels 4,096; 16 levels of up to
    16,384 channels and 128 layers each; time_dim and sinusoid_dim 65,536; time_scale 1e-6
    to 1e6; num_classes 1,000,000; norm_eps 1e-12 to 1; freq_shift 0 to below sinusoid_dim / 2;
    dropout 0 to below 1; mid_scale 1e-6 to 1e6.

    Raises:
        ValueError: A value has another type or is out of bounds, or a combination is invalid.
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
    time_scale: float = 1.0
    sinusoid_dim: int = 0
    num_classes: int | None = None
    dropout: float = 0.0
    mid_scale: float = 1.0
    center_input: bool = False

    def __post_init__(self, head_dim: int | tuple[int, ...] | None) -> None:
        expected, fits = WIDTHS  # first: every per-level field is expanded to this length
        if not fits(self.channels):
            raise ValueError(f"channels={shown(self.channels)}; expected {expected}")
        self._store("channels", tuple(self.channels))
        if isinstance(self.sample_size, list):
            self._store("sample_size", tuple(self.sample_size))
        if self.up_attention is None:
            self._store("up_attention", self.attention)
        for name in LevelConfig._fields[1:]:
            self._store(name, self._per_level(name, getattr(self, name)))
        if self.time_dim == 0:
            self._store("time_dim", 4 * self.channels[0])
        if self.sinusoid_dim == 0:
            self._store("sinusoid_dim", self.channels[0])
        if self.mid_norm_groups is None:
            self._store("mid_norm_groups", self.norm_groups)
        if head_dim is not None:
            if any(heads != 1 for heads in self.levels_of("heads")):
                raise ValueError(
                    f"heads={shown(self.heads)} and head_dim={shown(head_dim)} were both given: "
                    "give one of them"
                )
            self._store("heads", tuple(self._split(head_dim)))
        # unused fields get one value, so that equal networks have equal configurations
        heads = zip(self.levels_of("heads"), self.attends, strict=True)
        self._store("heads", tuple(h if attends else 1 for h, attends in heads))
        self._store("down_resample", (*self.levels_of("down_resample")[:-1], "conv"))
        self._store("up_resample", ("conv", *self.levels_of("up_resample")[1:]))
        self._check()

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen after construction

    def _per_level(self, name: str, value: Any) -> tuple[Any, ...]:
        levels = len(self.channels)
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * levels
        if len(value) != levels:
            raise ValueError(
                f"{name}={shown(value)} has {len(value)} entries; expected {levels}, one per level "
                f"of channels={self.channels}"
            )
        return value

    def _split(self, head_dim: int | tuple[int, ...]) -> Iterator[int]:
        for c, d, attends in zip(
            self.channels, self._per_level("head_dim", head_dim), self.attends, strict=True
        ):
            if attends and (not is_count(d) or c % d):
                raise ValueError(
                    f"a level of {c} channels cannot be split into attention heads of {shown(d)}"
                )
            yield c // d if attends else 1

    def _check(self) -> None:
        for name, (expected, fits) in FIELDS.items():
            if not fits(value := getattr(self, name)):
                raise ValueError(f"{name}={shown(value)}; expected {expected}")
        for level, attends in zip(self.levels, self.attends, strict=True):
            if level.channels % self.norm_groups:
                raise ValueError(
                    f"a level of {level.channels} channels cannot be split into "
                    f"norm_groups={self.norm_groups} equal groups"
                )
            if attends and level.channels % level.heads:
                raise ValueError(
                    f"a level of {level.channels} channels cannot be split into {level.heads} "
                    "attention heads"
                )
        if self.mid_attention and self.mid_norm_groups and self.channels[-1] % self.mid_norm_groups:
            raise ValueError(
                f"mid_norm_groups={self.mid_norm_groups}; expected a divisor of the "
                f"{self.channels[-1]} channels of the coarsest level"
            )
        if self.sinusoid_dim % 2:
            raise ValueError(
                f"sinusoid_dim={self.sinusoid_dim}, by default channels[0]; expected an even number"
            )
        if self.freq_shift >= self.sinusoid_dim // 2:  # the frequencies divide by the difference
            raise ValueError(
                f"freq_shift={self.freq_shift}; expected below {self.sinusoid_dim // 2}, "
                "half of sinusoid_dim"
            )

    def levels_of(self, name: str) -> tuple[Any, ...]:
        """A per-level field, typed as a tuple."""
        return getattr(self, name)

    @property
    def levels(self) -> list[LevelConfig]:
        """The levels, finest first."""
        return [
            LevelConfig(*values)
            for values in zip(*map(self.levels_of, LevelConfig._fields), strict=True)
        ]

    @property
    def attends(self) -> tuple[bool, ...]:
        """Per level, True if it has attention on the way down, on the way up, or at the bottom."""
        levels = zip(self.levels_of("attention"), self.levels_of("up_attention"), strict=True)
        either = [down or up for down, up in levels]
        return (*either[:-1], either[-1] or self.mid_attention)

    @property
    def size(self) -> tuple[int, int] | None:
        """`sample_size` as (H, W)."""
        size = self.sample_size
        return (size, size) if isinstance(size, int) else size

    def check_call(
        self,
        x_t: Tensor,
        labels: Tensor | None,
        t: Tensor | None = None,
        timesteps: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Validates the arguments of a call of this network.

        Args:
            x_t: [B, C, H, W], with H and W divisible by 2^(levels - 1).
            labels: [B]; None if and only if the network is unconditional.
            t: integers [B]; checked if `timesteps` is given.
            timesteps: T. If given, t must be in 0 ... T-1 and labels in 0 ... num_classes-1. This
                check reads their values, which synchronizes with the device.
            size: (H, W) that an engine was built for; None: any.

        Raises:
            ValueError: An argument has the wrong shape, type or range, or labels are missing or not
                expected.
        """
        coarsest = 2 ** (len(self.channels) - 1)
        b, *shape = x_t.shape if x_t.ndim == 4 else (0, 0, 0, 0)
        if (
            shape[0] != self.in_channels
            or shape[1] % coarsest
            or shape[2] % coarsest
            or size not in (None, tuple(shape[1:]))
        ):
            sides = f"H and W divisible by {coarsest}" if size is None else f"(H, W) = {size}"
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}; expected [B, {self.in_channels}, H, W] "
                f"with {sides}"
            )
        classes = self.num_classes
        if (labels is None) != (classes is None):
            expected = (
                "no labels: the network is unconditional"
                if classes is None
                else f"labels [B] in 0..{classes - 1}"
            )
            raise ValueError(
                f"labels {'missing' if labels is None else 'given'}; expected {expected}"
            )
        if labels is not None and labels.shape != (b,):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected [{b}], one per image"
            )
        if timesteps is not None:
            for name, values, stop in (("t", t, timesteps), ("labels", labels, classes or 1)):
                if values is not None:
                    check_integers(name, values, b, stop)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Configuration from the dictionary in diffusers' `unet/config.json` (`UNet2DModel`).

        A missing key takes diffusers' default; keys that start with "_" are metadata.

        Raises:
            ValueError: A key is unknown, or a value is invalid or not implemented by `UNet`.
        """
        return cls(**arguments_from_diffusers(config))

    def to_diffusers(self) -> dict[str, Any]:
        """Returns the dictionary for diffusers' `unet/config.json`.

        Different numbers of residual blocks per level make `layers_per_block` a list, which only
        ddpm_fast reads.

        Raises:
            ValueError: `UNet2DModel` cannot express this network.
        """
        return to_diffusers(asdict(self), self.attends)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNetConfig:
        """From the content of a folder's config.json, of diffusers' class or of this package's.

        ValueError as in `from_diffusers`; in this package's format, every field must be given.
        """
        if config.get("_class_name") == MODEL:
            return cls(**arguments_from_own(config, [field.name for field in fields(cls)]))
        return cls.from_diffusers(config)

    def to_config(self) -> dict[str, Any]:
        """The content of config.json: diffusers' where `UNet2DModel` can express this network."""
        try:
            return self.to_diffusers()
        except ValueError:
            return to_own(asdict(self))


def check_integers(name: str, values: Tensor, count: int, stop: int) -> None:
    """Raises ValueError unless `values` are integers [count] in 0..stop-1."""
    invalid = (
        values.shape != (count,)
        or values.is_floating_point()
        or values.is_complex()
        or values.dtype == torch.bool
    )
    # .long(): torch casts `stop` to the type of `values`, in which it may overflow
    if invalid or bool(((values < 0) | (values.long() >= stop)).any()):
        seen = "" if invalid or not count else f" in {values.min()}..{values.max()}"
        raise ValueError(
            f"{name}: {values.dtype} {tuple(values.shape)}{seen}; expected integers [{count}] "
            f"in 0..{stop - 1}"
        )
