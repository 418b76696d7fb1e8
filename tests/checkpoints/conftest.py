"""Networks of other codebases, written from their descriptions: plain functions of named tensors.

Every function runs its network. On the first call, `Parameters` creates the tensors that it reads
under the codebase's names, so that a call also makes a state dict.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F


class Parameters(dict):
    """Tensors by name in fp64 with values that fp32 holds exactly; created on demand."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, name, shape, scale=0.3, offset=0.0):
        if name not in self:
            value = torch.randn(shape, generator=self.generator) * scale + offset
            self[name] = value.double()
        return self[name]

    def layer(self, name, *shape):
        fan_in = math.prod(shape[1:])
        return self.take(f"{name}.weight", shape, fan_in**-0.5), self.take(
            f"{name}.bias", shape[:1]
        )

    def state_dict(self):
        return {name: value.float().contiguous() for name, value in self.items()}


def conv(p, name, x, c_out, size=3, **kwargs):
    weight, bias = p.layer(name, c_out, x.shape[1], size, size)
    return F.conv2d(x, weight, bias, **{"padding": size // 2, **kwargs})


def linear(p, name, x, c_out):
    return F.linear(x, *p.layer(name, c_out, x.shape[-1]))


def norm(p, name, x, eps):
    c = x.shape[1]
    weight, bias = p.take(f"{name}.weight", (c,), 0.2, 1.0), p.take(f"{name}.bias", (c,))
    return F.group_norm(x, 32, weight, bias, eps)


def attend(q, k, v):
    """q, k, v [B, heads, D, N] -> the same shape."""
    weights = (q.transpose(-1, -2) @ k / math.sqrt(q.shape[-2])).softmax(-1)
    return v @ weights.transpose(-1, -2)


# ---- Ho et al., in the names of the PyTorch port


def ho_unet(p, x, t, *, ch=32, mult=(1, 2), layers=1, attention=(False, True), out=3):
    half = ch // 2
    angle = t.double()[:, None] * torch.exp(
        -math.log(1e4) * torch.arange(half, dtype=torch.double) / (half - 1)
    )
    temb = linear(p, "temb.dense.0", torch.cat([angle.sin(), angle.cos()], 1), 4 * ch)
    temb = linear(p, "temb.dense.1", F.silu(temb), 4 * ch)

    def residual(name, x, c_out):
        h = conv(p, f"{name}.conv1", F.silu(norm(p, f"{name}.norm1", x, 1e-6)), c_out)
        h = h + linear(p, f"{name}.temb_proj", F.silu(temb), c_out)[:, :, None, None]
        h = conv(p, f"{name}.conv2", F.silu(norm(p, f"{name}.norm2", h, 1e-6)), c_out)
        return h + (x if x.shape[1] == c_out else conv(p, f"{name}.nin_shortcut", x, c_out, 1))

    def attention_block(name, x):
        b, c, h, w = x.shape
        normed = norm(p, f"{name}.norm", x, 1e-6)
        q, k, v = (conv(p, f"{name}.{n}", normed, c, 1).view(b, 1, c, h * w) for n in "qkv")
        return x + conv(p, f"{name}.proj_out", attend(q, k, v).view(b, c, h, w), c, 1)

    x = conv(p, "conv_in", x, ch)
    skips = [x]
    for i, m in enumerate(mult):
        for j in range(layers):
            x = residual(f"down.{i}.block.{j}", x, m * ch)
            x = attention_block(f"down.{i}.attn.{j}", x) if attention[i] else x
            skips.append(x)
        if i < len(mult) - 1:
            name = f"down.{i}.downsample.conv"
            x = conv(p, name, F.pad(x, (0, 1, 0, 1)), m * ch, stride=2, padding=0)
            skips.append(x)
    x = residual("mid.block_1", x, x.shape[1])
    x = residual("mid.block_2", attention_block("mid.attn_1", x), x.shape[1])
    for i, m in reversed(list(enumerate(mult))):
        for j in range(layers + 1):
            x = residual(f"up.{i}.block.{j}", torch.cat([x, skips.pop()], 1), m * ch)
            x = attention_block(f"up.{i}.attn.{j}", x) if attention[i] else x
        if i:
            x = conv(
                p,
                f"up.{i}.upsample.conv",
                x.repeat_interleave(2, 2).repeat_interleave(2, 3),
                m * ch,
            )
    return conv(p, "conv_out", F.silu(norm(p, "norm_out", x, 1e-6)), out)


def tensorflow_variables(state):
    """The port's state dict as variables of Ho's TensorFlow code."""
    variables = {}
    for name, value in state.items():
        *modules, part = name.split(".")
        path = "/".join(modules).replace("temb/dense/", "temb/dense")
        for word in ("down", "up", "block", "attn"):
            path = path.replace(f"{word}/", f"{word}_")
        is_norm = "norm" in modules[-1]
        kind = {"weight": "gamma" if is_norm else "W", "bias": "beta" if is_norm else "b"}[part]
        pointwise = modules[-1] in ("q", "k", "v", "proj_out", "nin_shortcut")
        value = value[:, :, 0, 0] if pointwise and part == "weight" else value
        order = (2, 3, 1, 0) if value.ndim == 4 else tuple(reversed(range(value.ndim)))
        variables[f"model/{path}/{kind}"] = np.ascontiguousarray(value.permute(order).numpy())
    return variables


# ---- OpenAI


def openai_unet(
    p, x, t, y=None, *, ch=32, mult=(1, 2), layers=1, factors=(2,), heads=1, head_channels=None,
    new_order=False, scale_shift=True, updown=False, classes=None, out=6, time_scale=1.0,
):  # fmt: skip
    half = ch // 2
    angle = (t.double() * time_scale)[:, None] * torch.exp(
        -math.log(1e4) * torch.arange(half, dtype=torch.double) / half
    )
    emb = linear(p, "time_embed.0", torch.cat([angle.cos(), angle.sin()], 1), 4 * ch)
    emb = linear(p, "time_embed.2", F.silu(emb), 4 * ch)
    if classes:
        emb = emb + p.take("label_emb.weight", (classes, 4 * ch))[y]

    def residual(name, x, c_out, way=None):
        h = F.silu(norm(p, f"{name}.in_layers.0", x, 1e-5))
        if way == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif way == "up":
            x, h = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (x, h))
        h = conv(p, f"{name}.in_layers.2", h, c_out)
        e = linear(p, f"{name}.emb_layers.1", F.silu(emb), (1 + scale_shift) * c_out)[
            ..., None, None
        ]
        if scale_shift:
            h = norm(p, f"{name}.out_layers.0", h, 1e-5) * (1 + e[:, :c_out]) + e[:, c_out:]
        else:
            h = norm(p, f"{name}.out_layers.0", h + e, 1e-5)
        h = conv(p, f"{name}.out_layers.3", F.silu(h), c_out)
        return h + (x if x.shape[1] == c_out else conv(p, f"{name}.skip_connection", x, c_out, 1))

    def attention_block(name, x):
        b, c, h, w = x.shape
        n = c // head_channels if head_channels else heads
        flat = norm(p, f"{name}.norm", x, 1e-5).flatten(2)
        qkv = F.conv1d(flat, *p.layer(f"{name}.qkv", 3 * c, c, 1))
        axis = 1 if new_order else 2
        parts = qkv.view(b, *((3, n) if new_order else (n, 3)), c // n, h * w).unbind(axis)
        mixed = F.conv1d(attend(*parts).reshape(b, c, h * w), *p.layer(f"{name}.proj_out", c, c, 1))
        return x + mixed.view(b, c, h, w)

    x = conv(p, "input_blocks.0.0", x, int(mult[0] * ch))
    skips, n, factor = [x], 1, 1
    for i, m in enumerate(mult):
        width = int(m * ch)
        for _ in range(layers):
            x = residual(f"input_blocks.{n}.0", x, width)
            x = attention_block(f"input_blocks.{n}.1", x) if factor in factors else x
            skips.append(x)
            n += 1
        if i < len(mult) - 1:
            name = f"input_blocks.{n}.0"
            x = (
                residual(name, x, width, "down")
                if updown
                else conv(p, f"{name}.op", x, width, stride=2)
            )
            skips.append(x)
            n, factor = n + 1, 2 * factor
    x = residual("middle_block.0", x, x.shape[1])
    x = residual("middle_block.2", attention_block("middle_block.1", x), x.shape[1])
    n = 0
    for i, m in reversed(list(enumerate(mult))):
        width = int(m * ch)
        for j in range(layers + 1):
            x = residual(f"output_blocks.{n}.0", torch.cat([x, skips.pop()], 1), width)
            x = attention_block(f"output_blocks.{n}.1", x) if factor in factors else x
            if i and j == layers:
                name = f"output_blocks.{n}.{1 + (factor in factors)}"
                if updown:
                    x = residual(name, x, width, "up")
                else:
                    x = conv(
                        p, f"{name}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), width
                    )
                factor //= 2
            n += 1
    return conv(p, "out.2", F.silu(norm(p, "out.0", x, 1e-5)), out)


# ---- DhariwalUNet of EDM


def edm_unet(
    p, x, t, y=None, *, ch=128, mult=(1, 2), layers=1, size=16, attention=(8,), classes=None, out=3
):
    half = ch // 2
    angle = t.double()[:, None] * 1e-4 ** (torch.arange(half, dtype=torch.double) / half)
    emb = linear(p, "map_layer0", torch.cat([angle.cos(), angle.sin()], 1), 4 * ch)
    emb = linear(p, "map_layer1", F.silu(emb), 4 * ch)
    if classes:
        emb = (
            emb + F.one_hot(y, classes).double() @ p.take("map_label.weight", (4 * ch, classes)).t()
        )
    emb = F.silu(emb)

    def block(name, x, c_out, attends=False, way=None):
        h = F.silu(norm(p, f"{name}.norm0", x, 1e-5))
        if way is not None:
            for part in ("conv0", "skip"):
                p.setdefault(
                    f"{name}.{part}.resample_filter", torch.full((1, 1, 2, 2), 0.25).double()
                )
        if way == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif way == "up":
            x, h = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (x, h))
        h = conv(p, f"{name}.conv0", h, c_out)
        scale, shift = linear(p, f"{name}.affine", emb, 2 * c_out)[..., None, None].chunk(2, 1)
        h = F.silu(norm(p, f"{name}.norm1", h, 1e-5) * (scale + 1) + shift)
        h = conv(p, f"{name}.conv1", h, c_out)
        x = h + (x if x.shape[1] == c_out else conv(p, f"{name}.skip", x, c_out, 1))
        if attends:
            b, c, height, width = x.shape
            qkv = conv(p, f"{name}.qkv", norm(p, f"{name}.norm2", x, 1e-5), 3 * c, 1)
            parts = qkv.view(b, c // 64, 64, 3, height * width).unbind(3)
            x = x + conv(p, f"{name}.proj", attend(*parts).reshape(b, c, height, width), c, 1)
        return x

    skips = []
    for i, m in enumerate(mult):
        r = size >> i
        name = f"enc.{r}x{r}"
        x = (
            block(f"{name}_down", x, x.shape[1], way="down")
            if i
            else conv(p, f"{name}_conv", x, m * ch)
        )
        skips.append(x)
        for j in range(layers):
            x = block(f"{name}_block{j}", x, m * ch, r in attention)
            skips.append(x)
    for i, m in reversed(list(enumerate(mult))):
        r = size >> i
        name = f"dec.{r}x{r}"
        if i == len(mult) - 1:
            x = block(f"{name}_in1", block(f"{name}_in0", x, x.shape[1], True), x.shape[1])
        else:
            x = block(f"{name}_up", x, x.shape[1], way="up")
        for j in range(layers + 1):
            x = block(f"{name}_block{j}", torch.cat([x, skips.pop()], 1), m * ch, r in attention)
    return conv(p, "out_conv", F.silu(norm(p, "out_norm", x, 1e-5)), out)


@pytest.fixture(scope="session")
def networks():
    """Networks of other codebases as functions of (Parameters, x, t, labels)."""
    return SimpleNamespace(
        Parameters=Parameters,
        ho=ho_unet,
        openai=openai_unet,
        edm=edm_unet,
        tensorflow_variables=tensorflow_variables,
    )
