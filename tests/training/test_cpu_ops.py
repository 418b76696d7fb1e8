"""Fused GroupNorm + SiLU of training on a CPU: against fp64 autograd, and in the trainer."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import NoiseSchedule, UNet, UNetConfig
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.models.unet import norm_silu
from ddpm_fast.training import cpu_ops
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.cpu_ops import use_fp32_for_slow_ops, use_fused_norms
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.numerics import relative_error

pytest.importorskip("llvmlite")
from ddpm_fast.engines.cpu import group_norm_silu as fused
from ddpm_fast.engines.cpu import norm_loops
from ddpm_fast.engines.cpu.codegen import vector_width

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [
    (2, 32, 8, 8, 8),
    (3, 24, 5, 7, 8),
    (1, 96, 9, 4, 32),
    (2, 40, 3, 3, 4),
    (2, 8, 1, 1, 1),
    (1, 64, 16, 16, 16),
    (2, 12, 6, 2, 3),
]


def rows(x, dtype):
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def inputs(shape, dtype, time=True, residual=True, mean=0.0):
    n, c, h, w, groups = shape
    g = torch.Generator().manual_seed(c + h)
    draw = lambda *s: torch.randn(*s, generator=g)
    x, dy, dres = (
        rows(v, dtype) for v in (draw(n, c, h, w) + mean, draw(n, c, h, w), draw(n, c, h, w))
    )
    time = draw(n, c).to(dtype) if time else None
    return dict(
        x=x,
        time=time,
        gamma=draw(c) + 1,
        beta=draw(c),
        groups=groups,
        dy=dy,
        dres=dres if residual else None,
    )


def results_of(function, v, silu=True, dtype=None):
    """y and the gradients of x, time, gamma and beta."""
    cast = lambda t: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
    x, time, gamma, beta = (cast(v[k]) for k in ("x", "time", "gamma", "beta"))
    y, around = function(x, time, gamma, beta, v["groups"], 1e-5, silu)
    outputs, gradients = [y], [v["dy"].to(y.dtype)]
    if v["dres"] is not None:
        outputs, gradients = [*outputs, around], [*gradients, v["dres"].to(y.dtype)]
    leaves = [t for t in (x, time, gamma, beta) if t is not None]
    return [y.detach(), *torch.autograd.grad(outputs, leaves, gradients)]


def reference(x, time, gamma, beta, groups, eps, silu):
    return fused.group_norm_silu_reference(x, time, gamma, beta, groups, eps, silu), x


def pytorch(x, time, gamma, beta, groups, eps, silu):
    """The fallback without llvmlite, which computes gradients of bf16 in fp32."""
    norm = torch.nn.GroupNorm(groups, len(gamma), eps)
    del norm.weight, norm.bias
    norm.weight, norm.bias = gamma, beta
    y = cpu_ops._group_norm(norm, x if time is None else x + time[:, :, None, None])
    return F.silu(y) if silu else y, x


def check(v, silu=True):
    exact = results_of(reference, v, silu, torch.float64)
    results, fallbacks = results_of(fused.group_norm_silu, v, silu), results_of(pytorch, v, silu)
    floor = [1e-7, 2e-7, *[4e-7] * 3]
    if v["x"].dtype == BF16:
        floor = [2e-3, 2e-3, *[2e-3] * (v["time"] is not None), 1e-6, 1e-6]
    assert len(results) == len(exact)
    for k, (result, fallback, truth) in enumerate(zip(results, fallbacks, exact, strict=True)):
        assert result.shape == truth.shape and result.isfinite().all()
        assert relative_error(result, truth) <= max(relative_error(fallback, truth), floor[k]), k


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    for time in (True, False):
        for silu in (True, False):
            for residual in (True, False):
                check(inputs(shape, dtype, time, residual), silu)


def test_as_many_pixels_as_in_a_real_network():
    """The order of a long sum matters."""
    check(inputs((2, 32, 32, 32, 8), FP32))


@pytest.mark.parametrize("width", [w for w in (4, 8, 16) if w <= vector_width()])
def test_narrower_vectors(width, monkeypatch):
    monkeypatch.setattr(norm_loops, "vector_width", lambda: width)
    norm_loops.fitting_width.cache_clear()
    try:
        for dtype in (FP32, BF16):
            for shape in SHAPES[:3]:
                check(inputs(shape, dtype))
    finally:
        monkeypatch.undo()
        norm_loops.fitting_width.cache_clear()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_cancellation_with_a_large_mean(dtype):
    check(inputs((2, 32, 32, 32, 8), dtype, mean=30.0 if dtype == BF16 else 1000.0))


def test_gradient_of_the_reference():
    v = inputs((2, 4, 2, 3, 2), FP32)
    leaves = [v[k].double().contiguous().requires_grad_() for k in ("x", "time", "gamma", "beta")]
    for silu in (True, False):
        assert torch.autograd.gradcheck(
            lambda *a, silu=silu: fused.group_norm_silu_reference(*a, 2, 1e-5, silu), leaves
        )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr(fused, "MIN_ELEMENTS", 0)
    v, before = inputs((5, 32, 8, 8, 8), dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results_of(fused.group_norm_silu, v)
        torch.set_num_threads(2)
        two = results_of(fused.group_norm_silu, v)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_bf16_rounds_to_nearest_even_and_propagates_nan():
    c = 8
    x = rows(torch.randn(2, c, 4, 4, generator=torch.Generator().manual_seed(3)), BF16)
    x[0, 0, 0, 0] = float("nan")
    affine = dict(gamma=torch.ones(c), beta=torch.zeros(c), groups=2)
    v = dict(x=x, time=None, **affine, dy=torch.ones_like(x), dres=None)
    y, dx, *_ = results_of(fused.group_norm_silu, v)
    for result in (y, dx):
        assert result[0, :4].isnan().all()
        assert result[0, 4:].isfinite().all() and result[1].isfinite().all()
    fp32 = results_of(fused.group_norm_silu, dict(v, x=x.float()))
    for result, truth in zip((y, dx), fp32, strict=False):
        assert torch.equal(result.float().nan_to_num(7), truth.to(BF16).float().nan_to_num(7))


def test_either_output_may_be_unused():
    v = inputs((2, 8, 4, 4, 2), FP32)
    x = v["x"].requires_grad_()
    y, around = fused.group_norm_silu(x, None, v["gamma"], v["beta"], 2, 1e-5)
    assert torch.equal(torch.autograd.grad(around, x, v["dy"])[0], v["dy"])
    y, _ = fused.group_norm_silu(x, None, v["gamma"], v["beta"], 2, 1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


# ---- in the network and in the trainer

DATA = ImageData(
    np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8), np.arange(32) % 3
)
NETWORKS = {
    "default": {},
    "scale and shift": dict(scale_shift=True),
    "residual blocks resample": dict(down_resample="resnet", up_resample="resnet"),
    "channels without a vector width": dict(channels=(6, 10), norm_groups=2, head_dim=5),
    "dropout": dict(dropout=0.2),
}


def network(name="default"):
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    config |= dict(attention=(False, True), norm_groups=4, num_classes=3)
    return UNet(UNetConfig(**config | NETWORKS[name]))


def trainer(name="default", **options):
    steps = dict(train_batch_size=16, max_train_steps=100, lr_warmup_steps=3, learning_rate=1e-3)
    config = TrainConfig(**steps | options)
    return Trainer(network(name), NoiseSchedule.linear(), DATA, config, "cpu")


def gradient_of(unet, autocast=False):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = unet(x.to(unet.dtype), t, labels)
    gradients = torch.autograd.grad(out.double().square().mean(), list(unet.parameters()))
    return torch.cat([g.double().flatten() for g in gradients])


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "dropout"])
def test_gradient_of_the_network_is_as_accurate_as_without_fusion(name):
    exact = gradient_of(network(name).double())
    for autocast in (False, True):
        plain, fused_norms = network(name), network(name)
        if autocast:
            use_fp32_for_slow_ops(plain)
            use_fp32_for_slow_ops(fused_norms)
        use_fused_norms(fused_norms)
        error = relative_error(gradient_of(fused_norms, autocast), exact)
        assert error <= max(1.1 * relative_error(gradient_of(plain, autocast), exact), 1e-6)
        assert error < (0.05 if autocast else 1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["default", "dropout"])
def test_trainer_with_and_without_llvmlite(name, precision, monkeypatch):
    with_cpu_norm = trainer(name, mixed_precision=precision)
    monkeypatch.setattr(cpu_ops, "cpu_norm", None)
    without = trainer(name, mixed_precision=precision)
    for _ in range(2):
        without.step()
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(cpu_ops.cpu_norm, "group_norm_silu", _counted(fused.group_norm_silu, calls))
    for _ in range(2):
        with_cpu_norm.step()
    assert calls
    tolerance = 2e-2 if precision == "bf16" else 1e-5
    assert relative_error(with_cpu_norm.weights.grad, without.weights.grad) < tolerance
    losses = with_cpu_norm.means()["loss"], without.means()["loss"]
    assert abs(losses[0] - losses[1]) < 0.1 * tolerance * losses[1]


def _counted(function, calls):
    return lambda *a: (calls.append(1), function(*a))[1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumed_training_is_bit_exact(precision):
    straight, stopped, resumed = (trainer(mixed_precision=precision) for _ in range(3))
    for _ in range(4):
        straight.step()
    for _ in range(2):
        stopped.step()
    resumed.load_state(stopped.state(), stopped.done)
    for _ in range(2):
        resumed.step()
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


def test_a_network_in_training_computes_the_same_function():
    t = trainer()
    t.step()
    x, times, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900]), torch.tensor([0, 1, 2])
    plain = network()
    plain.load_state_dict(t.unet.state_dict())
    copied = copy.deepcopy(t.unet)
    with torch.no_grad():
        expected = plain.double()(x.double(), times, labels)
        for unet in (t.unet, t.unet.eval(), copied):
            assert relative_error(unet(x, times, labels), expected) < 1e-5
        before = copied(x, times, labels)
    t.step()
    with torch.no_grad():
        assert torch.equal(copied(x, times, labels), before)  # a copy does not share the weights
    assert t.validation_loss(t.unet, DATA, 32) > 0 and t.validation_loss(t.ema, DATA, 32) > 0


def test_fallback_for_unsupported_shapes_and_dtypes(monkeypatch):
    norm = torch.nn.GroupNorm(2, 8).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(cpu_ops._norm_silu(norm, x)[0], F.silu(norm(x)))
    norm, x = norm.float(), x.float()
    assert fused.fits(x, norm.weight)
    assert not fused.fits(x[:, :6], norm.weight) and not fused.fits(x[:0], norm.weight)
    monkeypatch.setattr(cpu_ops, "cpu_norm", None)
    assert torch.equal(cpu_ops._norm_silu(norm, x)[0], F.silu(norm(x)))


def test_products_in_fp32_on_a_cpu_without_bf16(monkeypatch):
    """The result is rounded once, to autocast's dtype."""
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    for native in (True, False):
        monkeypatch.setattr(cpu_ops, "is_native", lambda dtype, native=native: native)
        unet = network()
        use_fp32_for_slow_ops(unet)
        products = [m for m in unet.modules() if isinstance(m, layers)]
        assert any("forward" in vars(m) for m in products) is not native
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(8, 8, 3), torch.randn(2, 8, 5, 5)
    linear = torch.nn.Linear(8, 4), torch.randn(3, 8)
    for layer, x in (convolution, linear):
        expected = layer(x)
        with torch.autocast("cpu", BF16):
            result = cpu_ops._product(layer, x)
        assert result.dtype == BF16 and torch.equal(result, expected.to(BF16))


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.full)])
def test_the_network_of_a_compiling_trainer_is_one_graph(precision, monkeypatch):
    compile_unet = lambda unet: torch._dynamo.optimize("aot_eager", nopython=True)(unet)
    monkeypatch.setattr(torch, "compile", compile_unet)
    compiled = trainer(mixed_precision=precision, compile=True)
    eager = trainer(mixed_precision=precision)
    compiled.step()
    eager.step()
    tolerance = 2e-2 if precision == "bf16" else 1e-5
    assert relative_error(compiled.weights.grad, eager.weights.grad) < tolerance


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_pytorchs_default_dtype_does_not_change_the_gradient(dtype):
    norm = torch.nn.GroupNorm(4, 16)
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients():
        y = cpu_ops._norm_silu(norm, x, torch.ones(2, 16, dtype=torch.float32))[0]
        return [y, *torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])]

    expected = gradients()
    torch.set_default_dtype(dtype)
    try:
        results = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_fallback_on_a_machine_without_llvm_support(monkeypatch):
    def unsupported(width):
        raise RuntimeError("no such target")

    monkeypatch.setattr(cpu_ops.cpu_norm, "functions", unsupported)
    unet = network()
    assert cpu_ops.use_fused_norms(unet) == "LLVM does not support this machine (no such target)"
    functions = {vars(m)["norm_silu"] for m in unet.modules() if "norm_silu" in vars(m)}
    assert functions == {norm_silu}
