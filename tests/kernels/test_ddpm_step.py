"""Reverse step of every solver: `kernels.ddpm_step`."""

import itertools

import pytest
import torch

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.presets import EXACT
from ddpm_fast.diffusion.solvers import VARIANCES
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.ddpm_step import COLUMNS, ddpm_step, ddpm_step_reference, x_0_reference
from ddpm_fast.testing import assert_as_accurate

LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = [(1, 3, 32, 32), (2, 1, 1, 1), (3, 4, 9, 1), (4, 1, 28, 28), (2, 5, 3, 17)]
T = choose_timesteps(1000, 20)


def case(
    shape,
    *,
    dtype=torch.float32,
    layout="channels-last",
    out_layout=None,
    device="cpu",
    solver="ddpm",
    **options,
):
    torch.manual_seed(0)
    table = EXACT.table(NoiseSchedule.linear(), solver, T, **options)
    b, c, h, w = shape
    x_t = torch.randn(shape).to(device).contiguous(memory_format=LAYOUTS[layout])
    out = torch.randn(b, 2 * c if table.learned else c, h, w).to(device, dtype)
    out = out.contiguous(memory_format=LAYOUTS[out_layout or layout])
    row = torch.tensor([0, len(T) - 1, 7, 11])[:b]  # the first, the last and two other steps
    seed, image = torch.tensor([5, -1, 2**62, 0])[:b], torch.arange(b) + 2**35
    coef = table.padded(len(table) + 1)[1]
    vectors = (v.to(device) for v in (coef, row, seed, image))
    return x_t, out, *vectors, table.learned


def check(args, exactly=True):
    x_t, out, table, row, seed, image, learned = args
    z = N.noise_reference(seed, image, row, N.REVERSE, x_t.shape[1:])
    tensors = (x_t, out, z, table)
    exact = ddpm_step_reference(*(v.double() for v in tensors), row, learned)
    plain = ddpm_step_reference(*tensors, row, learned)
    got = x_t.clone(memory_format=torch.preserve_format)
    ddpm_step(got, out, table, row, seed, image, learned)
    assert_as_accurate(got, plain, exact)
    if exactly:
        assert torch.equal(got, plain)  # the same operations in the same order, without fusion


OPTIONS = [
    dict(prediction=p, variance=v, clip=c)
    for p, v, c in itertools.product(("eps", "x_0", "v"), VARIANCES, (1.0, None))
]


@pytest.mark.kernel
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_kernel_every_form(options, device):
    exactly = not options["variance"].startswith("learned")  # exp differs by a bit
    check(case((4, 3, 7, 5), device=device, **options), exactly)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids=" and ".join)
@pytest.mark.each_value
def test_kernel_shapes_and_layouts(shape, dtype, layouts, device):
    check(case(shape, dtype=dtype, layout=layouts[0], out_layout=layouts[1], device=device))


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_learned_layouts(layout, device):
    check(case((3, 3, 8, 8), layout=layout, device=device, variance="learned_range"), exactly=False)


@pytest.mark.kernel
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_given_noise(layout, variance, device):
    check_given(case((4, 3, 7, 5), layout=layout, device=device, variance=variance))


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_reference_op_given_noise(variance):
    check_given(case((4, 3, 7, 5), variance=variance))


def check_given(args):
    """Noise of another generator; seed and image must have no effect."""
    x_t, out, table, row, seed, image, learned = args
    z = torch.empty_like(x_t).copy_(torch.randn(x_t.shape))
    wide = [v.double() for v in (x_t, out, z, table)]
    exact = ddpm_step_reference(*wide, row, learned)
    plain = ddpm_step_reference(x_t, out, z, table, row, learned)
    result = x_t.clone(memory_format=torch.preserve_format)
    ddpm_step(result, out, table, row, seed + 1, image + 1, learned, z=z)
    assert_as_accurate(result, plain, exact)


@pytest.mark.kernel
def test_opcheck_given_noise(device):
    args = case((2, 3, 5, 7), device=device)
    torch.library.opcheck(ddpm_step, args, dict(z=torch.zeros_like(args[0])))


@pytest.mark.kernel
def test_kernel_tables_of_several_requests_share_a_batch(device):
    check_shared(device)


def test_reference_op_tables_of_several_requests_share_a_batch():
    check_shared("cpu")


def check_shared(device):
    """Images with tables of their solvers, one after the other in one tensor, are bit-exact."""
    ddpm, ddim = (
        case((4, 3, 7, 5), device=device, **options)
        for options in (dict(), dict(solver="ddim", eta=0.5))
    )
    x_t, out, table, row, *names, learned = ddpm
    expected = [x_t.clone(memory_format=torch.preserve_format) for _ in range(2)]
    ddpm_step(expected[0], out, table, row, *names, learned)
    ddpm_step(expected[1], out, ddim[2], row, *names, learned)
    both = torch.cat([table, ddim[2]])
    second = torch.tensor([False, True, False, True], device=x_t.device)
    ddpm_step(x_t, out, both, row + len(table) * second, *names, learned)
    for i in range(4):
        assert torch.equal(x_t[i], expected[i % 2][i])


def with_history(args):
    """Returns (x_{t-1}, new history) of the operation and of its reference in fp32 and fp64."""
    x_t, out, table, row, seed, image, learned = args
    torch.manual_seed(1)
    old = torch.randn_like(x_t)
    # the history is unused in the first step
    old[table[row.long(), COLUMNS.index("mean_old")] == 0] = float("nan")
    z = N.noise_reference(seed, image, row, N.REVERSE, x_t.shape[1:])
    got, x_0 = (v.clone(memory_format=torch.preserve_format) for v in (x_t, old))
    ddpm_step(got, out, table, row, seed, image, learned, x_0)

    def reference(dtype):
        x, o, noise, coef, history = (v.to(dtype) for v in (x_t, out, z, table, old))
        x_prev = ddpm_step_reference(x, o, noise, coef, row, learned, history)
        return x_prev, x_0_reference(x, o, coef, row)

    return (got, x_0), reference(torch.float32), reference(torch.float64)


@pytest.mark.kernel
@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++2m-sde", "ddim"])
@pytest.mark.parametrize("shape", [(4, 3, 7, 5), (4, 1, 28, 28), (2, 5, 3, 17)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.each_value
def test_kernel_history(layout, shape, solver, device):
    got, plain, exact = with_history(case(shape, layout=layout, device=device, solver=solver))
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_as_accurate(g, p, e)
        assert torch.equal(g, p)


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++2m-sde", "ddim"])
def test_reference_history(solver):
    got, plain, exact = with_history(case((4, 3, 7, 5), solver=solver))
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_as_accurate(g, p, e)


@pytest.mark.kernel
def test_opcheck_history(device):
    *args, learned = case((2, 3, 5, 7), device=device, solver="dpm++2m")
    torch.library.opcheck(ddpm_step, (*args, learned, torch.zeros_like(args[0])))


def test_opcheck_history_of_the_reference():
    *args, learned = case((2, 3, 5, 7), solver="dpm++2m")
    torch.library.opcheck(ddpm_step, (*args, learned, torch.zeros_like(args[0])))


@pytest.mark.kernel
def test_kernel_reads_half_of_a_wider_output(device):
    x_t, out, *rest = case((2, 3, 8, 8), device=device)
    with_variance = torch.cat([out, torch.full_like(out, float("nan"))], dim=1)
    with_variance = with_variance.contiguous(memory_format=torch.channels_last)
    check((x_t, with_variance[:, :3], *rest))


@pytest.mark.kernel
def test_kernel_keeps_nan(device):
    """NaN is not clipped to a valid pixel."""
    x_t, out, *rest = case((1, 1, 8, 8), device=device)
    out[0, 0, 3, 4] = float("nan")
    ddpm_step(x_t, out, *rest)
    assert x_t.isnan().nonzero().tolist() == [[0, 0, 3, 4]]


@pytest.mark.kernel
def test_planted_fault_is_detected(device):
    """Each fails: 1 % more sigma, the next row of the table, the noise of the next image."""
    x_t, out, table, row, seed, image, learned = case((2, 3, 8, 8), device=device)
    wrong = table.clone()
    wrong[:, COLUMNS.index("sigma")] *= 1.01
    z = N.noise_reference(seed, image, row, N.REVERSE, (3, 8, 8))
    exact = ddpm_step_reference(x_t.double(), out.double(), z.double(), table.double(), row)
    plain, next_row = ddpm_step_reference(x_t, out, z, table, row), (row + 1) % 20
    faults = (
        (wrong, row, seed, image),
        (table, next_row, seed, image),
        (table, row, seed, image + 1),
    )
    for args in faults:
        got = x_t.clone(memory_format=torch.preserve_format)
        ddpm_step(got, out, *args, learned)
        with pytest.raises(AssertionError, match="max error"):
            assert_as_accurate(got, plain, exact)


@pytest.mark.kernel
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_opcheck(variance, device):
    torch.library.opcheck(ddpm_step, case((2, 3, 5, 7), device=device, variance=variance))


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_opcheck_of_the_reference(variance):
    torch.library.opcheck(ddpm_step, case((2, 3, 5, 7), variance=variance))


@pytest.mark.parametrize(
    "options", [*OPTIONS, dict(solver="ddim", eta=0.5), dict(solver="ddim")], ids=str
)
def test_reference_op(options):
    check(case((4, 3, 7, 5), **options))


def test_last_step_adds_no_noise_for_any_learned_variance():
    x_t, out, table, row, seed, image, learned = case((4, 1, 4, 4), variance="learned_range")
    out[:, 1:] = 1e4  # exp overflows, but the last step is the mean
    ddpm_step(x_t, out, table, row, seed, image, learned)
    assert x_t[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(x_t=torch.zeros(2, 3, 4, 4, dtype=torch.float16)),
            r"expected float32 \[B, C, H, W\]",
        ),
        (dict(out=torch.zeros(2, 6, 4, 4)), r"expected floating \(2, 3, 4, 4\)"),
        (dict(learned=True), r"expected floating \(2, 6, 4, 4\) on cpu \(mean and variance\)"),
        (dict(table=torch.zeros(20, 5)), "table is"),
        (dict(step=torch.zeros(1, dtype=torch.int32)), r"step is .*\[2\]"),
        (dict(image=torch.zeros(2)), "image is"),
        # channels-first, while x_t is channels-last
        (
            dict(old=torch.zeros(2, 3, 4, 4)),
            "old is .*expected the dtype, shape, strides and device",
        ),
        (dict(z=torch.zeros(2, 3, 4, 4)), "z is .*expected the dtype, shape, strides and device"),
    ],
)
def test_refuses(change, message):
    names = ("x_t", "out", "table", "step", "seed", "image", "learned")
    kwargs = dict(zip(names, case((2, 3, 4, 4)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ddpm_step(**kwargs)


@pytest.mark.kernel
def test_refuses_rows_that_are_not_adjacent(device):
    x_t, _, *rest = case((2, 3, 8, 8), device=device)
    with pytest.raises(ValueError, match="expected whole images"):
        ddpm_step(x_t, torch.randn(2, 3, 8, 16, device=device)[..., ::2].transpose(2, 3), *rest)
