"""Convolutions: `kernels.conv_in`, `conv1x1`, `conv3x3`, `conv_downsample`, `conv_upsample`."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.kernels._gemm import E4M3_MAX, Target, choose_tiles, pack, quantise, unpack
from ddpm_fast.kernels._triton import INTERPRETED
from ddpm_fast.kernels.conv1x1 import Conv1x1, conv1x1_reference
from ddpm_fast.kernels.conv3x3 import Conv3x3, conv3x3_reference
from ddpm_fast.kernels.conv_downsample import ConvDownsample, conv_downsample_reference
from ddpm_fast.kernels.conv_in import ConvIn, conv_in_reference
from ddpm_fast.kernels.conv_upsample import ConvUpsample, conv_upsample_reference, pack_parities
from ddpm_fast.testing import (
    DAMAGES,
    Damaged,
    assert_operation,
    assert_same_in_any_batch,
    map_of,
    operand_types,
    poisoned,
    spread,
)

E4M3 = torch.float8_e4m3fn
# Tensor cores truncate sums that PyTorch rounds; visible only in fp32 outputs of 16-bit operands
TRUNCATED_SUMS_SLACK = 2.0 if INTERPRETED else 32.0


@pytest.fixture(autouse=True)
def fp32_is_fp32(monkeypatch):
    """Turns off TF32 in cuDNN, so that its fp32 is a valid baseline."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tiles(device, dtype, c, k, rows=1, tma=False, block_m=None):
    """Tile sizes of `choose_tiles`, with block_m replaced if given."""
    t = choose_tiles(Target.of(torch.device(device)), dtype, c, k, rows, tma=tma, warps=4)
    return t if block_m is None else replace(t, block_m=block_m)


def needs_tma(tma, device):
    if tma and Target.of(torch.device(device)).sm < 90:
        pytest.skip("no TMA before sm_90")


def normal(*shape, seed=0, dtype=torch.float32, device="cpu", scale=1.0):
    """Normal values, exact in `dtype`, from the CPU's generator: the same on all devices."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype).to(device)


def filters(k, c, taps=9, seed=1, dtype=torch.float32, device="cpu"):
    """fp32 [K, C, 3, 3], or [K, C] for one tap, exact in `dtype`; outputs have deviation 1."""
    shape = (k, c, 3, 3) if taps == 9 else (k, c)
    return normal(*shape, seed=seed, dtype=dtype, device=device, scale=(taps * c) ** -0.5).float()


def of_all(reference, *tensors):
    """Returns a function of a dtype: `reference` of the tensors cast to it."""
    cast = lambda t, dtype: t.to(dtype) if isinstance(t, torch.Tensor) else t
    return lambda dtype: reference(*(cast(t, dtype) for t in tensors))


# ---- 3x3


def check_conv3x3(
    n,
    c,
    h,
    w,
    k,
    dtype,
    device,
    *,
    tma=False,
    block_m=64,
    bias=True,
    residual=False,
    dense=False,
    fault=None,
    damage=None,
    programs=None,
):
    needs_tma(tma, device)
    make = partial(normal, dtype=dtype, device=device)
    x, weight = make(n, c, h, w), filters(k, c, dtype=dtype, device=device)
    b, r = make(k, seed=2).float() if bias else None, make(n, k, h, w, seed=3) if residual else None
    scale = 0.7071 if residual else 1.0
    t = tiles(device, dtype, c, k, tma=tma, block_m=block_m)
    t = t if programs is None else replace(t, programs=programs)
    op = Conv3x3.of(weight, b, dtype, t, residual_scale=scale)
    op = replace(op, **fault(op)) if fault else op
    out = poisoned(n, h, w, k, torch.float32 if dense else dtype, device, bordered=not dense)
    assert_operation(
        Damaged(op, damage) if damage else op,
        out,
        of_all(conv3x3_reference, x, weight, b, r, scale),
        slack=TRUNCATED_SUMS_SLACK if dense and dtype != torch.float32 else 2.0,
        x=map_of(x),
        residual=None if r is None else map_of(r),
    )


TMA = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
EACH_TYPE = pytest.mark.parametrize("dtype", operand_types(), ids=str)
# all combinations on a GPU; by the interpreter TMA with one type, pointers with the other
ONE_WAY = pytest.mark.parametrize(("tma", "dtype"), spread([True, False]), ids=str)


@pytest.mark.kernel
@EACH_TYPE
@TMA
@pytest.mark.parametrize(
    ("shape", "block_m", "form"),
    [
        ((1, 16, 5, 7, 16), 64, {}),
        ((3, 32, 7, 7, 48), 64, dict(bias=False)),
        ((3, 32, 7, 7, 48), 128, dict(residual=True)),
        ((2, 16, 1, 1, 16), 64, dict(residual=True, bias=False)),
    ],
    ids=str,
)
def test_conv3x3(shape, block_m, form, tma, dtype, device):
    check_conv3x3(*shape, dtype, device, tma=tma, block_m=block_m, **form)


@pytest.mark.kernel
@ONE_WAY
@pytest.mark.parametrize(
    ("shape", "block_m", "form"),
    [
        ((1, 32, 28, 28, 32), 128, dict(residual=True)),
        ((2, 128, 5, 7, 128), 128, dict(residual=True, bias=False)),
        ((5, 96, 3, 5, 96), 64, dict(residual=True)),
        ((2, 16, 1, 9, 32), 64, {}),
    ],
    ids=str,
)
def test_larger_conv3x3(shape, block_m, form, tma, dtype, device):
    check_conv3x3(*shape, dtype, device, tma=tma, block_m=block_m, **form)


@pytest.mark.kernel
# by the interpreter, pointers would take half of this file's time
@pytest.mark.parametrize("tma", [True] + [False] * (not INTERPRETED), ids=str)
def test_conv3x3_of_many_tiles(tma, device):
    check_conv3x3(1, 16, 96, 64, 16, operand_types()[-1], device, tma=tma, block_m=128)


@pytest.mark.kernel
@EACH_TYPE
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_conv3x3_into_dense_fp32(k, dtype, device):
    """The network's output: few channels, no border."""
    tma = k % 2 == 0 and Target.of(torch.device(device)).sm >= 90
    check_conv3x3(2, 32, 5, 7, k, dtype, device, tma=tma, residual=k > 4, dense=True)


@pytest.mark.kernel
@EACH_TYPE
def test_persistent_programs_compute_several_tiles(dtype, device):
    check_conv3x3(3, 16, 7, 9, 48, dtype, device, tma=True, residual=True, programs=2)


FAULTS = {
    "taps rolled by one": lambda op: dict(weight=op.weight.roll(len(op.weight[0]) // 9, dims=1)),
    "outputs rolled by one": lambda op: dict(weight=op.weight.roll(1, dims=0)),
    "one zero column": lambda op: dict(
        weight=op.weight.index_fill(1, torch.tensor([7], device=op.weight.device), 0)
    ),
    "no bias": lambda op: dict(bias=None),
    "bias rolled by one": lambda op: dict(bias=op.bias.roll(1)),
    "residual's scale": lambda op: dict(residual_scale=1.0),
}


@pytest.mark.kernel
@pytest.mark.parametrize(("fault", "dtype"), spread(FAULTS), ids=str)
def test_fault_is_detected(fault, dtype, device):
    with pytest.raises(AssertionError, match="max error"):
        check_conv3x3(2, 16, 5, 7, 16, dtype, device, residual=True, fault=FAULTS[fault])


@pytest.mark.kernel
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected(damage, device):
    change, message = DAMAGES[damage]
    with pytest.raises(AssertionError, match=message):
        check_conv3x3(2, 16, 5, 7, 16, operand_types()[-1], device, damage=change)


@pytest.mark.kernel
@TMA
@pytest.mark.parametrize("fault", [None, "input's scale", "outputs' scales"], ids=str)
def test_conv3x3_of_e4m3(fault, tma, device):
    """The fp64 reference has the same 8-bit operands, so only sums and output are rounded."""
    if Target.of(torch.device(device)).sm < 89:
        pytest.skip("no e4m3 before sm_89")
    needs_tma(tma, device)
    n, c, h, w, k, act = 2, 64, 5, 7, 48, operand_types()[-1]
    make = partial(normal, device=device)
    x, b, r = make(n, c, h, w), make(k, seed=2), make(n, k, h, w, seed=3, dtype=act)
    weight = (filters(k, c) * torch.linspace(1, 3, k)[:, None, None, None]).to(device)
    unit = float(x.abs().max()) / E4M3_MAX
    stored, t = map_of(x / unit, E4M3), tiles(device, E4M3, c, k, tma=tma)
    op = Conv3x3.of(weight, b, E4M3, t, x_scale=unit, residual_scale=0.5)
    rounded = unpack(op.weight.double(), 3) * op.scale.double()[:, None, None, None] / unit
    bound = weight.abs() / 16 + weight.abs().amax((1, 2, 3), keepdim=True) * 1e-5
    assert ((rounded - weight).abs() <= bound).all()
    if fault == "input's scale":
        op = replace(op, scale=op.scale * 1.01)
    elif fault == "outputs' scales":
        op = replace(op, scale=op.scale.roll(1))
    out = poisoned(n, h, w, k, torch.float32 if INTERPRETED else act, device)
    reference = of_all(conv3x3_reference, stored.pixels.double() * unit, rounded, b, r, 0.5)
    with pytest.raises(AssertionError, match="max error") if fault else nullcontext():
        assert_operation(op, out, reference, x=stored, residual=map_of(r))


# ---- upsampling, stride 2, first layer, 1x1


@pytest.mark.kernel
@ONE_WAY
@pytest.mark.parametrize(
    "shape", [(1, 16, 5, 7, 16), (3, 32, 7, 7, 48), (2, 128, 3, 3, 96), (2, 16, 1, 3, 32)], ids=str
)
def test_upsample(shape, tma, dtype, device):
    """The reference has the 3x3 weights, and plain PyTorch rounds those."""
    needs_tma(tma, device)
    (n, c, h, w, k), block_m = shape, 128 if shape[0] == 3 else 64
    x, weight = normal(n, c, h, w, dtype=dtype, device=device), filters(k, c, device=device)
    b = normal(k, seed=2, dtype=dtype, device=device).float()
    op = ConvUpsample.of(weight, b, dtype, tiles(device, dtype, c, k, tma=tma, block_m=block_m))
    out, rounding = poisoned(n, 2 * h, 2 * w, k, dtype, device), 8 * torch.finfo(dtype).eps
    assert_operation(
        op, out, of_all(conv_upsample_reference, x, weight, b), fallback=rounding, x=map_of(x)
    )


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("shape", "padding", "dtype"),
    spread(
        [(1, 16, 6, 10, 16), (3, 32, 14, 14, 48), (2, 96, 4, 2, 128), (5, 48, 2, 2, 32)], [0, 1]
    ),
    ids=str,
)
def test_downsample(shape, padding, dtype, device):
    (n, c, h, w, k), block_m = shape, 128 if shape[2] == 14 else 64
    make, weight = partial(normal, dtype=dtype, device=device), filters(k, c, 9, 1, dtype, device)
    x, b = make(n, c, h, w), make(k, seed=2).float()
    op = ConvDownsample.of(weight, b, padding, dtype, tiles(device, dtype, c, k, block_m=block_m))
    reference = of_all(partial(plain_downsample, padding=padding), x, weight, b)
    assert_operation(op, poisoned(n, h // 2, w // 2, k, dtype, device), reference, x=map_of(x))


def plain_downsample(x, weight, bias, padding):
    """Stride-2 convolution of `ddpm_fast.models.unet.Downsample`."""
    x = F.pad(x, (0, 1, 0, 1)) if padding == 0 else x
    return F.conv2d(x, weight, bias, stride=2, padding=padding)


def conv_in(c, k, dtype, device, center=False, block_m=64):
    step = ConvIn.block_k(c)
    b = normal(k, seed=2, dtype=dtype, device=device)
    t = replace(tiles(device, dtype, step, k, block_m=block_m), block_k=step)
    return ConvIn.of(filters(k, c, dtype=dtype, device=device), b, dtype, t, center)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("shape", "center", "dtype"),
    spread([(1, 1, 28, 28), (3, 2, 7, 7), (2, 3, 5, 7), (5, 4, 5, 7), (3, 9, 7, 7)], [False, True]),
    ids=str,
)
def test_conv_in(shape, center, dtype, device):
    """Outside the image, 2 x - 1 is 0, not -1."""
    (n, channels, h, w), k = shape, 48
    x = normal(n, channels, h, w, device=device)
    op = conv_in(channels, k, dtype, device, center)
    weight = filters(k, channels, dtype=dtype, device=device)
    reference = of_all(conv_in_reference, (2 * x - 1 if center else x).to(dtype), weight, op.bias)
    out = poisoned(n, h, w, k, dtype, device)
    assert_operation(op, out, reference, x=map_of(x, bordered=False))


@pytest.mark.kernel
@EACH_TYPE
@pytest.mark.parametrize("bordered", [False, True], ids=["dense", "bordered"])
@pytest.mark.parametrize(
    ("shape", "c2", "form"),
    [
        ((2, 32, 5, 7, 48), 0, {}),
        ((3, 32, 7, 7, 48), 16, dict(residual=True)),
        ((1, 128, 5, 7, 128), 96, dict(bias=False)),
        ((5, 48, 3, 3, 16), 0, dict(residual=True, bias=False)),
        ((1, 16, 28, 28, 48), 32, {}),
    ],
    ids=str,
)
def test_conv1x1(shape, c2, form, bordered, dtype, device):
    n, c, h, w, k = shape
    make, scale = partial(normal, dtype=dtype, device=device), 0.7071
    x, weight = make(n, c + c2, h, w), filters(k, c + c2, 1, dtype=dtype, device=device)
    r = make(n, k, h, w, seed=3) if form.get("residual") else None
    b = make(k, seed=2).float() if form.get("bias", True) else None
    block_m = 128 if n == 1 else 64
    t = tiles(device, dtype, min(c & -c, c2 & -c2 or c), k, block_m=block_m)
    op = Conv1x1.of(weight, b, dtype, t, scale)
    parts = dict(zip(("x", "x2"), x.split([c, c2] if c2 else c, dim=1), strict=False))
    parts["residual"] = r
    maps = {name: v if v is None else map_of(v, bordered=bordered) for name, v in parts.items()}
    out = poisoned(n, h, w, k, dtype, device, bordered)
    assert_operation(op, out, of_all(conv1x1_reference, x, weight, b, r, scale), **maps)


# ---- every operation


def operation(name, dtype, device, block_m, c=32, k=48, tma=False):
    """Returns (operation, its inputs for five images, the side of its output, its reference)."""
    n, side, make = 5, 4, partial(normal, dtype=dtype, device=device)
    x, r = make(n, c, side, side), make(n, k, side, side, seed=3)
    weight, b = filters(k, c, dtype=dtype, device=device), make(k, seed=2).float()
    t = tiles(device, dtype, c, k, tma=tma, block_m=block_m)
    if name == "conv3x3":
        reference = of_all(conv3x3_reference, x, weight, b, r)
        return Conv3x3.of(weight, b, dtype, t), dict(x=x, residual=r), side, reference
    if name == "upsample":
        reference = of_all(conv_upsample_reference, x, weight, b)
        return ConvUpsample.of(weight, b, dtype, t), dict(x=x), 2 * side, reference
    if name == "downsample":
        reference = of_all(partial(plain_downsample, padding=0), x, weight, b)
        return ConvDownsample.of(weight, b, 0, dtype, t), dict(x=x), side // 2, reference
    if name == "first":
        op, x = conv_in(3, k, dtype, device, block_m=block_m), make(n, 3, side, side).float()
        weight = filters(k, 3, dtype=dtype, device=device)
        return op, dict(x=x), side, of_all(conv_in_reference, x, weight, op.bias)
    x2, weight = make(n, c, side, side, seed=4), filters(k, 2 * c, 1, dtype=dtype, device=device)
    reference = of_all(conv1x1_reference, torch.cat([x, x2], dim=1), weight, b, r)
    return Conv1x1.of(weight, b, dtype, t), dict(x=x, x2=x2, residual=r), side, reference


def maps(name, tensors, images=slice(None)):
    return {key: map_of(x[images], bordered=name != "first") for key, x in tensors.items()}


OTHERS = ["upsample", "downsample", "first", "conv1x1"]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "dtype"), spread(["conv3x3 tma", "conv3x3", "upsample tma", *OTHERS]), ids=str
)
def test_same_bits_in_any_batch(name, dtype, device):
    """Also if the rows per tile depend on the batch size."""
    name, tma = name.removesuffix(" tma"), name.endswith(" tma")
    needs_tma(tma, device)

    def run(images):
        block_m = 128 if len(images) == 5 else 64
        op, tensors, side, _ = operation(name, dtype, device, block_m, tma=tma)
        out = poisoned(len(images), side, side, 48, dtype, device)
        op.run(out=out, **maps(name, tensors, images))
        return out

    assert_same_in_any_batch(run)


@pytest.mark.kernel
@pytest.mark.parametrize("fault", ["weights rolled by one", "bias rolled by one"])
@pytest.mark.parametrize("name", OTHERS)
def test_fault_of_other_operations_is_detected(name, fault, device):
    dtype = operand_types()[-1]
    op, tensors, side, reference = operation(name, dtype, device, block_m=64)
    if fault == "bias rolled by one":
        op = replace(op, bias=op.bias.roll(1))
    else:
        columns = 32 if name in ("upsample", "downsample") else 3  # a tap, except for conv1x1
        op = replace(op, weight=op.weight.roll(columns, dims=1))
    out = poisoned(5, side, side, 48, dtype, device)
    with pytest.raises(AssertionError, match="max error"):
        assert_operation(op, out, reference, **maps(name, tensors))


@pytest.mark.kernel
def test_wrong_padding_is_detected(device):
    op, tensors, side, reference = operation("downsample", torch.float32, device, block_m=64)
    op, out = replace(op, padding=1), poisoned(5, side, side, 48, torch.float32, device)
    with pytest.raises(AssertionError, match="max error"):
        assert_operation(op, out, reference, **maps("", tensors))


# ---- packing and references: plain PyTorch


@pytest.mark.parametrize("side", [1, 2, 3])
def test_unpack_is_the_inverse_of_pack(side):
    weight = normal(5, 7, side, side)
    packed = pack(weight)
    assert packed.shape == (5, side * side * 7) and torch.equal(unpack(packed, side), weight)
    assert torch.equal(packed[2, :7], weight[2, :, 0, 0])  # tap by tap
    assert torch.equal(packed[2, -7:], weight[2, :, -1, -1])


def test_parities_sum_the_taps_of_a_pixel():
    weight = normal(5, 4, 3, 3).double()
    parities = [unpack(p, 2) for p in pack_parities(weight.float()).chunk(4)]
    for parity, packed in enumerate(parities):
        rows, columns = (([0, 1], [2]) if odd else ([0], [1, 2]) for odd in divmod(parity, 2))
        for i in range(2):
            for j in range(2):
                expected = weight[:, :, rows[i]][:, :, :, columns[j]].sum((2, 3))
                torch.testing.assert_close(packed[:, :, i, j], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(packed.sum((2, 3)), weight.sum((2, 3)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 7), (8, 8)], ids=str)
def test_upsampled_convolution_is_four_small_ones(size):
    """In fp64, so that the rounding of the summed weights is negligible."""
    x, weight, b = normal(2, 4, *size).double(), normal(6, 4, 3, 3).double(), normal(6).double()
    out = poisoned(2, 2 * size[0], 2 * size[1], 6, torch.float64, "cpu")
    ConvUpsample(pack_parities(weight), b, None).fallback(map_of(x), out, compute=torch.float64)
    expected = conv_upsample_reference(x, weight, b)
    torch.testing.assert_close(out.pixels, expected, rtol=0, atol=1e-13)


def test_conv_in_reference_centers_before_padding():
    """Pixels of 1/2 become 0, so every output is the bias, also at the border."""
    x, weight, b = torch.full((1, 3, 4, 5), 0.5).double(), normal(6, 3, 3, 3).double(), normal(6)
    y = conv_in_reference(x, weight, b.double(), center=True)
    assert torch.equal(y, b.double()[:, None, None].expand(1, 6, 4, 5))


@pytest.mark.parametrize("padding", [0, 1])
def test_conv_downsample_reference_equals_the_network_layer(padding):
    x, weight, b = normal(2, 4, 6, 10).double(), normal(6, 4, 3, 3).double(), normal(6).double()
    y = conv_downsample_reference(x, weight, b, padding)
    assert torch.equal(y, plain_downsample(x, weight, b, padding))


def test_quantise():
    """Rounds to the nearest e4m3; the largest weight of each output channel is 448; 0 stays 0."""
    weight = normal(6, 90) * torch.logspace(-6, 6, 6)[:, None]
    weight[3] = 0
    stored, unit = quantise(weight, E4M3, x_scale=0.25)
    assert stored.dtype == E4M3 and unit.dtype == torch.float32
    largest = stored.float().abs().amax(1)
    assert largest[3] == 0 and (largest[[0, 1, 2, 4, 5]] == E4M3_MAX).all()
    back = stored.double() * unit.double()[:, None] / 0.25
    # half a step of 3 mantissa bits, plus half of the smallest subnormal
    subnormal = weight.abs().amax(1, keepdim=True) * 2**-10 / E4M3_MAX
    assert ((back - weight).abs() <= weight.abs() / 16 * (1 + 1e-6) + subnormal).all()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        same, nothing = quantise(weight, dtype)
        assert nothing is None and torch.equal(same, weight.to(dtype))


def test_e4m3_map_saturates_and_is_bordered():
    x = torch.tensor([1e9, 500.0, 448.0, -449.0, 1.0625, 0.0]).view(1, 6, 1, 1)
    fm = map_of(x, E4M3)
    assert fm.pixels.float().flatten().tolist() == [448.0, 448.0, 448.0, -448.0, 1.0, 0.0]
    assert fm.border.shape == (1, 3, 6) and not fm.border.float().any()


@pytest.mark.parametrize("bordered", [False, True])
def test_map_round_trip(bordered):
    x = normal(3, 4, 5, 7)
    fm = map_of(x, bordered=bordered)
    assert torch.equal(fm.pixels, x)
    assert len(fm.rows) == 3 * fm.image_rows == 3 * (48 if bordered else 35)
    row = fm.image_rows + ((2 + bordered) * (7 + bordered) + 4 + bordered)  # image 1, pixel (2, 4)
    assert torch.equal(fm.rows[row], x[1, :, 2, 4])
