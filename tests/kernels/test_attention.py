"""Folded and multi-head attention over pixels: `kernels.attention`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.kernels._gemm import Target, choose_tiles, divisor
from ddpm_fast.kernels.attention import (
    FoldedAttention,
    MultiHeadAttention,
    attention_reference,
    fold,
)
from ddpm_fast.kernels.conv1x1 import Conv1x1
from ddpm_fast.models import unet
from ddpm_fast.testing import (
    DAMAGES,
    Damaged,
    assert_as_accurate,
    assert_operation,
    assert_same_in_any_batch,
    map_of,
    operand_types,
    poisoned,
    run_twice,
    spread,
)

SCALE = 0.7071  # of the residual


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def pixels_first(x):
    """[N, C, H, W] -> [N, P, C]"""
    return x.flatten(2).transpose(1, 2)


class Heads:
    """Case of multi-head attention: qkv [N, 3 C, H, W]."""

    def __init__(self, n, heads, dim, h, w, dtype, device, sharpness=1.0):
        self.c = c = heads * dim
        qkv = normal(n, 3 * c, h, w)
        qkv[:, : 2 * c] *= sharpness**0.5
        self.qkv, self.heads = qkv.to(device, dtype), heads
        self.op = MultiHeadAttention(heads, Target.of(torch.device(device)))

    def arguments(self, images=slice(None)):
        return dict(qkv=map_of(self.qkv[images], bordered=False))

    def out(self, images=5):
        n, _, h, w = self.qkv.shape
        return poisoned(min(n, images), h, w, self.c, self.qkv.dtype, self.qkv.device)

    def reference(self, dtype):
        q, k, v = pixels_first(self.qkv.to(dtype)).chunk(3, dim=2)
        y = attention_reference(q, k, v, self.heads, (self.c // self.heads) ** -0.5)
        return y.transpose(1, 2).unflatten(2, self.qkv.shape[2:])

    def check(self, op=None, **options):
        assert_operation(op or self.op, self.out(), self.reference, **self.arguments(), **options)


class Folded(Heads):
    """Case of folded attention: one head, with output projection and residual."""

    def __init__(self, n, heads, dim, h, w, dtype, device, sharpness=1.0):
        assert heads == 1
        self.c = c = dim
        make = lambda scale, *shape, seed: normal(*shape, seed=seed, scale=scale).to(device, dtype)
        self.q, self.x = (make(sharpness**0.5, n, c, h, w, seed=s) for s in (0, 1))
        self.residual, self.weight = make(1, n, c, h, w, seed=2), make(c**-0.5, c, c, seed=3)
        target, bias = Target.of(torch.device(device)), make(1, c, seed=4)
        self.op = FoldedAttention.of(self.weight, bias, dtype, target, residual_scale=SCALE)

    def arguments(self, images=slice(None)):
        dense = {name: map_of(getattr(self, name)[images], bordered=False) for name in ("q", "x")}
        return dense | dict(residual=map_of(self.residual[images]))

    def out(self, images=5):
        n, c, h, w = self.x.shape
        return poisoned(min(n, images), h, w, c, self.x.dtype, self.x.device)

    def reference(self, dtype):
        q, x = (pixels_first(v.to(dtype)) for v in (self.q, self.x))
        y = attention_reference(q, x, x, 1, self.c**-0.5)
        y = F.linear(y, self.weight.to(dtype), self.op.bias.to(dtype))
        return y.transpose(1, 2).unflatten(2, self.x.shape[2:]) + SCALE * self.residual.to(dtype)


# (images, heads, channels per head, height, width)
FOLDED = [(2, 1, 16, 4, 4), (1, 1, 24, 5, 7), (3, 1, 48, 7, 7), (2, 1, 64, 5, 7)]
HEADS = [(2, 2, 16, 5, 7), (1, 4, 24, 4, 4), (3, 2, 48, 7, 7), (2, 3, 64, 5, 7)]
LARGE_FOLDED = [(1, 1, 256, 7, 7), (1, 1, 256, 16, 16), (1, 1, 512, 4, 4), (1, 1, 512, 5, 7)]
LARGE_HEADS = [(1, 1, 256, 5, 7), (1, 2, 64, 16, 16), (1, 1, 16, 16, 16), (1, 1, 512, 4, 4)]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", operand_types(), ids=str)
@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_folded(case, dtype, device):
    Folded(*case, dtype, device).check()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", operand_types(), ids=str)
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads(case, dtype, device):
    Heads(*case, dtype, device).check()


@pytest.mark.kernel
@pytest.mark.parametrize(("case", "dtype"), spread([*LARGE_FOLDED, (1, 1, 16, 1, 40)]), ids=str)
def test_large_folded(case, dtype, device):
    Folded(*case, dtype, device).check()


@pytest.mark.kernel
@pytest.mark.parametrize(("case", "dtype"), spread([*LARGE_HEADS, (2, 1, 64, 1, 1)]), ids=str)
def test_large_heads(case, dtype, device):
    Heads(*case, dtype, device).check()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", operand_types(), ids=str)
@pytest.mark.parametrize("kind", [Folded, Heads])
def test_very_large_logits(kind, dtype, device):
    """exp of the logits overflows fp32, but the softmax is finite: it selects one key.

    The operands are integers, so the logits are exact.
    """
    case = kind(2, 1, 64, 5, 7, dtype, device)
    names = ("q", "x") if kind is Folded else ("qkv",)
    for name in names:
        x = getattr(case, name)
        x.copy_((x.float() * 24).round().clamp(-60, 60))
    q, k = (
        pixels_first(v.double())
        for v in ((case.q, case.x) if kind is Folded else case.qkv.split(64, dim=1)[:2])
    )
    logits = q @ k.transpose(1, 2) / 8
    assert logits.amax() > 1000 and logits.amin() < -1000
    assert logits.float().exp().isinf().any()
    out, exact = case.out(), case.reference(torch.float64)
    run_twice(case.op, out, **case.arguments())
    # compared with fp64: PyTorch in half precision rounds the logits and may select another key
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
    assert (out.pixels.double() - exact).abs().max() <= 4 * step * exact.abs().max()


# ---- the whole layer


def layer(c, heads, scale=1.0):
    torch.manual_seed(0)
    module = unet.Attention(c, heads, None, 1e-6, scale).double()
    for p in module.parameters():  # large enough for an uneven softmax and visible biases
        torch.nn.init.normal_(p, std=1.0 if p.ndim == 1 else 1.5 * c**-0.5)
    return module.requires_grad_(False)


def projections(layer):
    return tuple((p.weight, p.bias) for p in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]))


@pytest.mark.parametrize(("c", "scale"), [(16, 1.0), (48, 2**0.5), (96, 1.0)])
def test_fold_is_the_four_projections(c, scale):
    module, x = layer(c, 1, scale), normal(2, c, 5, 7).double()
    (m, m_bias), (v, v_bias) = fold(*projections(module))
    q = torch.einsum("kc,nchw->nkhw", m, x) + m_bias[:, None, None]
    out = poisoned(2, 5, 7, c, torch.float64, "cpu")
    op = FoldedAttention(v / scale, v_bias / scale, residual_scale=1 / scale)
    op.fallback(
        map_of(q, bordered=False), map_of(x, bordered=False), out, map_of(x), compute=torch.float64
    )
    torch.testing.assert_close(out.pixels, module(x), rtol=0, atol=1e-10)
    # each parameter matters, except the keys' bias, which adds a constant to all logits of a query
    for i, (weight, bias) in enumerate(projections(module)):
        for j, p in enumerate((weight, bias)):
            p.mul_(1.01)
            off = (out.pixels - module(x)).abs().max()
            assert off < 1e-10 if (i, j) == (1, 1) else off > 1e-4
            p.div_(1.01)


def test_fallback_of_heads_is_the_layer():
    c, heads = 48, 3
    module, x = layer(c, heads), normal(2, c, 5, 7).double()
    qkv = torch.cat([F.linear(pixels_first(x), *p) for p in projections(module)[:3]], dim=2)
    qkv = qkv.transpose(1, 2).unflatten(2, (5, 7))
    out = poisoned(2, 5, 7, c, torch.float64, "cpu")
    MultiHeadAttention(heads).fallback(map_of(qkv, bordered=False), out, compute=torch.float64)
    projected = F.linear(pixels_first(out.pixels), *projections(module)[3])
    projected = projected.transpose(1, 2).unflatten(2, (5, 7))
    torch.testing.assert_close(x + projected, module(x), rtol=0, atol=1e-10)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", operand_types(), ids=str)
@pytest.mark.parametrize(("c", "heads"), [(48, 1), (64, 2)])
def test_whole_layer(c, heads, dtype, device):
    """All kernels of a layer, with rounded intermediate maps, are as accurate as plain PyTorch."""
    n, h, w, target = 2, 5, 7, Target.of(torch.device(device))
    module, x = layer(c, heads).to(device), normal(n, c, h, w).to(device, dtype)
    exact = module(x.double())
    q, k, v, o = projections(module)
    tiles = lambda outputs: choose_tiles(
        target, dtype, divisor(c, 64), outputs, n * h * w, tma=False, warps=8
    )
    dense, bordered = map_of(x, bordered=False), map_of(x)
    empty = lambda channels, border: poisoned(n, h, w, channels, dtype, device, border)
    out = empty(c, True)
    if heads == 1:
        (m, m_bias), (weight, bias) = fold(q, k, v, o)
        queries = empty(c, False)
        Conv1x1.of(m, m_bias, dtype, tiles(c)).run(dense, queries)
        FoldedAttention.of(weight, bias, dtype, target).run(queries, dense, out, bordered)
    else:
        qkv, mixed = empty(3 * c, False), empty(c, True)
        weight, bias = (torch.cat(parts) for parts in zip(q, k, v, strict=True))
        Conv1x1.of(weight, bias, dtype, tiles(3 * c)).run(dense, qkv)
        MultiHeadAttention(heads, target).run(qkv, mixed)
        Conv1x1.of(*o, dtype, tiles(c)).run(mixed, out, residual=bordered)
    assert_as_accurate(out.pixels, module.to(dtype)(x), exact)


# ---- batches and planted faults


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("kind", "dtype"), spread([Folded, Heads]), ids=lambda v: getattr(v, "__name__", str(v))
)
def test_same_bits_in_any_batch(kind, dtype, device):
    shape = (5, 1, 48, 3, 7) if kind is Folded else (5, 2, 24, 3, 7)
    case = kind(*shape, dtype, device)

    def run(images):
        out = case.out(len(images))
        case.op.run(out=out, **case.arguments(images))
        return out

    assert_same_in_any_batch(run)


FAULTS = {
    "weight rolled by one": lambda op: replace(op, weight=op.weight.roll(1, dims=1)),
    "weight transposed": lambda op: replace(op, weight=op.weight.T.contiguous()),
    "bias rolled by one": lambda op: replace(op, bias=op.bias.roll(1)),
    "residual's scale": lambda op: replace(op, residual_scale=1.0),
    "twice the heads": lambda op: replace(op, heads=2 * op.heads),
    "half the heads": lambda op: replace(op, heads=op.heads // 2),
}


@pytest.mark.kernel
@pytest.mark.parametrize(("fault", "dtype"), spread(FAULTS), ids=str)
def test_fault_is_detected(fault, dtype, device):
    kind, heads = (Heads, 2) if "heads" in fault else (Folded, 1)
    case = kind(2, heads, 32, 5, 7, dtype, device)
    with pytest.raises(AssertionError, match="max error"):
        case.check(FAULTS[fault](case.op))


@pytest.mark.kernel
@pytest.mark.parametrize("fault", ["keys and values swapped", "keys of another image", "last key"])
def test_wrong_argument_is_detected(fault, device):
    case = Heads(2, 2, 32, 5, 7, operand_types()[-1], device)
    qkv = case.qkv.clone()
    q, k, v = qkv.chunk(3, dim=1)
    if fault == "keys and values swapped":
        qkv = torch.cat([q, v, k], dim=1)
    elif fault == "keys of another image":
        qkv = torch.cat([q, k.flip(0), v], dim=1)
    else:
        k[..., -1, -1] = 0
    with pytest.raises(AssertionError, match="max error"):
        assert_operation(case.op, case.out(), case.reference, qkv=map_of(qkv, bordered=False))


@pytest.mark.kernel
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", [Folded, Heads])
def test_damage_is_detected(kind, damage, device):
    change, message = DAMAGES[damage]
    case = kind(2, 1, 16, 4, 4, operand_types()[-1], device)
    with pytest.raises(AssertionError, match=message):
        case.check(Damaged(case.op, change))
