"""Statistics that convolutions store by tiles, and norms that read them instead of the map."""

from dataclasses import replace

import pytest
import torch

from ddpm_fast.kernels import group_norm_silu
from ddpm_fast.kernels._feature_map import FeatureMap
from ddpm_fast.kernels._gemm import Target, choose_tiles, quantise
from ddpm_fast.kernels._tile_statistics import Tiling, channel_statistics, tile_statistics
from ddpm_fast.kernels._triton import INTERPRETED
from ddpm_fast.kernels.conv3x3 import Conv3x3
from ddpm_fast.kernels.conv_downsample import ConvDownsample
from ddpm_fast.kernels.conv_in import ConvIn
from ddpm_fast.kernels.conv_upsample import ConvUpsample
from ddpm_fast.kernels.group_norm_silu import GroupNormSiLU, group_norm_silu_reference
from ddpm_fast.testing import (
    assert_as_accurate,
    assert_operation,
    assert_same_bits,
    assert_same_in_any_batch,
    assert_written,
    map_of,
    operand_types,
    poisoned,
    relative_error,
    spread,
)

E4M3 = torch.float8_e4m3fn
HALF = operand_types()[-1]
# kind -> size of its input relative to its output
KINDS = {
    "conv3x3": 1,
    "conv3x3 tma": 1,
    "conv3x3 residual": 1,
    "upsample": 0.5,
    "upsample tma": 0.5,
    "downsample": 2,
    "first": 1,
}


def normal(*shape, seed=0, dtype=torch.float32, device="cpu", scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype).to(device)


class Case:
    """A convolution to n images [k, h, w], in tiles of 64 rows, and its inputs."""

    def __init__(self, kind, n, h, w, dtype, device, k=48, c=16, bias=0.0, operand=None):
        self.kind, self.n, self.shape, self.dtype, self.device = kind, n, (h, w, k), dtype, device
        tma = "tma" in kind
        target = Target.of(torch.device(device))
        if tma and target.sm < 90:
            pytest.skip("no TMA before sm_90")
        operand, c = operand or dtype, 3 if kind == "first" else c
        step = ConvIn.block_k(c) if kind == "first" else c
        t = replace(choose_tiles(target, operand, step, k, 1, tma=tma, warps=4), block_m=64)
        size = int(h * KINDS[kind]), int(w * KINDS[kind])
        self.x, self.residual = normal(n, c, *size, device=device), None
        weight = normal(k, c, 3, 3, seed=1, scale=(9 * c) ** -0.5, device=device)
        b = (bias + 0.3 * normal(k, seed=2)).to(device)
        if "residual" in kind:
            self.residual = normal(n, k, h, w, seed=3, dtype=dtype, device=device)
        if kind == "first":
            self.op = ConvIn.of(weight, b, dtype, replace(t, block_k=step))
        elif kind == "downsample":
            self.op = ConvDownsample.of(weight, b, 0, dtype, t)
        elif kind.startswith("upsample"):
            self.op = ConvUpsample.of(weight, b, dtype, t)
        else:
            self.op = Conv3x3.of(weight, b, operand, t, residual_scale=0.7)
        self.operand = torch.float32 if kind == "first" else operand

    def arguments(self, images=slice(None)):
        maps = dict(x=map_of(self.x[images], self.operand, bordered=self.kind != "first"))
        return (
            maps if self.residual is None else maps | dict(residual=map_of(self.residual[images]))
        )

    def out(self, images=None):
        return poisoned(images or self.n, *self.shape, self.dtype, self.device)

    def stats(self, images=None):
        n, entries, k = images or self.n, self.op.tiling(self.out()).entries, self.shape[2]
        return poisoned(n, entries, 2, k, torch.float32, self.device, bordered=False)

    def run(self, images=slice(None), by="run", **more):
        arguments = self.arguments(images)
        count = arguments["x"].images
        out, stats = self.out(count), self.stats(count)
        getattr(self.op, by)(out=out, stats=stats, **arguments, **more)
        assert_written(out)
        assert_written(stats)
        return out, stats


def one_by_one(out, tiling, dtype=torch.float64, border=False, neighbours=False):
    """Computes the statistics [N, entries, 2, C] of `out` in `dtype`, one tile after the other.

    border, neighbours: faults, which include rows of the border or of the next image.
    """
    entries, side = [], 2 if tiling.parts == 4 else 1
    width = tiling.width + 1
    count = (tiling.height + 1) * width
    for n in range(out.images):
        for begin in range(0, count, tiling.rows):
            for part in range(tiling.parts):
                rows, image = range(begin, min(begin + tiling.rows, count)), out.pixels[n].to(dtype)
                at = [(r // width - 1, r % width - 1) for r in rows]
                inside, zero = [(y, x) for y, x in at if y >= 0 and x >= 0], image[:, 0, 0] * 0
                values = [image[:, y * side + part // 2, x * side + part % 2] for y, x in inside]
                values += [zero] * ((len(at) - len(inside)) * border)
                if neighbours and n + 1 < out.images:
                    overlap = max(0, begin + tiling.rows - count - width - 1)
                    values += out.pixels[n + 1].to(dtype)[:, 0, :overlap].unbind(1)
                v = torch.stack(values or [zero])
                entries.append(torch.stack([v.mean(0), (v - v.mean(0)).square().sum(0)]))
    return torch.stack(entries).unflatten(0, (out.images, tiling.entries))


def check(stats, out, tiling, **fault):
    """Asserts that means and squared deviations have at most twice the error of PyTorch in fp32."""
    exact, plain = one_by_one(out, tiling, **fault), one_by_one(out, tiling, torch.float32, **fault)
    for value, p, e in zip(stats.grid.unbind(2), plain.unbind(2), exact.unbind(2), strict=True):
        assert_as_accurate(value, p, e)


CASES = spread(KINDS, [(2, 13, 7, 48), (1, 28, 28, 8)])
CASES = [case for case in CASES if case[1][1] % 2 == 0 or "upsample" not in case[0]]


@pytest.mark.kernel
@pytest.mark.parametrize(("kind", "size", "dtype"), CASES, ids=str)
def test_statistics_are_those_of_the_stored_map(kind, size, dtype, device):
    """The map is bit-exact with and without statistics, although the tiles differ."""
    *size, k = size
    case = Case(kind, *size, dtype, device, k=k)
    out, stats = case.run()
    tiling = case.op.tiling(out)
    image_rows = (tiling.height + 1) * (tiling.width + 1)
    assert tiling.tiles > 1 and tiling.tiles * tiling.rows > image_rows
    check(stats, out, tiling)
    plain = case.out()
    case.op.run(out=plain, **case.arguments())
    assert_same_bits(plain.rows, out.rows, "without statistics")
    out, stats = case.run(by="fallback", compute=torch.float32)
    torch.testing.assert_close(stats.grid.double(), one_by_one(out, tiling), rtol=1e-5, atol=1e-5)


@pytest.mark.kernel
@pytest.mark.parametrize("fault", ["border", "neighbours"])
def test_rows_outside_the_image_are_detected(fault, device):
    case = Case("conv3x3", 2, 13, 7, torch.float32, device, bias=1.0)
    out, stats = case.run()
    with pytest.raises(AssertionError, match="max error"):
        check(stats, out, case.op.tiling(out), **{fault: True})


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["conv3x3", "upsample"])
def test_mean_far_from_zero(kind, device):
    """Mean 100 and deviation 1: the difference of squares would lose the deviations."""
    case = Case(kind, 1, 14, 14, torch.float32, device, bias=100.0)
    out, stats = case.run()
    tiling = case.op.tiling(out)
    check(stats, out, tiling)
    step, parts = 14 // tiling.width, tiling.parts
    tiles = tiling.by_tile(out.pixels[:, :, ::step, ::step])
    counts = tiling.counts(out.rows)[::parts, None].clamp(min=1)
    by_squares = tiles.square().sum(2) - tiles.sum(2).square() / counts
    exact = one_by_one(out, tiling)[:, ::parts, 1]
    error = relative_error(stats.grid[:, ::parts, 1], exact)
    assert relative_error(by_squares, exact) > 30 * error


@pytest.mark.kernel
@pytest.mark.parametrize("tma", ["", " tma"])
def test_e4m3(tma, device):
    """8-bit operands and scaled sums."""
    if Target.of(torch.device(device)).sm < 89:
        pytest.skip("no e4m3 before sm_89")
    dtype = torch.float32 if INTERPRETED else HALF
    case = Case("conv3x3" + tma, 2, 13, 7, dtype, device, c=32, operand=E4M3)
    assert quantise(case.op.weight.float(), E4M3)[1] is not None and case.op.scale is not None
    out, stats = case.run()
    check(stats, out, case.op.tiling(out))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("kind", "dtype"), spread(["conv3x3 tma", "upsample", "downsample"]), ids=str
)
def test_same_bits_in_any_batch(kind, dtype, device):
    """An image of 12 x 6 has 91 rows: its second tile overlaps the next image."""
    case = Case(kind, 5, 12, 6, dtype, device, k=16)
    assert_same_in_any_batch(lambda images: case.run(images)[1])


def test_wrong_shape_of_statistics_is_refused():
    case = Case("conv3x3", 2, 13, 7, torch.float32, "cpu")
    small = poisoned(2, 1, 2, 48, torch.float32, "cpu", bordered=False)
    message = r"stats is \(2, 1, 2, 48\) dense .* expected \(2, 2, 2, 48\)"
    with pytest.raises(ValueError, match=message):
        case.op.run(out=case.out(), stats=small, **case.arguments())


# ---- norms


def statistics_of(x, tiling):
    """Returns the statistics that a convolution stores for x [N, C, H, W], as a map."""
    stats = poisoned(len(x), tiling.entries, 2, x.shape[1], torch.float32, x.device, bordered=False)
    stats.rows.copy_(tile_statistics(x.double(), tiling).flatten(0, 2))
    return stats


class Norm:
    """A norm of one or two maps and their statistics; parities: the last map is by parities."""

    def __init__(
        self, n, channels, groups, h, w, dtype, device, time=None, mean=1.0, parities=False
    ):
        c, rng = sum(channels), torch.Generator().manual_seed(0)
        self.draw = lambda *shape: torch.randn(*shape, generator=rng)
        x = self.draw(n, c, h, w) * torch.linspace(0.5, 2, c)[:, None, None]
        x = x + mean * (1 + 0.3 * self.draw(n, c, 1, 1))
        self.x, self.channels, self.dtype = x.to(device, dtype), channels, dtype
        plain, by_parity = Tiling(h, w, 64), Tiling(h // 2, w // 2, 32, parts=4)
        tilings = (*[plain] * (len(channels) - 1), by_parity if parities else plain)
        rounded = lambda v: v.to(dtype).float().to(device)
        gamma, beta = rounded(1 + 0.3 * self.draw(c)), rounded(0.3 * self.draw(c))
        self.op = GroupNormSiLU(gamma, beta, groups, 1e-6, True, time, tilings=tilings)
        self.entries = None
        if time is not None:
            self.entries = rounded(self.draw(n, c if time == "add" else 2 * c))

    def arguments(self, images=slice(None)):
        x = self.x[images]
        parts = x.split(self.channels, dim=1)
        maps = dict(zip(("x", "x2"), map(map_of, parts), strict=False))
        stats = map(statistics_of, parts, self.op.tilings)
        maps |= dict(zip(("stats", "stats2"), stats, strict=False))
        elements, time_row = self.op.scratch_elements(maps["x"]), None
        scratch = poisoned(1, 1, 1, elements, torch.float32, x.device, bordered=False)
        if self.entries is not None:
            time_row = torch.arange(len(self.x), device=x.device)[images]
        return maps | dict(scratch=scratch, table=self.entries, time_row=time_row)

    def out(self, images=None):
        n, c, h, w = self.x.shape
        return poisoned(images or n, h, w, c, self.dtype, self.x.device)

    def reference(self, dtype):
        op, more = self.op, {}
        if self.entries is not None:
            names = ("shift",) if op.time == "add" else ("scale", "offset")
            entries = self.entries.to(dtype).split(len(op.gamma), dim=1)
            more = dict(zip(names, entries, strict=True))
        x, gamma, beta = (v.to(dtype) for v in (self.x, op.gamma, op.beta))
        return group_norm_silu_reference(x, gamma, beta, op.groups, op.eps, **more)

    def check(self, **changed):
        # the statistics are fp32, so the fallback's tolerance is that of fp32
        arguments = self.arguments() | changed
        assert_operation(self.op, self.out(), self.reference, fallback=1e-5, **arguments)


@pytest.fixture
def two_passes(monkeypatch):
    """All norms use the two-pass form."""
    monkeypatch.setattr(group_norm_silu, "MAX_ONE_PASS_ELEMENTS", 1)


NORMS = {
    "width 4": ((2, (16,), 4, 13, 7), {}),
    "width 20, a group in both maps": ((1, (32, 48), 4, 14, 10), dict(time="add", parities=True)),
    "width 12, partial last block": ((2, (16, 32), 4, 12, 6), dict(time="scale_shift")),
    "width 1, by parities": ((1, (16,), 16, 28, 28), dict(parities=True, time="add")),
    "width 96": ((3, (192,), 2, 8, 8), dict(time="add")),
    "mean far from zero": ((1, (32,), 4, 20, 20), dict(mean=100.0)),
}


@pytest.mark.kernel
@pytest.mark.parametrize(("name", "dtype"), spread(NORMS), ids=str)
def test_norm_from_statistics(name, dtype, device, two_passes):
    shape, form = NORMS[name]
    Norm(*shape, torch.float32 if "far" in name else dtype, device, **form).check()


@pytest.mark.kernel
@pytest.mark.parametrize("fault", ["other image", "other map", "tiles swapped", "other tiling"])
def test_wrong_statistics_are_detected(fault, device, two_passes):
    norm = Norm(2, (16, 16), 4, 13, 7, torch.float32, device, time="add")
    arguments = norm.arguments()
    if fault == "other tiling":
        norm.op = replace(norm.op, tilings=(Tiling(7, 13, 64),) * 2)
        changed = {}
    elif fault == "other map":
        changed = dict(stats=arguments["stats2"], stats2=arguments["stats"])
    else:
        stats, dim = arguments["stats"], 0 if fault == "other image" else 1
        changed = dict(stats=replace(stats, rows=stats.grid.flip(dim).reshape(stats.rows.shape)))
    with pytest.raises(AssertionError, match="max error"):
        norm.check(**(arguments | changed))


@pytest.mark.kernel
def test_norm_has_the_same_bits_in_any_batch(device, two_passes):
    norm = Norm(5, (16, 16), 4, 8, 8, HALF, device, time="add")

    def run(images):
        out = norm.out(len(images))
        norm.op.run(out=out, **norm.arguments(images))
        return out

    assert_same_in_any_batch(run)


def test_statistics_of_other_maps_are_refused(two_passes):
    norm = Norm(2, (16, 16), 4, 13, 7, torch.float32, "cpu")
    arguments, other = norm.arguments(), statistics_of(norm.x[:, :16], Tiling(13, 7, 32))
    for changed, message in (
        (dict(stats2=None), "statistics and tilings are 1 and 2 for 2 maps"),
        (dict(stats2=other), r"stats is \(2, 4, 2, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            norm.op.run(out=norm.out(), **(arguments | changed))


# ---- tilings: plain PyTorch


@pytest.mark.parametrize(
    "tiling",
    [Tiling(13, 7, 64), Tiling(5, 9, 16, parts=4), Tiling(2, 40, 16), Tiling(3, 3, 128)],
    ids=str,
)
def test_tilings(tiling):
    """Every pixel is counted once, and the merged statistics are those of the map."""
    side = 2 if tiling.parts == 4 else 1
    x = normal(2, 4, side * tiling.height, side * tiling.width).double() + 3
    stats = tile_statistics(x, tiling)
    assert stats.shape == (2, tiling.entries, 2, 4)
    torch.testing.assert_close(stats, one_by_one(FeatureMap.of(x), tiling), rtol=0, atol=1e-12)
    counts = tiling.counts(x)
    assert counts.shape == (tiling.entries,) and counts.sum() == x[0, 0].numel()
    assert (counts[0] == 0) == (tiling.width >= tiling.rows)
    mean, squares = channel_statistics(stats, tiling)
    torch.testing.assert_close(mean, x.mean((2, 3)), rtol=0, atol=1e-13)
    expected = (x - x.mean((2, 3), keepdim=True)).square().sum((2, 3))
    torch.testing.assert_close(squares, expected, rtol=1e-12, atol=0)
