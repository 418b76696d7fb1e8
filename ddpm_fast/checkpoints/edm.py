"""DhariwalUNet of NVlabs/edm, from a plain state dict."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from ..models.config import UNetConfig
from ..models.unet import UNet
from .key_map import EDM_ORDER, Block, Row, build_unet
from .raw_weights import RawWeights

_NETWORK = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
_RESIDUAL = Block(
    {
        "norm0": "norm1",
        "conv0": "conv1",
        "affine": "time_emb_proj",
        "norm1": "norm2",
        "conv1": "conv2",
        "skip": "conv_shortcut",
    }
)
_ATTENTION = Block({"norm2": "group_norm", "proj": "to_out.0"}, qkv="qkv")
_HEAD_CHANNELS = 64
_FULL_GROUPS = 128  # channels from which every norm has 32 groups


def convert_edm(weights: RawWeights, dropout: float) -> UNet:
    """The network inside a preconditioned DhariwalUNet; it takes c_in * x and c_noise.

    Args:
        weights: `net.state_dict()` or `net.model.state_dict()`.
        dropout: Of training; no effect on sampling.
    """
    weights.strip_prefix("model.")
    if "map_layer0.weight" in weights and "out_norm.weight" not in weights:
        raise ValueError(
            f"{weights.path} is a SongUNet (DDPM++ or NCSN++), which is unsupported; expected a "
            "DhariwalUNet: run it as a module with ddpm_fast.Sampler(model, ...)"
        )
    _drop_constants(weights)
    config, size = _config(weights, dropout)
    return build_unet(weights, config, _rows(config, size), EDM_ORDER)


def _drop_constants(weights: RawWeights) -> None:
    """Leaves out the box filters of resampling, and the augmentation, which is zero in sampling."""
    for name, value in weights.items():
        if name.endswith(".resample_filter") and not torch.equal(
            value.float(), torch.full((1, 1, 2, 2), 0.25)
        ):
            raise ValueError(
                f"{weights.path}: {name} is not the filter [1, 1]; other filters are unsupported"
            )
    names = [n for n in weights if n.endswith(".resample_filter") or n == "map_augment.weight"]
    if "map_augment.weight" in names:
        weights.notes.append("map_augment was left out: augmentation labels are 0 in sampling")
    if names:
        weights.rename({name: value for name, value in weights.items() if name not in names})


def _config(weights: RawWeights, dropout: float) -> tuple[UNetConfig, int]:
    """(configuration, size in pixels)"""
    time_dim, sinusoid_dim = weights.shape("map_layer0.weight", 2)
    size = _size(weights)
    sides = [size]
    while sides[-1] > 1 and f"enc.{sides[-1] // 2}x{sides[-1] // 2}_block0.norm0.weight" in weights:
        sides.append(sides[-1] // 2)
    channels = tuple(weights.shape(f"enc.{s}x{s}_block0.norm1.weight", 1)[0] for s in sides)
    if min(channels) < _FULL_GROUPS:
        raise ValueError(
            f"{weights.path} has levels of {min(channels)} channels; expected at least "
            f"{_FULL_GROUPS}: norms of fewer have fewer than 32 groups, which is unsupported"
        )
    labelled = "map_label.weight" in weights
    config = UNetConfig(
        sample_size=size,
        in_channels=weights.shape(f"enc.{size}x{size}_conv.weight", 4)[1],
        out_channels=weights.shape("out_conv.weight", 4)[0],
        channels=channels,
        layers=tuple(weights.count(f"enc.{s}x{s}_block{{}}.norm0.weight") for s in sides),
        attention=tuple(f"enc.{s}x{s}_block0.qkv.weight" in weights for s in sides),
        up_attention=tuple(f"dec.{s}x{s}_block0.qkv.weight" in weights for s in sides),
        head_dim=_HEAD_CHANNELS,
        down_resample="resnet",
        up_resample="resnet",
        downsample_padding=1,
        norm_eps=1e-5,
        scale_shift=True,
        time_dim=time_dim,
        sinusoid_dim=sinusoid_dim,
        cos_first=True,
        freq_shift=0,
        num_classes=weights.shape("map_label.weight", 2)[1] if labelled else None,
        dropout=dropout,
    )
    return config, size


def _size(weights: RawWeights) -> int:
    for name in weights:
        if match := re.fullmatch(r"enc\.(\d{1,5})x\1_conv\.weight", name):
            return int(match[1])
    raise ValueError(
        f"{weights.path}: parameter enc.SIZExSIZE_conv.weight is missing; check --from"
    )


def _rows(config: UNetConfig, size: int) -> Iterator[Row]:
    for source, target in _NETWORK.items():
        yield Row(source, target)
    yield Row(f"enc.{size}x{size}_conv", "conv_in")
    if config.num_classes is not None:
        yield Row("map_label", "class_embedding", "transposed")
    last = len(config.channels) - 1
    for i, level in enumerate(config.levels):
        side = f"{size >> i}x{size >> i}"
        down, up = f"down_blocks.{i}", f"up_blocks.{last - i}"
        for j in range(level.layers):
            yield from _block(f"enc.{side}_block{j}", down, j)
        for j in range(level.layers + 1):
            yield from _block(f"dec.{side}_block{j}", up, j)
        # resampling is named after the level that it leads to
        if i > 0:
            yield from _RESIDUAL.rows(f"enc.{side}_down", f"down_blocks.{i - 1}.downsamplers.0")
        if i < last:
            yield from _RESIDUAL.rows(f"dec.{side}_up", f"up_blocks.{last - i - 1}.upsamplers.0")
    side = f"{size >> last}x{size >> last}"
    yield from _block(f"dec.{side}_in0", "mid_block", 0)
    yield from _RESIDUAL.rows(f"dec.{side}_in1", "mid_block.resnets.1")


def _block(source: str, target: str, j: int) -> Iterator[Row]:
    """A residual block and its attention, which are one module there."""
    yield from _RESIDUAL.rows(source, f"{target}.resnets.{j}")
    yield from _ATTENTION.rows(source, f"{target}.attentions.{j}")
