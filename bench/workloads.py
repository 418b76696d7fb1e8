"""Networks of the benchmarks, and the folders of results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from ddpm_fast import Checkpoint, NoiseSchedule, UNet, UNetConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"  # committed
OUT = Path("bench-results")  # in the current folder, ignored by git
WEIGHTS = ROOT / "weights" / "fashion-mnist-32"  # part of the repository


def fashion_mnist() -> UNetConfig:
    """The network of `WEIGHTS`."""
    return UNetConfig.from_diffusers(json.loads((WEIGHTS / "unet" / "config.json").read_text()))


NETWORKS: dict[str, UNetConfig] = {
    "cifar10": UNetConfig(),  # Ho et al. 2020
    "celebahq256": UNetConfig(
        sample_size=256,
        channels=(128, 128, 256, 256, 512, 512),
        attention=(False, False, False, False, True, False),
    ),
    "improved_cifar10": UNetConfig(  # Nichol & Dhariwal 2021
        out_channels=6,
        layers=3,
        attention=(False, True, True, False),
        head_dim=64,
        scale_shift=True,
        downsample_padding=1,
        cos_first=True,
        freq_shift=0,
        norm_eps=1e-5,
    ),
    "fashion_mnist": fashion_mnist(),
}

TINY_UNET = UNetConfig(
    sample_size=8, channels=(16, 32), layers=1, attention=(False, True), norm_groups=8
)


def scaled(config: UNetConfig, channels: int) -> UNetConfig:
    """The config with all channels in proportion to `channels` of the first level."""
    return replace(
        config, channels=tuple(c * channels // config.channels[0] for c in config.channels)
    )


def random_checkpoint(config: UNetConfig) -> Checkpoint:
    """A network with random weights, on which times do not depend, and the linear schedule."""
    torch.manual_seed(0)
    return Checkpoint(UNet(config).eval().requires_grad_(False), NoiseSchedule.linear())
