"""Self-attention over the pixels of an image, with streamed keys and values, in two forms.

Multi-head: softmax(q k^T / sqrt(D)) v of given projections q, k, v, separately for each head.

Folded, for one head of all C channels: the four projections become two, exactly. x is norm(x);
terms that are equal for all keys cancel in the softmax.

    (x Wq^T + bq) (x Wk^T + bk)^T  =  (x M + m) x^T + ...,  M = Wq^T Wk,  m = bq Wk
    softmax(...) (x Wv^T + bv) Wo^T + bo  =  (softmax(...) x) V^T + v,  V = Wo Wv,  v = Wo bv + bo

Keys and values are then x itself. The kernel also applies V, v and the residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._feature_map import FeatureMap
from ._gemm import H100, PRECISION, TRITON_TYPE, Target, cast, next_power_of_two
from ._launch import begin, launch_options
from ._triton import tl, triton

LOG2_E = math.log2(math.e)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """q, k, v [N, P, C] -> softmax(scale q k^T) v [N, P, C], per head of C / heads channels."""
    n, p, c = q.shape
    q, k, v = (t.view(n, p, heads, c // heads).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(2, 3) * scale).softmax(3) @ v).transpose(1, 2).reshape(n, p, c)


def fold(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Folds the four projections (weight [C, C], bias [C]) into ((M^T, m), (V, v)), in fp64."""
    (wq, bq), (wk, _), (wv, bv), (wo, bo) = ((w.double(), b.double()) for w, b in (q, k, v, out))
    return (wk.T @ wq, wk.T @ bq), (wo @ wv, wo @ bv + bo)


@triton.jit(do_not_specialize=["PIXELS", "W"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    residual_scale,
    scale,
    PIXELS,
    W,
    Q_STRIDE,
    KV_STRIDE,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    FOLDED: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    blocks = tl.cdiv(PIXELS, BLOCK_M)
    head = tl.program_id(0) // blocks % HEADS
    n = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    m0 = tl.program_id(0) % blocks * BLOCK_M
    pixel = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DP)
    in_head = (d < D)[None, :]
    first = n * PIXELS
    q_offsets = (first + pixel)[:, None] * Q_STRIDE + (head * D + d)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(pixel < PIXELS)[:, None] & in_head, other=0.0)
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, PIXELS, BLOCK_N):
        key = k0 + tl.arange(0, BLOCK_N)
        offsets = (first + key)[:, None] * KV_STRIDE + (head * D + d)[None, :]
        mask = (key < PIXELS)[:, None] & in_head
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale
        s = tl.where((key < PIXELS)[None, :], s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        if FOLDED:
            acc = tl.dot(p.to(k.dtype), k, acc, input_precision=PRECISION)
        else:
            v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
            acc = tl.dot(p.to(k.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    attended = (acc / row_sum[:, None]).to(q.dtype)

    # rows of the bordered output map
    WP = W + 1
    H = PIXELS // W
    image = n * (H + 1) * WP
    pixel_row = image + (pixel // W + 1) * WP + pixel % W + 1
    edge = tl.arange(0, 16)
    if FOLDED:
        for o0 in range(0, C, BLOCK_OUT):
            cols = o0 + tl.arange(0, BLOCK_OUT)
            mask = (cols < C)[:, None] & in_head
            w = tl.load(w_ptr + cols[:, None] * C + d[None, :], mask=mask, other=0.0)
            y = tl.dot(attended, w.T, input_precision=PRECISION)
            y += tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :]
            offsets = pixel_row[:, None] * C + cols[None, :]
            inside = (pixel < PIXELS)[:, None] & (cols < C)[None, :]
            residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0)
            y += residual_scale * residual.to(tl.float32)
            tl.store(y_ptr + offsets, y.to(OUT), mask=inside)
    else:
        tl.store(
            y_ptr + pixel_row[:, None] * C + (head * D + d)[None, :],
            attended.to(OUT),
            mask=(pixel < PIXELS)[:, None] & in_head,
        )
    if m0 == 0:
        zero = tl.zeros((16, DP), tl.float32).to(OUT)
        for e in range(0, W + 1, 16):
            offsets = (image + e + edge)[:, None] * C + (head * D + d)[None, :]
            tl.store(y_ptr + offsets, zero, mask=(e + edge <= W)[:, None] & in_head)
        for e in range(0, H + 1, 16):
            offsets = (image + (e + edge) * WP)[:, None] * C + (head * D + d)[None, :]
            tl.store(y_ptr + offsets, zero, mask=(e + edge <= H)[:, None] & in_head)


# ---- the operations


@dataclass(frozen=True)
class AttentionTiles:
    """Tile sizes and launch parameters of attention.

    Args:
        block_m: Queries per program.
        block_n: Keys per step.
        block_out: Outputs per step of the folded form's projection.
        warps: Warps per program.
        stages: Stages of the software pipeline.
    """

    block_m: int
    block_n: int
    block_out: int
    warps: int
    stages: int

    @classmethod
    def of(cls, target: Target, dim: int, dtype: torch.dtype) -> AttentionTiles:
        """Returns the largest tiles that do not spill, for heads of `dim` channels.

        fp16 and bf16 use at least 64 queries, so that all sizes use one instruction family.
        """
        if dtype == torch.float32:
            return cls(16, 16, 16, 4, 1)
        if dim <= 64:
            block_m, block_n, block_out, warps, stages = 128, 64, 64, 4, 3
        elif dim <= 256:
            block_m, block_n, block_out, warps, stages = 64, 64, 64, 4, 2
        else:
            block_m, block_n, block_out, warps, stages = 64, 32, 32, 8, 2
            if target.small:  # these GPUs have one instruction family for all sizes
                block_m = 32
        return cls(block_m, block_n, block_out, warps if target.sm == 90 else 8, stages)


@dataclass(frozen=True, eq=False)
class MultiHeadAttention:
    """Multi-head attention softmax(q k^T / sqrt(D)) v.

    Reads a dense map of q, k, v [N, H, W, 3 C], writes a bordered map [N, H, W, C].

    Args:
        heads: Number of heads, each of D = C / heads channels.
        target: GPU, for the choice of tiles.
    """

    heads: int
    target: Target = H100
    name = "multi_head_attention"

    def run(self, qkv: FeatureMap, out: FeatureMap) -> None:
        c = out.channels
        q, k, v = (qkv.rows[:, i * c :] for i in range(3))
        _launch(self.target, q, k, v, out, self.heads, 3 * c, 3 * c, None, None, None, 0.0)

    def fallback(
        self, qkv: FeatureMap, out: FeatureMap, compute: torch.dtype | None = None
    ) -> None:
        q, k, v = cast(qkv.grid.flatten(1, 2), compute).chunk(3, dim=2)
        y = attention_reference(q, k, v, self.heads, (out.channels // self.heads) ** -0.5)
        out.write(y.transpose(1, 2).unflatten(2, (out.height, out.width)))

    def cost(self, qkv: FeatureMap, out: FeatureMap) -> tuple[int, int]:
        pixels, size = out.height * out.width, qkv.rows.element_size()
        moved = size * (qkv.rows.numel() + out.rows.numel())
        return 4 * out.images * pixels * pixels * out.channels, moved


@dataclass(frozen=True, eq=False)
class FoldedAttention:
    """Single-head attention V softmax(q x^T / sqrt(C)) x + v + residual_scale * residual.

    Reads dense maps q and x and a bordered residual, writes a bordered map; all [N, H, W, C].

    Args:
        weight: V [C, C] of `fold`, in the type of the operands.
        bias: v [C] of `fold`, fp32.
        target: GPU, for the choice of tiles.
        residual_scale: Factor of the residual.
    """

    weight: Tensor
    bias: Tensor
    target: Target = H100
    residual_scale: float = 1.0
    name = "folded_attention"

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
        target: Target = H100,
        residual_scale: float = 1.0,
    ) -> FoldedAttention:
        return cls(weight.to(dtype).contiguous(), bias.float(), target, residual_scale)

    def run(self, q: FeatureMap, x: FeatureMap, out: FeatureMap, residual: FeatureMap) -> None:
        c = out.channels
        _launch(
            self.target,
            q.rows,
            x.rows,
            x.rows,
            out,
            1,
            c,
            c,
            self.weight,
            self.bias,
            residual.rows,
            self.residual_scale,
        )

    def fallback(
        self,
        q: FeatureMap,
        x: FeatureMap,
        out: FeatureMap,
        residual: FeatureMap,
        compute: torch.dtype | None = None,
    ) -> None:
        queries, keys = (cast(fm.grid.flatten(1, 2), compute) for fm in (q, x))
        y = attention_reference(queries, keys, keys, 1, out.channels**-0.5)
        y = F.linear(y, cast(self.weight, compute)) + self.bias.to(y.dtype)
        y = y.transpose(1, 2).unflatten(2, (out.height, out.width))
        out.write(y + self.residual_scale * cast(residual.pixels, y.dtype))

    def cost(
        self, q: FeatureMap, x: FeatureMap, out: FeatureMap, residual: FeatureMap
    ) -> tuple[int, int]:
        pixels, c = out.height * out.width, out.channels
        tensors = (q.rows, x.rows, out.rows, residual.rows, self.weight)
        moved = sum(t.numel() * t.element_size() for t in tensors)
        return out.images * pixels * c * (4 * pixels + 2 * c), moved


def _launch(
    target: Target,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: FeatureMap,
    heads: int,
    q_stride: int,
    kv_stride: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
) -> None:
    pixels, c = out.height * out.width, out.channels
    out.expect("out", len(q) // pixels, out.height, out.width, c, bordered=True)
    d = c // heads
    s = AttentionTiles.of(target, d, q.dtype)
    with torch.cuda.device_of(q):
        _attention_kernel[(triton.cdiv(pixels, s.block_m) * heads * out.images,)](
            q,
            k,
            v,
            out.rows,
            q if weight is None else weight,
            q if bias is None else bias,
            q if residual is None else residual,
            residual_scale,
            d**-0.5 * LOG2_E,
            pixels,
            out.width,
            q_stride,
            kv_stride,
            C=c,
            HEADS=heads,
            D=d,
            DP=max(16, next_power_of_two(d)),
            BLOCK_M=s.block_m,
            BLOCK_N=s.block_n,
            BLOCK_OUT=s.block_out,
            FOLDED=weight is not None,
            OUT=TRITON_TYPE[out.rows.dtype],
            PRECISION=PRECISION[q.dtype],
            **launch_options(s.warps, num_stages=s.stages),
        )
