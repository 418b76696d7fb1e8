"""DDPM network in plain PyTorch (Ho et al. 2020, appendix B; Nichol & Dhariwal 2021, section 3).

It is the reference of the engines. Its parameters have the names of diffusers' `UNet2DModel`, so
each of the two loads the other's weights with strict=True.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig


def timestep_embedding(
    t: Tensor, dim: int, *, cos_first: bool, freq_shift: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sinusoidal embedding with dim / 2 frequencies from 1 to 1e-4 (Vaswani et al. 2017, 3.5).

    Args:
        t: Timesteps [B], integer or floating.
        dim: Width of the embedding, even.
        cos_first: Cosines first, then sines.
        freq_shift: Frequency i is 1e4^(-i / (dim / 2 - freq_shift)).
        dtype: Of the computation and the result.

    Returns:
        [B, dim].
    """
    half = dim // 2
    frequency = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=dtype, device=t.device) / (half - freq_shift)
    )
    angle = t.to(dtype)[:, None] * frequency
    halves = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(halves, dim=1)


class TimeEmbedding(nn.Module):
    """linear_2(SiLU(linear_1(sinusoid))): [B, channels] -> [B, dim]."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


def norm_silu(
    norm: nn.GroupNorm, x: Tensor, time: Tensor | None = None, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns (SiLU(norm(x + time)), x) for time [B, C] or None; SiLU is optional.

    x is returned for the residual path, so that a fused form can add both gradients of x.
    """
    y = norm(x if time is None else x + time[:, :, None, None])
    return F.silu(y) if silu else y, x


class ResBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + time))), with optional resampling before conv1.

    x [B, C_in, H, W], temb [B, time_dim] after SiLU -> [B, C_out, H', W'].
    """

    def __init__(
        self, c: UNetConfig, c_in: int, c_out: int, resample: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.resample, self.scale, self.scale_shift = resample, scale, c.scale_shift
        self.norm_silu = norm_silu
        self.norm1 = nn.GroupNorm(c.norm_groups, c_in, c.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c.time_dim, 2 * c_out if c.scale_shift else c_out)
        self.norm2 = nn.GroupNorm(c.norm_groups, c_out, c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h, x = self.norm_silu(self.norm1, x)
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = upsample_nearest(x), upsample_nearest(h)
        h = self.conv1(h)
        time = self.time_emb_proj(temb)
        if self.scale_shift:
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            h, _ = self.norm_silu(self.norm2, h, silu=False)
            h = F.silu(h * (1 + scale) + shift)
        else:
            h, _ = self.norm_silu(self.norm2, h, time)
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.scale if self.scale != 1 else x + h


class Attention(nn.Module):
    """Self-attention over pixels, x + to_out(softmax(q k^T / sqrt(d)) v); q, k, v of norm(x)."""

    def __init__(
        self, channels: int, heads: int, groups: int | None, eps: float, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.mix: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention
        self.norm_silu = norm_silu
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed, x = (
            self.norm_silu(self.group_norm, x, silu=False)
            if self.group_norm is not None
            else (x, x)
        )
        pixels = normed.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (
            project(pixels)
            .view(b, h * w, self.heads, c // self.heads)
            .transpose(1, 2)  # [B, heads, HW, C / heads]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = self.mix(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        x = x + self.to_out[0](mixed).transpose(1, 2).view(b, c, h, w)
        return x / self.scale if self.scale != 1 else x


def upsample_nearest(x: Tensor) -> Tensor:
    """Each pixel becomes a 2x2 block."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Strided 3x3 convolution: [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))  # right and bottom: TensorFlow's SAME, as in Ho et al.
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest 2x, then a 3x3 convolution: [B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))


class Level(nn.Module):
    """Residual blocks of one level, each followed by attention if the level has it; resampling."""

    def __init__(
        self, c: UNetConfig, inputs: list[int], c_out: int, attends: bool, heads: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c, c_in, c_out) for c_in in inputs)
        if attends:
            self.attentions = nn.ModuleList(
                Attention(c_out, heads, c.norm_groups, c.norm_eps) for _ in inputs
            )
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def block(self, j: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[j](x, temb)
        return self.attentions[j](x) if hasattr(self, "attentions") else x

    def down(self, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Appends every output to `skips`."""
        for j in range(len(self.resnets)):
            x = self.block(j, x, temb)
            skips.append(x)
        if self.downsamplers is not None:
            x = _resample(self.downsamplers[0], x, temb)
            skips.append(x)
        return x

    def up(self, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Every block reads one of `skips`, concatenated along the channels."""
        for j in range(len(self.resnets)):
            x = self.block(j, torch.cat([x, skips.pop()], dim=1), temb)
        return _resample(self.upsamplers[0], x, temb) if self.upsamplers is not None else x


def _resample(layer: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    return layer(x, temb) if isinstance(layer, ResBlock) else layer(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        width = c.channels[-1]
        self.resnets = nn.ModuleList(ResBlock(c, width, width, scale=c.mid_scale) for _ in range(2))
        self.attentions = nn.ModuleList()
        if c.mid_attention:
            self.attentions.append(
                Attention(
                    width, c.levels[-1].heads, c.mid_norm_groups or None, c.norm_eps, c.mid_scale
                )
            )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, temb)


class UNet(nn.Module):
    """UNet: eps_theta(x_t, t), or another prediction; see `UNetConfig` for its variants.

    Args:
        config: The configuration.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.norm_silu = norm_silu
        self.conv_in = nn.Conv2d(c.in_channels, c.channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(c.sinusoid_dim, c.time_dim)
        if c.num_classes is not None:
            self.class_embedding = nn.Embedding(c.num_classes, c.time_dim)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        levels, width = c.levels, c.channels[0]
        skips = [width]  # channels of the skip connections
        for i, at in enumerate(levels):
            level = Level(
                c, [width] + [at.channels] * (at.layers - 1), at.channels, at.attention, at.heads
            )
            skips += [at.channels] * at.layers
            if i < len(levels) - 1:
                plain = at.down_resample == "conv"
                down = (
                    Downsample(at.channels, c.downsample_padding)
                    if plain
                    else ResBlock(c, at.channels, at.channels, "down")
                )
                level.downsamplers = nn.ModuleList([down])
                skips.append(at.channels)
            self.down_blocks.append(level)
            width = at.channels
        self.mid_block = Middle(c)
        for i, at in reversed(list(enumerate(levels))):
            widths = [width] + [at.channels] * at.layers
            level = Level(
                c, [w + skips.pop() for w in widths], at.channels, at.up_attention, at.heads
            )
            if i > 0:
                up = (
                    Upsample(at.channels)
                    if at.up_resample == "conv"
                    else ResBlock(c, at.channels, at.channels, "up")
                )
                level.upsamplers = nn.ModuleList([up])
            self.up_blocks.append(level)
            width = at.channels
        self.conv_norm_out = nn.GroupNorm(c.norm_groups, c.channels[0], c.norm_eps)
        self.conv_out = nn.Conv2d(c.channels[0], c.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, x_t: Tensor, t: Tensor | int | float, labels: Tensor | None = None) -> Tensor:
        """Computes the prediction.

        Args:
            x_t: Noisy images [B, C, H, W], floating, with H and W divisible by 2^(levels - 1).
            t: Timesteps, [B] or one number, integer or floating.
            labels: Classes int64 [B], if the network is class-conditional.

        Returns:
            [B, C_out, H, W] in the dtype of the weights.

        Raises:
            ValueError: An argument is invalid (`UNetConfig.check_call`).
        """
        self.config.check_call(x_t, labels)
        x = x_t.to(self.dtype)
        x = self.conv_in(2 * x - 1 if self.config.center_input else x)
        temb = F.silu(self.embed(torch.as_tensor(t, device=x.device).expand(x.shape[0]), labels))
        skips = [x]
        for level in cast("list[Level]", self.down_blocks):
            x = level.down(x, temb, skips)
        x = self.mid_block(x, temb)
        for level in cast("list[Level]", self.up_blocks):
            x = level.up(x, temb, skips)
        return self.conv_out(self.norm_silu(self.conv_norm_out, x)[0])

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Embedding of (t, label) before the SiLU of the residual blocks: [B, time_dim]."""
        c = self.config
        # half precision does not resolve adjacent timesteps
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        sinusoid = timestep_embedding(
            t if c.time_scale == 1 else t.to(dtype) * c.time_scale,
            c.sinusoid_dim,
            cos_first=c.cos_first,
            freq_shift=c.freq_shift,
            dtype=dtype,
        )
        emb = self.time_embedding(sinusoid.to(self.dtype))
        return emb if labels is None else emb + self.class_embedding(labels)


def channels_last(unet: UNet) -> UNet:
    """Changes the weights of the convolutions to channels-last, in place; activations follow."""
    for p in unet.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return unet
