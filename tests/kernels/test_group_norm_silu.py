"""GroupNorm with SiLU, time embedding and skip connection: `kernels.group_norm_silu`."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.kernels._gemm import E4M3_MAX, Target
from ddpm_fast.kernels._group_norm_kernels import (
    MAX_LANES,
    MAX_ONE_PASS_ELEMENTS,
    TILE_ELEMENTS,
    Blocks,
)
from ddpm_fast.kernels._triton import INTERPRETED
from ddpm_fast.kernels.group_norm_silu import GroupNormSiLU, group_norm_silu_reference
from ddpm_fast.testing import (
    DAMAGES,
    Damaged,
    assert_operation,
    assert_same_in_any_batch,
    map_of,
    operand_types,
    poisoned,
    relative_error,
    run_twice,
    spread,
)

E4M3 = torch.float8_e4m3fn
EPS = 1e-6
COLUMN = 3  # first column of the layer's entries in the table
FORMS = {
    "norm, dense": dict(silu=False, bordered=False),
    "silu": {},
    "add": dict(time="add"),
    "scale_shift": dict(time="scale_shift"),
}


class Case:
    """A layer and its inputs: channels differ in mean and deviation, images in their time rows."""

    def __init__(
        self,
        n,
        c1,
        c2,
        groups,
        h,
        w,
        dtype,
        device,
        silu=True,
        time=None,
        bordered=True,
        mean=1.0,
        row_type=torch.int64,
    ):
        rng, c = torch.Generator().manual_seed(0), c1 + c2
        normal = lambda *shape: torch.randn(*shape, generator=rng)
        x = normal(n, c, h, w) * torch.linspace(0.5, 2, c)[:, None, None]
        self.x = (x + mean * (1 + 0.3 * normal(n, c, 1, 1))).to(device, dtype)
        gamma, beta = 1 + 0.3 * normal(c), 0.3 * normal(c)
        gamma, beta = (v.to(dtype).float().to(device) for v in (gamma, beta))
        self.op = GroupNormSiLU(gamma, beta, groups, EPS, silu, time, COLUMN)
        self.split, self.bordered, self.table, self.row = c1, bordered, None, None
        if time is not None:
            # NaN except in the rows and columns that the layer reads
            self.row = torch.arange(n) * 2 + 1
            self.table = torch.full((2 * n + 1, 2 * c + COLUMN + 2), float("nan"))
            entries = normal(n, 2 * c if time == "scale_shift" else c).to(dtype).float()
            self.table[self.row, COLUMN : COLUMN + entries.shape[1]] = entries
            self.table, self.row = self.table.to(device), self.row.to(device, row_type)

    def arguments(self, images=slice(None)):
        x = self.x[images]
        parts = [x] if self.split == x.shape[1] else x.tensor_split([self.split], dim=1)
        maps = dict(zip(("x", "x2"), map(map_of, parts), strict=False))
        count, scratch = self.op.scratch_elements(maps["x"]), None
        if count:
            scratch = poisoned(1, 1, 1, count, torch.float32, x.device, bordered=False)
        time_row = None if self.row is None else self.row[images]
        return maps | dict(table=self.table, time_row=time_row, scratch=scratch)

    def out(self, images=5, dtype=None):
        n, c, h, w = self.x.shape
        dtype = dtype or self.x.dtype
        return poisoned(min(n, images), h, w, c, dtype, self.x.device, self.bordered)

    def reference(self, dtype):
        op, more = self.op, {}
        if self.table is not None:
            c = len(op.gamma)
            names = ("scale", "offset") if op.time == "scale_shift" else ("shift",)
            entries = self.table[self.row.long(), COLUMN:].to(dtype)
            more = {name: entries[:, i * c : (i + 1) * c] for i, name in enumerate(names)}
        x, gamma, beta = (v.to(dtype) for v in (self.x, op.gamma, op.beta))
        return group_norm_silu_reference(x, gamma, beta, op.groups, op.eps, op.silu, **more)

    def check(self, op=None, **options):
        assert_operation(op or self.op, self.out(), self.reference, **self.arguments(), **options)


# (images, channels, channels of the second map, groups, height, width)
ONE_PASS = {
    "width 1": (2, 16, 0, 16, 5, 7),
    "width 2": (1, 64, 0, 32, 7, 7),
    "width 3": (2, 96, 0, 32, 7, 9),
    "width 4": (1, 32, 0, 8, 28, 28),
    "width 6": (3, 48, 0, 8, 3, 5),
    "width 8": (2, 128, 0, 16, 7, 7),
    "width 12, partial last block": (2, 48, 24, 6, 4, 4),
    "width 12, a group in both maps": (2, 64, 32, 8, 4, 4),
    "width 24, a group in both maps": (2, 64, 32, 4, 2, 3),
    "width 48": (2, 96, 48, 3, 5, 7),
    "width 48, a group in both maps": (2, 64, 80, 3, 7, 5),
    "one group": (2, 64, 0, 1, 8, 8),
    "one pixel": (2, 32, 16, 4, 1, 1),
}
TWO_PASS = {
    "width 12, a group in both maps": (1, 32, 16, 4, 96, 64),
    "width 128": (1, 256, 0, 2, 40, 40),
    "one group of 96": (1, 96, 0, 1, 40, 40),
}
TWO_PASS_FORMS = [
    ("width 12, a group in both maps", "add"),
    ("width 128", "scale_shift"),
    ("one group of 96", "norm, dense"),
    ("one group of 96", "add"),
]


@pytest.mark.kernel
@pytest.mark.parametrize(("shape", "form", "dtype"), spread(ONE_PASS, FORMS), ids=str)
@pytest.mark.each_value
def test_one_pass(shape, form, dtype, device):
    case = Case(*ONE_PASS[shape], dtype, device, **FORMS[form])
    assert case.op.scratch_elements(case.arguments()["x"]) == 0
    case.check()


@pytest.mark.kernel
@pytest.mark.parametrize(("case", "dtype"), spread(TWO_PASS_FORMS), ids=str)
def test_two_passes(case, dtype, device):
    shape, form = case
    case = Case(*TWO_PASS[shape], dtype, device, **FORMS[form])
    assert case.op.scratch_elements(case.arguments()["x"]) > 0
    case.check()


@pytest.mark.kernel
@pytest.mark.parametrize(
    "shape", [ONE_PASS["width 4"], TWO_PASS["one group of 96"]], ids=["one pass", "two passes"]
)
def test_mean_far_from_zero(shape, device):
    """Mean 100 and deviation 1: E[x^2] - E[x]^2 would lose the variance."""
    case = Case(*shape, torch.float32, device, silu=False, mean=0.0)
    case.x = case.x / 1.3 + 100
    case.check()

    def by_difference_of_squares(out, **_):
        x = case.x.unflatten(1, (case.op.groups, -1))
        mean, square = (v.mean((2, 3, 4), keepdim=True) for v in (x, x * x))
        y = ((x - mean) / (square - mean * mean + EPS).sqrt()).flatten(1, 2)
        out.write(y * case.op.gamma[:, None, None] + case.op.beta[:, None, None])

    naive = case.out()
    by_difference_of_squares(naive)
    exact, plain = case.reference(torch.float64), case.reference(torch.float32)
    assert relative_error(naive.pixels, exact) > 10 * relative_error(plain, exact)
    with pytest.raises(AssertionError, match="error"):
        case.check(SimpleNamespace(run=by_difference_of_squares))


@pytest.mark.kernel
@pytest.mark.parametrize("time", ["add", "scale_shift"])
def test_rows_of_32_bits(time, device):
    Case(3, 32, 0, 8, 3, 5, torch.float32, device, time=time, row_type=torch.int32).check()


@pytest.mark.kernel
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_image_is_beta(value, device):
    """The variance is 0, so the divisor is sqrt(eps): no NaN, and the output is exactly beta."""
    case = Case(1, 32, 0, 8, 4, 5, torch.float32, device, silu=False)
    case.x.fill_(value)
    case.check()
    out = case.out()
    case.op.run(out=out, **case.arguments())
    assert torch.equal(out.pixels, case.op.beta[None, :, None, None].expand_as(out.pixels))


# ---- e4m3 output


def nearest(v):
    """Returns v, fp64, clamped and rounded to e4m3 by torch's cast."""
    return v.clamp(-E4M3_MAX, E4M3_MAX).float().to(E4M3).double()


def cast_is_exact(v):
    """Mask of values that are cast to e4m3 as on a GPU.

    Triton's interpreter loses the carry of a value that rounds up to the next power of two, and
    truncates subnormals (below 2^-6).
    """
    if not INTERPRETED:
        return torch.ones_like(v, dtype=torch.bool)
    rounded = nearest(v)
    carries = torch.frexp(rounded).mantissa.abs().eq(0.5) & (rounded.abs() > v.abs() * (1 - 1e-5))
    return (v.abs() >= 2**-6) & ~carries


def assert_e4m3(stored, v):
    """Asserts that stored is v rounded to the nearest e4m3, up to the fp32 error of v."""
    stored, exact, clamped = stored.double(), cast_is_exact(v), v.clamp(-E4M3_MAX, E4M3_MAX)
    assert exact.double().mean() > 0.8
    allowed = (nearest(v) - clamped).abs() + 1e-5 * v.abs().clamp(1, E4M3_MAX)
    far = ((stored - clamped).abs() > allowed) & exact
    assert not far.any(), (
        f"{int(far.sum())} of {far.numel()} are not the nearest: {stored[far][:4]} for {v[far][:4]}"
    )


def needs_e4m3(device):
    if Target.of(torch.device(device)).sm < 89:
        pytest.skip("no e4m3 before sm_89")


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (ONE_PASS["width 3"], "silu"),
        (ONE_PASS["width 12, a group in both maps"], "add"),
        (ONE_PASS["width 12, a group in both maps"], "scale_shift"),
        ((1, 64, 0, 2, 40, 40), "add"),  # two passes
    ],
    ids=str,
)
def test_e4m3_output(shape, form, device):
    """Values that saturate, because gamma is huge, become 448 and not NaN."""
    needs_e4m3(device)
    case = Case(*shape, torch.float32, device, **FORMS[form])
    gamma = case.op.gamma.clone()
    gamma[5] = 1e6
    op = case.op = replace(case.op, gamma=gamma, unit=1 / 32)
    out, fallback = case.out(dtype=E4M3), case.out(dtype=E4M3)
    run_twice(op, out, **case.arguments())
    op.fallback(out=fallback, compute=torch.float64, **case.arguments())
    exact = case.reference(torch.float64) * 32
    assert_e4m3(out.pixels, exact)
    assert torch.equal(fallback.pixels.double(), nearest(exact))
    over = exact > 2 * E4M3_MAX
    assert over[:, 5].any() and (out.pixels.double()[over] == E4M3_MAX).all()
    with pytest.raises(AssertionError, match="not the nearest"):
        assert_e4m3(out.pixels, exact * 1.03)
    with pytest.raises(AssertionError, match="not the nearest"):
        assert_e4m3(out.pixels.roll(1, 1), exact)


@pytest.mark.kernel
def test_e4m3_saturates_below_too(device):
    needs_e4m3(device)
    case = Case(2, 32, 0, 8, 5, 7, torch.float32, device, silu=False)
    case.op = replace(case.op, gamma=case.op.gamma * 1e6)
    out, exact = case.out(dtype=E4M3), case.reference(torch.float64)
    run_twice(case.op, out, **case.arguments())
    sure = exact.abs() > 2 * E4M3_MAX
    assert sure.double().mean() > 0.9
    assert torch.equal(out.pixels.double()[sure], exact.sign()[sure] * E4M3_MAX)


SATURATED = [ONE_PASS["width 3"], ONE_PASS["width 12, partial last block"]]


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [*SATURATED, TWO_PASS["one group of 96"]], ids=str)
def test_saturated_values_are_counted(shape, device):
    """Kernel and fallback count exactly the clamped and NaN pixels, and NaN stays NaN."""
    needs_e4m3(device)
    case = Case(*shape, torch.float32, device, silu=False)

    def counted(op, by):
        out, saturated = case.out(dtype=E4M3), torch.full((1, 1), 7, device=device)
        compute = dict(compute=torch.float32) if by == "fallback" else {}
        getattr(op, by)(out=out, saturated=saturated, **case.arguments(), **compute)
        return out, int(saturated) - 7

    beta = case.op.beta.clone()
    beta[[3, 10]] = torch.tensor([1e4, -1e4], device=device)  # every pixel of two channels
    fits, over = replace(case.op, unit=0.5), replace(case.op, beta=beta)
    pixels, image_pixels, width = case.x[:, 0].numel(), case.x[0, 0].numel(), case.op.width
    for by in ("run", "fallback"):
        assert counted(fits, by)[1] == 0, by
        assert counted(over, by)[1] == 2 * pixels, by
        case.x[-1, 3, 1, 2] = float("nan")  # a group of one image
        out, count = counted(over, by)
        nan = width * image_pixels
        others = 2 * pixels - sum(i // width == 3 // width for i in (3, 10)) * image_pixels
        assert count == others + nan, by
        assert int(out.pixels.float().isnan().sum()) == nan or (INTERPRETED and by == "run"), by
        case.x[-1, 3, 1, 2] = 0.0


# ---- batches and planted faults


BATCHES = [
    ((5, 64, 32, 8, 5, 7), "norm, dense"),
    ((5, 64, 32, 8, 5, 7), "add"),
    ((5, 48, 0, 16, 3, 5), "scale_shift"),
    ((5, 48, 0, 16, 3, 5), "silu"),
    ((5, 64, 0, 1, 24, 24), "add"),  # two passes
]


@pytest.mark.kernel
@pytest.mark.parametrize(("case", "dtype"), spread(BATCHES), ids=str)
def test_same_bits_in_any_batch(case, dtype, device):
    shape, form = case
    case = Case(*shape, dtype, device, **FORMS[form])

    def run(images):
        out = case.out(len(images))
        case.op.run(out=out, **case.arguments(images))
        return out

    assert_same_in_any_batch(run)


FAULTS = {
    "twice the groups": (lambda op: replace(op, groups=2 * op.groups), {}),
    "half the groups": (lambda op: replace(op, groups=op.groups // 2), {}),
    "gamma rolled by one": (lambda op: replace(op, gamma=op.gamma.roll(1)), {}),
    "beta rolled by one": (lambda op: replace(op, beta=op.beta.roll(1)), {}),
    "eps": (lambda op: replace(op, eps=1e-1), {}),
    "no SiLU": (lambda op: replace(op, silu=False), {}),
    "the next column": (lambda op: replace(op, column=op.column - 1), dict(time="add")),
    "added after the norm": (
        lambda op: replace(op, time=None, beta=op.beta + 0.5),
        dict(time="add"),
    ),
    "no scale and shift": (lambda op: replace(op, time=None), dict(time="scale_shift")),
}


@pytest.mark.kernel
@pytest.mark.parametrize(("fault", "dtype"), spread(FAULTS), ids=str)
def test_fault_is_detected(fault, dtype, device):
    change, form = FAULTS[fault]
    case = Case(2, 32, 16, 4, 5, 7, dtype, device, **form)
    if case.table is not None:
        case.table.nan_to_num_(0.5)
    with pytest.raises(AssertionError, match="max error"):
        case.check(change(case.op))


@pytest.mark.kernel
@pytest.mark.parametrize("fault", ["rows of other images", "maps swapped"])
def test_wrong_argument_is_detected(fault, device):
    case = Case(2, 24, 24, 4, 5, 7, torch.float32, device, time="add")
    arguments = case.arguments()
    if fault == "maps swapped":
        arguments |= dict(x=arguments["x2"], x2=arguments["x"])
    else:
        arguments |= dict(time_row=arguments["time_row"].flip(0))
    with pytest.raises(AssertionError, match="max error"):
        assert_operation(case.op, case.out(), case.reference, **arguments)


@pytest.mark.kernel
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected(damage, device):
    change, message = DAMAGES[damage]
    case = Case(2, 32, 0, 8, 5, 7, operand_types()[-1], device)
    with pytest.raises(AssertionError, match=message):
        case.check(Damaged(case.op, change))


# ---- blocks and reference: plain PyTorch


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("channels", [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024])
def test_blocks(channels):
    sides = (1, 2, 4, 7, 8, 16, 28, 32, 40, 64, 128, 256, 512)
    sizes = [5 * 7, 96 * 64, *(side**2 for side in sides)]
    widths = [width for width in range(1, channels + 1) if channels % width == 0]
    for size, width in itertools.product(sizes, widths):
        b = Blocks.of(size, channels, width)
        about = f"{size} pixels, {channels} channels, groups of {width}: {b}"
        assert b.used % width == 0 and width <= b.used <= b.lanes, about  # whole groups
        assert is_power_of_two(b.pixels) and is_power_of_two(b.lanes), about
        assert b.warps in (4, 8, 16), about
        assert b.used % 8 == 0 or b.used + 8 > b.lanes or width % 8 or width > b.lanes, about
        if b.one_pass:
            assert size <= b.pixels < 2 * size or size == b.pixels, about
            assert b.pixels * b.lanes <= MAX_ONE_PASS_ELEMENTS, about
        else:
            assert b.pixels * b.lanes <= max(TILE_ELEMENTS, b.lanes) and b.pixels < 2 * size, about
            assert b.lanes <= max(MAX_LANES, 2 * width), about


def test_largest_blocks_of_one_pass():
    """One pass holds 32x32 pixels, unless groups are wide, and does not hold 64x64."""
    assert Blocks.of(32 * 32, 128, 4).one_pass and Blocks.of(32 * 32, 256, 32).one_pass
    assert not Blocks.of(32 * 32, 128, 64).one_pass and not Blocks.of(64 * 64, 128, 4).one_pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_fallback_and_reference(form, dtype):
    """Compared with the separate layers of the network."""
    case = Case(2, 32, 16, 4, 5, 7, torch.float32, "cpu", **FORMS[form])
    op, out, x = case.op, case.out(dtype=torch.float64), case.x.double()
    norm = torch.nn.GroupNorm(op.groups, 48, op.eps).double()
    norm.weight.data, norm.bias.data = op.gamma.double(), op.beta.double()
    if op.time == "add":
        x = x + case.table[case.row, COLUMN : COLUMN + 48].double()[:, :, None, None]
    x = norm(x)
    if op.time == "scale_shift":
        entries = case.table[case.row, COLUMN : COLUMN + 96].double()[:, :, None, None]
        scale, shift = entries.chunk(2, dim=1)
        x = x * (1 + scale) + shift
    expected = (F.silu(x) if op.silu else x).detach()
    op.fallback(out=out, compute=dtype, **case.arguments())
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    for y in (out.pixels, case.reference(dtype).double()):
        torch.testing.assert_close(y, expected, rtol=0, atol=atol)
