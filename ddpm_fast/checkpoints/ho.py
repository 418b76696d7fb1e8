"""Networks of Ho et al. 2020: the TensorFlow code, and its PyTorch port (pesser/pytorch_diffusion).

The port's names are the map's; variables of TensorFlow are renamed to them first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from ..models.config import UNetConfig
from ..models.unet import UNet
from .key_map import Block, Row, build_unet
from .raw_weights import RawWeights

_NETWORK = {
    "conv_in": "conv_in",
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RESIDUAL = Block(
    {
        "norm1": "norm1",
        "conv1": "conv1",
        "temb_proj": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "nin_shortcut": "conv_shortcut",
    }
)
_ATTENTION = Block(
    {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
)
_AVERAGED = "/ExponentialMovingAverage"
_OPTIMIZER = re.compile(
    r".*/(Adam|Adam_1|Momentum|RMSProp|RMSProp_1)$|(.*/)?(beta[12]_power|global_step)$"
)
_TF_PARTS = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}


def convert_ho(weights: RawWeights, sample_size: int, dropout: float) -> UNet:
    """The network in a `.ckpt` of the port, or in an `.npz` of the TensorFlow variables.

    Args:
        weights: Averaged copies of TensorFlow's variables are taken where there are any.
        sample_size: Training size in pixels.
        dropout: Of training; no effect on sampling.
    """
    if any("/" in name for name in weights):
        _rename_variables(weights)
    config = _config(weights, sample_size, dropout)
    return build_unet(weights, config, _rows(config))


def _rename_variables(weights: RawWeights) -> None:
    """Renames and transposes TensorFlow's variables: [H, W, C_in, C_out] and [C_in, C_out]."""
    variables = {name.removesuffix(":0"): value for name, value in weights.items()}
    network = {name: v for name, v in variables.items() if not _OPTIMIZER.fullmatch(name)}
    if others := len(variables) - len(network):
        weights.notes.append(f"{others} variables of the optimizer were left out")
    averaged = {
        name.removesuffix(_AVERAGED): v for name, v in network.items() if name.endswith(_AVERAGED)
    }
    raw = {name: v for name, v in network.items() if not name.endswith(_AVERAGED)}
    if averaged and raw and set(averaged) != set(raw):
        name = sorted(set(averaged) ^ set(raw))[0]
        raise ValueError(
            f"{weights.path}: {name} is not stored both with and without {_AVERAGED}; "
            "store all variables, or the averaged ones only"
        )
    weights.notes.append(
        "the averaged variables (EMA) were taken"
        if averaged
        else "no averaged variables (EMA) are stored: the raw ones were taken"
    )
    chosen = averaged or raw
    renamed = {_port_name(weights, name): _transposed(v) for name, v in chosen.items()}
    if len(variables) != len(weights) or len(renamed) != len(chosen):
        raise ValueError(f"{weights.path} holds a variable under two names; store each once")
    weights.rename(renamed)


def _port_name(weights: RawWeights, variable: str) -> str:
    """model/down_0/block_1/conv1/W -> down.0.block.1.conv1.weight"""
    *modules, part = variable.removeprefix("model/").split("/")
    if part not in _TF_PARTS:
        raise ValueError(
            f"{weights.path}: variable {variable:.100} is unknown; expected W, b, gamma or beta "
            "of a layer: store the network's variables only"
        )
    name = ".".join([*modules, _TF_PARTS[part]])
    name = re.sub(r"^(down|up)_(\d+)\.((block|attn)_(\d+))?", _numbered, name)
    return re.sub(r"^temb\.dense(\d)", r"temb.dense.\1", name)


def _numbered(match: re.Match[str]) -> str:
    way, level, _, kind, index = match.groups()
    return f"{way}.{level}." + (f"{kind}.{index}" if kind else "")


def _transposed(value: Tensor) -> Tensor:
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t() if value.ndim == 2 else value


def _config(weights: RawWeights, sample_size: int, dropout: float) -> UNetConfig:
    time_dim, sinusoid_dim = weights.shape("temb.dense.0.weight", 2)
    levels = range(weights.count("down.{}.block.0.norm1.weight"))
    return UNetConfig(
        sample_size=sample_size,
        in_channels=weights.shape("conv_in.weight", 4)[1],
        out_channels=weights.shape("conv_out.weight", 4)[0],
        channels=tuple(weights.shape(f"down.{i}.block.0.norm2.weight", 1)[0] for i in levels),
        layers=tuple(weights.count(f"down.{i}.block.{{}}.norm1.weight") for i in levels),
        attention=tuple(f"down.{i}.attn.0.q.weight" in weights for i in levels),
        up_attention=tuple(f"up.{i}.attn.0.q.weight" in weights for i in levels),
        mid_attention="mid.attn_1.q.weight" in weights,
        sinusoid_dim=sinusoid_dim,
        time_dim=time_dim,
        dropout=dropout,
    )


def _rows(config: UNetConfig) -> Iterator[Row]:
    for source, target in _NETWORK.items():
        yield Row(source, target)
    for i, level in enumerate(config.levels):
        down, up = f"down_blocks.{i}", f"up_blocks.{len(config.channels) - 1 - i}"
        for j in range(level.layers):
            yield from _RESIDUAL.rows(f"down.{i}.block.{j}", f"{down}.resnets.{j}")
            yield from _ATTENTION.rows(f"down.{i}.attn.{j}", f"{down}.attentions.{j}")
        for j in range(level.layers + 1):
            yield from _RESIDUAL.rows(f"up.{i}.block.{j}", f"{up}.resnets.{j}")
            yield from _ATTENTION.rows(f"up.{i}.attn.{j}", f"{up}.attentions.{j}")
        yield Row(f"down.{i}.downsample.conv", f"{down}.downsamplers.0.conv")
        yield Row(f"up.{i}.upsample.conv", f"{up}.upsamplers.0.conv")
    for j in range(2):
        yield from _RESIDUAL.rows(f"mid.block_{j + 1}", f"mid_block.resnets.{j}")
    yield from _ATTENTION.rows("mid.attn_1", "mid_block.attentions.0")
