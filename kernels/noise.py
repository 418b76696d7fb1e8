"""Counter-based normal noise from Philox 4x32-10, bit-exact in PyTorch and Triton on any device.

The key is the 64-bit seed. The counter's four words identify the number, so there is no state:

    c0      element // 4; the element is word element % 4 of the result
    c1      stream tag (high 8 bits), noise row (low 24 bits; in a reverse step: the step index)
    c2, c3  image index, low and high word

element = (h * W + w) * C + c in every memory layout. Box-Muller turns words into normals. It uses
only additions, multiplications and one correctly rounded square root, because log, sin and cos
differ between libraries in the last bit. It is bit-exact as long as no multiplication is fused with
an addition: every launch sets `enable_fp_fusion=False`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import check_per_image, launches_kernel, operation, tl, triton

# Stream tags. Changing a value changes every image of a seed: never renumber.
X_T, REVERSE, Q_SAMPLE, TRAIN_T, LABEL, DEQUANTISE, SHUFFLE = range(7)

PHILOX_M0, PHILOX_M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)  # multipliers
PHILOX_W0, PHILOX_W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)  # key increments

# Constants of Box-Muller, all exact in fp32; the polynomials are minimax.
# -2 log(1 + f) = f (Q[0] + Q[1] f + ...) on sqrt(1/2) <= 1 + f < sqrt(2), relative error 4e-8
Q = tl.constexpr(
    (
        -2.0,
        0.9999996423721313,
        -0.6666786670684814,
        0.5000516772270203,
        -0.3992695212364197,
        0.3310358226299286,
        -0.2976740300655365,
        0.2885371446609497,
        -0.17958888411521912,
    )
)
# sin(a) = a (1 + S[1] a^2 + ...), cos(a) = 1 + C[1] a^2 + ... on |a| <= pi / 4: errors 6e-9, 4e-8
S = tl.constexpr((1.0, -0.16666655242443085, 0.008332177996635437, -0.00019517296459525824))
C = tl.constexpr((1.0, -0.49999895691871643, 0.04165629297494888, -0.0013597821816802025))
MINUS_2_LN2 = tl.constexpr(-1.3862943649291992)
RADIANS = tl.constexpr(1.4629180836468095e-09)  # 2 pi / 2^32: radians per unit of a word
SQRT_HALF = tl.constexpr(0x3F3504F3)  # bits of sqrt(1/2) in fp32
SQRT_HALF_2_32 = tl.constexpr(0x4F3504F3)  # bits of sqrt(1/2) 2^32


# ---- the reference


def philox_reference(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011): four random words per counter.

    counter (four), key (two) and result (four): broadcastable int64 tensors of 32-bit words.
    """
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products overflow, but both halves are correct after masking
        p0, p1 = c0 * PHILOX_M0.value, c2 * PHILOX_M1.value
        c0, c1, c2, c3 = (
            ((p1 >> 32) & word) ^ c1 ^ k0,
            p1 & word,
            ((p0 >> 32) & word) ^ c3 ^ k1,
            p0 & word,
        )
        k0, k1 = (k0 + PHILOX_W0.value) & word, (k1 + PHILOX_W1.value) & word
    return c0, c1, c2, c3


def box_muller_reference(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, fp32, from two words (int64 tensors of the same shape).

    r (cos, sin)(angle) with r = sqrt(-2 log u), u = (radius_word + 1/2) / 2^32 rounded to fp32, in
    (0, 1]. The largest magnitude is 6.76.
    """
    bits = (radius_word.float() + 0.5).view(torch.int32) - SQRT_HALF_2_32.value
    exponent = bits >> 23
    f = ((bits & 0x7FFFFF) + SQRT_HALF.value).view(torch.float32) - 1.0  # u = 2^exponent (1 + f)
    minus_2_log_u = exponent.float() * MINUS_2_LN2.value + f * _horner(f, Q.value)
    # fp32 sqrt is not correctly rounded on some CPUs; the fp64 root rounded to fp32 is
    radius = minus_2_log_u.double().sqrt().float()

    # the top two bits are the quadrant, with an axis at its center
    turned = (angle_word + 0x20000000) & 0xFFFFFFFF
    a = ((turned & 0x3FFFFFFF) - 0x20000000).float() * RADIANS.value  # in [-pi/4, pi/4)
    aa = a * a
    sin, cos = a * _horner(aa, S.value), _horner(aa, C.value)
    quadrant = turned >> 30
    odd = (quadrant & 1) == 1
    cos_sign = 1.0 - 2.0 * ((quadrant == 1) | (quadrant == 2)).float()
    sin_sign = 1.0 - 2.0 * (quadrant >= 2).float()
    n0 = radius * cos_sign * torch.where(odd, sin, cos)
    return n0, radius * sin_sign * torch.where(odd, cos, sin)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        y = y * x + c
    return y


def words_reference(seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, count: int) -> Tensor:
    """Returns the first `count` words of each image's stream, int64 [B, count] in 0..2^32-1."""
    return torch.stack(_blocks(seed, image, noise_row, tag, count), dim=-1).flatten(1)[:, :count]


def normals_reference(
    seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, count: int
) -> Tensor:
    """Returns the first `count` normals of each image's stream, fp32 [B, count]."""
    w0, w1, w2, w3 = _blocks(seed, image, noise_row, tag, count)
    normals = (*box_muller_reference(w0, w1), *box_muller_reference(w2, w3))
    return torch.stack(normals, dim=-1).flatten(1)[:, :count]


def noise_reference(
    seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, shape: tuple[int, ...]
) -> Tensor:
    """Returns normals [B, C, H, W] for shape = (C, H, W), fp32, channels-last."""
    c, h, w = shape
    z = normals_reference(seed, image, noise_row, tag, c * h * w)
    return z.view(-1, h, w, c).permute(0, 3, 1, 2)


def _blocks(
    seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, count: int
) -> tuple[Tensor, ...]:
    word = 0xFFFFFFFF
    seed, image, noise_row = (v.long()[:, None] for v in (seed, image, noise_row))
    block = torch.arange(-(-count // 4), device=seed.device)[None, :]
    counter = (block, noise_row | (tag << 24), image & word, (image >> 32) & word)
    return philox_reference(counter, (seed & word, (seed >> 32) & word))


# ---- the kernel


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """`philox_reference` on uint32 words."""
    for _ in tl.static_range(10):
        # one instruction for both halves of the product; tl.umulhi would need a second one
        p0, p1 = c0.to(tl.uint64) * PHILOX_M0, c2.to(tl.uint64) * PHILOX_M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += PHILOX_W0
        k1 += PHILOX_W1
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, angle_word):
    """`box_muller_reference`, bit-exact: without tl.fma and without fp fusion at the launch."""
    bits = (radius_word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - SQRT_HALF_2_32
    f = ((bits & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    q = (((Q[8] * f + Q[7]) * f + Q[6]) * f + Q[5]) * f + Q[4]
    q = (((q * f + Q[3]) * f + Q[2]) * f + Q[1]) * f + Q[0]
    radius = tl.sqrt_rn((bits >> 23).to(tl.float32) * MINUS_2_LN2 + f * q).to(
        tl.uint32, bitcast=True
    )

    turned = angle_word + 0x20000000
    a = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * RADIANS
    aa = a * a
    sin = a * (((S[3] * aa + S[2]) * aa + S[1]) * aa + S[0])
    cos = ((C[3] * aa + C[2]) * aa + C[1]) * aa + C[0]
    odd = (turned & 0x40000000) != 0
    # the signs of cosine and sine are bits of the word, moved into the radius
    cos_radius = (radius ^ ((turned + 0x40000000) & 0x80000000)).to(tl.float32, bitcast=True)
    sin_radius = (radius ^ (turned & 0x80000000)).to(tl.float32, bitcast=True)
    return cos_radius * tl.where(odd, sin, cos), sin_radius * tl.where(odd, cos, sin)


@triton.jit
def image_words(seed_ptr, image_ptr, noise_row, n, tag, block):
    """Returns the four words of Philox blocks `block` [BLOCK] of the batch's image n, as uint32."""
    seed = tl.load(seed_ptr + n).to(tl.int64)
    image = tl.load(image_ptr + n).to(tl.int64)
    c1 = (noise_row.to(tl.int64) | (tag << 24)).to(tl.uint32)
    return philox(
        block.to(tl.uint32),
        c1,
        image.to(tl.uint32),
        (image >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def image_normals(seed_ptr, image_ptr, noise_row, n, tag, block):
    """Returns the normals of Philox blocks `block` [BLOCK] in element order: fp32 [4 * BLOCK]."""
    w0, w1, w2, w3 = image_words(seed_ptr, image_ptr, noise_row, n, tag, block)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def locate(count, BLOCK: tl.constexpr):
    """Returns this program's image in the batch and its first Philox block."""
    programs = tl.cdiv(count, 4 * BLOCK)  # per image
    n = tl.program_id(0) // programs
    return n, (tl.program_id(0) - n * programs) * BLOCK


@triton.jit
def _noise_kernel(
    z_ptr, seed_ptr, image_ptr, noise_row_ptr, tag, COUNT, NORMAL: tl.constexpr, BLOCK: tl.constexpr
):
    n, first = locate(COUNT, BLOCK)
    block = first + tl.arange(0, BLOCK)
    element = first * 4 + tl.arange(0, 4 * BLOCK)
    noise_row = tl.load(noise_row_ptr + n)
    if NORMAL:
        z = image_normals(seed_ptr, image_ptr, noise_row, n, tag, block)
    else:
        w0, w1, w2, w3 = image_words(seed_ptr, image_ptr, noise_row, n, tag, block)
        z = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    tl.store(z_ptr + n.to(tl.int64) * COUNT + element, z, mask=element < COUNT)


# Philox blocks per program. Two warps give each thread four blocks (16 elements). Round keys,
# addresses and table entries are computed once per thread: a quarter fewer instructions than with
# one block per thread.
BLOCK, NUM_WARPS = 256, 2


def grid(count: int, batch: int) -> tuple[int]:
    """Returns the launch grid for `batch` images of `count` elements; see `locate`."""
    programs = triton.cdiv(count, 4 * BLOCK) * batch
    if programs >= 2**31:
        limit = 2**31 // (programs // batch)
        raise ValueError(
            f"the batch is {batch} images of {count} elements; expected at most {limit} images "
            "per launch; use a smaller batch"
        )
    return (programs,)


def _fill(
    out: Tensor, seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, normal: bool
) -> None:
    """Launches the kernel that writes every element of out [B, count]."""
    batch, count = out.shape
    if out.numel():
        with torch.cuda.device_of(out):
            _noise_kernel[grid(count, batch)](
                out,
                seed,
                image,
                noise_row,
                tag,
                count,
                NORMAL=normal,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


# ---- the operations


@operation("ddpm_fast::words")
def words(seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, count: int) -> Tensor:
    """Returns `count` random words per image, int64 [B, count] in 0..2^32-1.

    For the other arguments and errors see `noise`.
    """
    check_per_image(len(seed), seed.device, seed=seed, image=image, noise_row=noise_row)
    if not launches_kernel(seed, "noise"):
        return words_reference(seed, image, noise_row, tag, count).contiguous()
    out = torch.empty(len(seed), count, dtype=torch.int64, device=seed.device)
    _fill(out, seed, image, noise_row, tag, normal=False)
    return out


@operation("ddpm_fast::noise")
def noise(
    seed: Tensor, image: Tensor, noise_row: Tensor, tag: int, channels: int, height: int, width: int
) -> Tensor:
    """Returns standard normals for each image: Philox 4x32-10 (Salmon et al. 2011) and Box-Muller.

    Args:
        seed: [B] integer, 64-bit seed.
        image: [B] integer, 64-bit image index.
        noise_row: [B] integer in 0..2^24-1, index of the noise within the stream; in a reverse step
            the step index.
        tag: Stream, a constant of this module such as `X_T`.
        channels, height, width: Shape of an image.

    Returns:
        [B, C, H, W] fp32, channels-last.

    Raises:
        ValueError: A vector has a wrong shape, dtype or device.
    """
    check_per_image(len(seed), seed.device, seed=seed, image=image, noise_row=noise_row)
    count = height * width * channels
    if launches_kernel(seed, "noise"):
        z = torch.empty(len(seed), count, dtype=torch.float32, device=seed.device)
        _fill(z, seed, image, noise_row, tag, normal=True)
    else:
        z = normals_reference(seed, image, noise_row, tag, count).contiguous()
    return z.view(-1, height, width, channels).permute(0, 3, 1, 2)


@words.register_fake
def _(seed, image, noise_row, tag, count):
    return seed.new_empty(seed.shape[0], count, dtype=torch.int64)


@noise.register_fake
def _(seed, image, noise_row, tag, channels, height, width):
    return seed.new_empty(seed.shape[0], height, width, channels, dtype=torch.float32).permute(
        0, 3, 1, 2
    )
