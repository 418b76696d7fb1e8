"""Forward process: `kernels.q_sample`."""

import pytest
import torch

from ddpm_fast import NoiseSchedule
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.q_sample import q_sample, q_sample_reference
from ddpm_fast.testing import assert_as_accurate

SHAPES = [(1, 3, 32, 32), (3, 3, 7, 5), (2, 1, 1, 1), (2, 4, 9, 1), (2, 1, 28, 28), (2, 5, 3, 17)]
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}


def case(shape, dtype, layout, device):
    torch.manual_seed(0)
    x_0 = torch.randn(shape).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    t, n = torch.randint(0, 1000, shape[:1]), shape[0]
    seed, image = torch.tensor([7, -9, 11])[:n], torch.arange(n) + 2**33
    vectors = (v.to(device) for v in (t, torch.arange(n) * 1000, seed, image))
    return x_0, NoiseSchedule.linear().q_sample_table(device), *vectors


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.each_value
def test_kernel(shape, dtype, layout, device):
    x_0, coef, t, row, seed, image = case(shape, dtype, layout, device)
    eps = N.noise_reference(seed, image, row, N.Q_SAMPLE, shape[1:])
    exact = q_sample_reference(x_0.double(), eps.double(), coef.double(), t)
    plain = q_sample_reference(x_0, eps, coef, t)
    got = q_sample(x_0, coef, t, row, seed, image)
    assert_as_accurate(got, plain, exact)
    assert torch.equal(got, plain)  # the same operations in the same order, without fusion
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.kernel
def test_kernel_reads_slices_in_place(device):
    x_0, *rest = case((3, 6, 8, 8), torch.float32, "channels-last", device)
    for part in (x_0[:, :3], x_0[:, ::2], x_0[:, :, 2:5]):
        got = q_sample(part, *rest)
        assert torch.equal(got, q_sample(part.contiguous(), *rest))


@pytest.mark.kernel
def test_kernel_with_empty_batch(device):
    x_0, coef, *rest = case((2, 3, 4, 4), torch.float32, "channels-first", device)
    assert q_sample(x_0[:0], coef, *(v[:0] for v in rest)).shape == (0, 3, 4, 4)


@pytest.mark.kernel
def test_opcheck(device):
    torch.library.opcheck(q_sample, case((2, 3, 5, 7), torch.float32, "channels-first", device))


def test_opcheck_of_the_reference():
    torch.library.opcheck(q_sample, case((2, 3, 5, 7), torch.float32, "channels-first", "cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_op_against_fp64(layout):
    x_0, coef, t, row, seed, image = case((3, 3, 7, 5), torch.float32, layout, "cpu")
    schedule = NoiseSchedule.linear()
    eps = N.noise_reference(seed, image, row, N.Q_SAMPLE, (3, 7, 5)).double()
    bar = torch.tensor(schedule.alpha_bar[t.numpy()])[:, None, None, None]
    exact = bar.sqrt() * x_0.double() + (1 - bar).sqrt() * eps  # Ho et al. 2020, eq. 4, as written
    assert (q_sample(x_0, coef, t, row, seed, image) - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_0=torch.zeros(2, 3, 4)), "x_0 is"),
        (dict(x_0=torch.zeros(2, 3, 4, 4, dtype=torch.int32)), "x_0 is"),
        (dict(coef=torch.zeros(1000, 3)), "coef is"),
        (dict(t=torch.zeros(3, dtype=torch.int64)), r"t is .*\[2\]"),
        (dict(seed=torch.zeros(2)), "seed is"),
    ],
)
def test_refuses(change, message):
    names = ("x_0", "coef", "t", "noise_row", "seed", "image")
    args = case((2, 3, 4, 4), torch.float32, "channels-first", "cpu")
    kwargs = dict(zip(names, args, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        q_sample(**kwargs)
