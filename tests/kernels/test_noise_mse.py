"""Training loss and its gradient: `kernels.noise_mse`."""

import pytest
import torch

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.losses import target_table
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_reference, target_reference
from ddpm_fast.kernels.q_sample import q_sample
from ddpm_fast.testing import assert_as_accurate

SHAPES = [(1, 3, 32, 32), (3, 3, 7, 5), (2, 1, 1, 1), (2, 4, 9, 1), (2, 1, 28, 28), (2, 5, 3, 17)]
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
SCHEDULE = NoiseSchedule.linear()


def case(shape, dtype=torch.float32, layout="channels-last", prediction="eps", device="cpu"):
    torch.manual_seed(0)
    maps = torch.randn(2, *shape).to(device)
    out, x_0 = (v.contiguous(memory_format=LAYOUTS[layout]) for v in maps)
    t, n = torch.randint(0, 1000, shape[:1]), shape[0]
    seed, image = torch.tensor([7, -9, 11])[:n], torch.arange(n) + 2**33
    vectors = (v.to(device) for v in (t, torch.arange(n) * 1000, seed, image))
    coef = target_table(SCHEDULE, prediction, device)
    return out.to(dtype), None if prediction == "eps" else x_0, coef, *vectors


def check(args):
    """Compares loss and gradient of the operation with plain PyTorch and fp64."""
    out, x_0, coef, t, row, seed, image = args
    eps = N.noise_reference(seed, image, row, N.Q_SAMPLE, tuple(out.shape[1:]))
    weights = torch.linspace(0.5, 2, len(out), device=out.device)

    def loss_and_gradient(call, out):
        out = out.detach().requires_grad_()
        loss = call(out)
        return loss.detach(), torch.autograd.grad((loss * weights).sum(), out)[0]

    exact_args = eps.double(), None if x_0 is None else x_0.double(), coef.double(), t
    exact = loss_and_gradient(lambda o: noise_mse_reference(o, *exact_args), out.double())
    plain = loss_and_gradient(lambda o: noise_mse_reference(o, eps, x_0, coef, t), out)
    got = loss_and_gradient(lambda o: noise_mse(o, x_0, coef, t, row, seed, image), out)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_as_accurate(g, p, e)
    assert got[0].dtype == torch.float32 and got[1].dtype == out.dtype
    return got


@pytest.mark.kernel
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.each_value
def test_kernel(shape, dtype, layout, prediction, device):
    check(case(shape, dtype, layout, prediction, device))


@pytest.mark.kernel
def test_kernel_reads_half_of_a_wider_output(device):
    """If the network learns its variance, the loss uses only the mean."""
    out, *rest = case((2, 3, 8, 8), device=device)
    with_variance = torch.cat([out, torch.full_like(out, float("nan"))], dim=1)
    with_variance = with_variance.contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = noise_mse(with_variance[:, :3], *rest)
    torch.testing.assert_close(loss, noise_mse(out, *rest))
    (gradient,) = torch.autograd.grad(loss.sum(), with_variance)
    assert gradient[:, :3].abs().min() > 0 and not gradient[:, 3:].any()


@pytest.mark.kernel
def test_kernel_with_empty_batch(device):
    out, x_0, coef, *rest = case((2, 3, 4, 4), device=device)
    assert noise_mse(out[:0], x_0, coef, *(v[:0] for v in rest)).shape == (0,)


@pytest.mark.kernel
def test_kernel_finds_the_noise_of_q_sample(device):
    """The loss of (x_t - signal x_0) / sigma, the exact eps, is only the rounding error."""
    shape = (3, 3, 9, 9)
    out, _, coef, t, row, seed, image = case(shape, device=device)
    t = torch.tensor([999, 500, 100], device=device)
    table = SCHEDULE.q_sample_table(device)
    x_t = q_sample(out, table, t, row, seed, image)
    signal, sigma = table[t].T[:, :, None, None, None]
    assert noise_mse((x_t - signal * out) / sigma, None, coef, t, row, seed, image).max() < 1e-12
    assert noise_mse((x_t - signal * out) / sigma, None, coef, t, row, seed, image + 1).min() > 1


@pytest.mark.kernel
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_opcheck(prediction, device):
    args = case((2, 3, 5, 7), prediction=prediction, device=device)
    torch.library.opcheck(noise_mse, (args[0].requires_grad_(), *args[1:]))


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_opcheck_of_the_reference(prediction):
    args = case((2, 3, 5, 7), prediction=prediction)
    torch.library.opcheck(noise_mse, (args[0].requires_grad_(), *args[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.each_value
def test_reference_op(dtype, prediction, layout):
    check(case((3, 3, 7, 5), dtype, layout, prediction))


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_gradcheck_of_the_reference(prediction):
    out, x_0, coef, t, row, seed, image = case((2, 2, 3, 3), prediction=prediction)
    eps = N.noise_reference(seed, image, row, N.Q_SAMPLE, (2, 3, 3)).double()
    x_0 = None if x_0 is None else x_0.double()
    out = out.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o: noise_mse_reference(o, eps, x_0, coef.double(), t), (out,)
    )


def test_targets_are_those_of_the_papers():
    torch.manual_seed(1)
    eps, x_0, t = *torch.randn(2, 4, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 10, 500, 999])
    bar = torch.tensor(SCHEDULE.alpha_bar[t.numpy()])[:, None, None, None]
    targets = {"eps": eps, "x_0": x_0, "v": bar.sqrt() * eps - (1 - bar).sqrt() * x_0}
    for prediction, target in targets.items():
        got = target_reference(eps, x_0, target_table(SCHEDULE, prediction).double(), t)
        torch.testing.assert_close(got, target, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out=torch.zeros(2, 3, 4, dtype=torch.int64)), r"out is .* floating \[B, C, H, W\]"),
        (dict(x_0=torch.zeros(2, 3, 4, 5)), r"x_0 is .* expected floating \(2, 3, 4, 4\)"),
        (dict(coef=torch.zeros(1000, 3)), "coef is"),
        (dict(t=torch.zeros(1, dtype=torch.int64)), "t is"),
        (dict(seed=torch.zeros(2)), "seed is"),
    ],
)
def test_refuses(change, message):
    names = ("out", "x_0", "coef", "t", "noise_row", "seed", "image")
    kwargs = dict(zip(names, case((2, 3, 4, 4)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        noise_mse(**kwargs)
