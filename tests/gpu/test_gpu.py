"""Tests that need a GPU. Kernel tests also run on a GPU: pytest -m "gpu or kernel"."""

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.data.datasets import ImageData
from ddpm_fast.diffusion.presets import EXACT
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.ddpm_step import ddpm_step, ddpm_step_reference
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.numerics import relative_error

pytestmark = pytest.mark.gpu
SCHEDULE = NoiseSchedule.linear()


@pytest.fixture(autouse=True)
def full_fp32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def cifar():
    torch.manual_seed(0)
    return UNet(UNetConfig()).eval()


@torch.no_grad()
def test_unet_on_the_gpu_equals_the_unet_on_the_cpu(figure):
    unet, x, t = cifar(), torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 500, 999])
    exact = unet.double()(x.double(), t)
    result = unet.float().cuda()(x.cuda(), t.cuda()).cpu()
    error = relative_error(result, exact)
    half = relative_error(
        unet.bfloat16().to(memory_format=torch.channels_last)(x.cuda(), t.cuda()).cpu(), exact
    )
    figure("CIFAR-10 UNet on the GPU against fp64: fp32, bf16", f"{error:.1e}, {half:.1e}")
    assert error < 1e-5 and half < 0.05


def test_noise_is_bit_exact_on_the_gpu():
    args = (torch.tensor([-1, 5]), torch.tensor([2**40, 0]), torch.tensor([0, 999]))
    result = N.noise(*(v.cuda() for v in args), N.X_T, 3, 129, 65)
    expected = N.noise_reference(*args, N.X_T, (3, 129, 65))
    assert torch.equal(result.cpu().view(torch.int32), expected.view(torch.int32))


def test_images_on_the_gpu_equal_those_on_the_cpu():
    options = dict(steps=10, output="float", seed=3)
    expected = Sampler(cifar(), SCHEDULE, (3, 32, 32)).sample(2, **options)
    result = Sampler(cifar().cuda(), SCHEDULE, (3, 32, 32)).sample(2, **options)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-3)


def test_the_loop_never_waits_for_the_device():
    sampler = Sampler(cifar().cuda(), SCHEDULE, (3, 32, 32))
    table = sampler.table(steps=5)
    state = sampler.begin(torch.arange(4), 0)
    run = sampler.engine.steps(state, table)
    next(run)  # compiles and chooses algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert list(run) == [2, 3, 4, 5]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_elements():
    batch, shape = 1400, (3, 720, 720)
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    table = EXACT.table(SCHEDULE, "ddpm", choose_timesteps(1000, 10)).padded(11)[1].cuda()
    x = torch.zeros(batch, 720, 720, 3, device="cuda").permute(0, 3, 1, 2)
    out = torch.ones(batch, 720, 720, 3, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    seed, image = (
        torch.zeros(batch, dtype=torch.int64, device="cuda"),
        torch.arange(batch, device="cuda"),
    )
    row = torch.zeros(batch, dtype=torch.int32, device="cuda")
    ddpm_step(x, out, table, row, seed, image)
    z = N.noise_reference(seed[-1:], image[-1:], row[-1:], N.REVERSE, shape)
    assert torch.equal(
        x[-1:], ddpm_step_reference(torch.zeros_like(z), out[-1:], z, table, row[-1:])
    )


def trainer(device, **options):
    generator = np.random.default_rng(0)
    data = ImageData(
        generator.integers(0, 256, (64, 32, 32, 1), dtype=np.uint8), np.arange(64) % 10
    )
    torch.manual_seed(0)
    config = dict(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        channels=(32, 64),
        layers=1,
        attention=(False, True),
    )
    return Trainer(
        UNet(UNetConfig(**config, num_classes=10)),
        SCHEDULE,
        data,
        TrainConfig(32, **options),
        device,
    )


def test_training_on_the_gpu_equals_training_on_the_cpu():
    """Order, timesteps, flips and noise are bit-exact; weights are equal up to rounding errors."""
    on_cpu, on_gpu = (trainer(device, random_flip=True) for device in ("cpu", "cuda"))
    for number in (0, 5):
        expected, result = (t._noised(t.loader.batch(number)) for t in (on_cpu, on_gpu))
        for name in ("x_0", "t", "row", "image", "labels"):
            assert torch.equal(getattr(expected, name), getattr(result, name).cpu())
        assert relative_error(result.x_t.cpu(), expected.x_t) < 1e-6
    for _ in range(3):
        on_cpu.step()
        on_gpu.step()
    assert relative_error(on_gpu.weights.detach().cpu(), on_cpu.weights.detach()) < 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_training_step_never_waits_for_the_device(precision):
    t = trainer("cuda", mixed_precision=precision)
    t.step()  # compiles and chooses algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            t.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert t.means()["skipped"] <= 1


def test_resumed_training_on_the_gpu_is_bit_exact():
    straight = trainer("cuda", mixed_precision="bf16")
    for _ in range(4):
        straight.step()
    saved = {k: v.clone() for k, v in straight.state().items()}
    resumed = trainer("cuda", mixed_precision="bf16")
    resumed.load_state(saved, 4)
    for t in (straight, resumed):
        for _ in range(4):
            t.step()
    assert torch.equal(straight.weights, resumed.weights) and torch.equal(
        straight.average, resumed.average
    )
