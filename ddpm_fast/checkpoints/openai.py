"""Networks of OpenAI's improved-diffusion and guided-diffusion (`UNetModel`).

Both have the same names and shapes. The order of the rows of the joint projections differs: see
`key_map.LEGACY_ORDER` and `key_map.NEW_ORDER`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..models.config import UNetConfig
from ..models.unet import UNet
from .key_map import LEGACY_ORDER, NEW_ORDER, Block, Row, build_unet
from .openai_flags import Architecture
from .raw_weights import RawWeights

_NETWORK = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = Block(
    {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
)
_ATTENTION = Block({"norm": "group_norm", "proj_out": "to_out.0"}, qkv="qkv")


def read_architecture(weights: RawWeights) -> Architecture:
    """The architecture of a `UNetModel` by the names and shapes of its tensors.

    Raises:
        ValueError: The tensors are not those of a `UNetModel`.
    """
    if (
        "input_blocks.0.0.weight" in weights
        and "output_blocks.0.0.in_layers.0.weight" not in weights
    ):
        raise ValueError(
            f"{weights.path} has input blocks and no output blocks: a classifier; "
            "expected a diffusion model"
        )
    time_dim, num_channels = weights.shape("time_embed.0.weight", 2)
    groups, updown = _output_levels(weights)
    first = [f"output_blocks.{numbers[0]}" for numbers in groups]
    widths = tuple(weights.shape(f"{block}.0.out_layers.0.weight", 1)[0] for block in first)
    embedded = weights.shape("middle_block.0.emb_layers.1.weight", 2)[0]
    labelled = "label_emb.weight" in weights
    return Architecture(
        widths=widths,
        layers=tuple(len(numbers) - 1 for numbers in groups),
        attention=tuple(f"{block}.1.qkv.weight" in weights for block in first),
        in_channels=weights.shape("input_blocks.0.0.weight", 4)[1],
        out_channels=weights.shape("out.2.weight", 4)[0],
        num_channels=num_channels,
        time_dim=time_dim,
        num_classes=weights.shape("label_emb.weight", 2)[0] if labelled else None,
        scale_shift=embedded == 2 * widths[-1],
        resblock_updown=updown,
    )


def _output_levels(weights: RawWeights) -> tuple[list[list[int]], bool]:
    """(numbers of the output blocks per level, finest first; whether residual blocks upsample)"""
    groups: list[list[int]] = [[]]
    updown = False
    for n in range(weights.count("output_blocks.{}.0.in_layers.0.weight")):
        groups[-1].append(n)
        residual = any(f"output_blocks.{n}.{c}.in_layers.0.weight" in weights for c in (1, 2))
        plain = any(f"output_blocks.{n}.{c}.conv.weight" in weights for c in (1, 2))
        updown = updown or residual
        if residual or plain:
            groups.append([])
    if not all(groups):
        raise ValueError(
            f"{weights.path}: the finest output blocks are missing; check that the file is complete"
        )
    return groups[::-1], updown


def convert_openai(
    weights: RawWeights,
    architecture: Architecture,
    *,
    sample_size: int,
    heads: Sequence[int],
    new_attention_order: bool,
    time_scale: float,
    dropout: float,
) -> UNet:
    """The network with the settings that no weight says.

    Args:
        weights: Of the file.
        architecture: From `read_architecture`.
        sample_size: Training size in pixels.
        heads: Attention heads per level, finest first.
        new_attention_order: OpenAI's use_new_attention_order.
        time_scale: 1000 / T with rescale_timesteps, else 1.
        dropout: Of training; no effect on sampling.
    """
    a = architecture
    config = UNetConfig(
        sample_size=sample_size,
        in_channels=a.in_channels,
        out_channels=a.out_channels,
        channels=a.widths,
        layers=a.layers,
        attention=a.attention,
        heads=tuple(heads),
        down_resample="resnet" if a.resblock_updown else "conv",
        up_resample="resnet" if a.resblock_updown else "conv",
        downsample_padding=1,
        norm_eps=1e-5,
        scale_shift=a.scale_shift,
        time_dim=a.time_dim,
        sinusoid_dim=a.num_channels,
        time_scale=time_scale,
        cos_first=True,
        freq_shift=0,
        num_classes=a.num_classes,
        dropout=dropout,
    )
    return build_unet(
        weights, config, _rows(config), NEW_ORDER if new_attention_order else LEGACY_ORDER
    )


def _rows(config: UNetConfig) -> Iterator[Row]:
    for source, target in _NETWORK.items():
        yield Row(source, target)
    if config.num_classes is not None:
        yield Row("label_emb", "class_embedding", "embedding")
    yield from _input_rows(config)
    for j in range(2):
        yield from _RESIDUAL.rows(f"middle_block.{2 * j}", f"mid_block.resnets.{j}")
    yield from _ATTENTION.rows("middle_block.1", "mid_block.attentions.0")
    yield from _output_rows(config)


def _input_rows(config: UNetConfig) -> Iterator[Row]:
    """Blocks are numbered through all levels, each downsampling included; number 0 is `conv_in`."""
    n = 1
    for i, level in enumerate(config.levels):
        for j in range(level.layers):
            yield from _RESIDUAL.rows(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}")
            if level.attention:
                yield from _ATTENTION.rows(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}")
            n += 1
        if i < len(config.channels) - 1:
            target = f"down_blocks.{i}.downsamplers.0"
            if level.down_resample == "resnet":
                yield from _RESIDUAL.rows(f"input_blocks.{n}.0", target)
            else:
                yield Row(f"input_blocks.{n}.0.op", f"{target}.conv")
            n += 1


def _output_rows(config: UNetConfig) -> Iterator[Row]:
    """The coarsest level first; upsampling is the last child of a level's last block."""
    n = 0
    for k, level in enumerate(reversed(config.levels)):
        for j in range(level.layers + 1):
            yield from _RESIDUAL.rows(f"output_blocks.{n}.0", f"up_blocks.{k}.resnets.{j}")
            if level.up_attention:
                yield from _ATTENTION.rows(f"output_blocks.{n}.1", f"up_blocks.{k}.attentions.{j}")
            n += 1
        if k < len(config.channels) - 1:
            source = f"output_blocks.{n - 1}.{2 if level.up_attention else 1}"
            target = f"up_blocks.{k}.upsamplers.0"
            if level.up_resample == "resnet":
                yield from _RESIDUAL.rows(source, target)
            else:
                yield Row(f"{source}.conv", f"{target}.conv")
