"""What only a GPU can show. The kernels' own tests run there too: pytest -m "gpu or kernel"."""

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
def test_unet_on_the_gpu_is_the_unet_on_the_cpu(figure):
    unet, x, t = cifar(), torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 500, 999])
    exact = unet.double()(x.double(), t)
    got = unet.float().cuda()(x.cuda(), t.cuda()).cpu()
    error = relative_error(got, exact)
    half = relative_error(
        unet.bfloat16().to(memory_format=torch.channels_last)(x.cuda(), t.cuda()).cpu(), exact
    )
    figure("CIFAR-10 UNet on the GPU against fp64: fp32, bf16", f"{error:.1e}, {half:.1e}")
    assert error < 1e-5 and half < 0.05


def test_noise_of_the_gpu_is_the_noise_of_the_cpu():
    args = (torch.tensor([-1, 5]), torch.tensor([2**40, 0]), torch.tensor([0, 999]))
    got = N.noise(*(v.cuda() for v in args), N.X_T, 3, 129, 65)
    want = N.noise_reference(*args, N.X_T, (3, 129, 65))
    assert torch.equal(got.cpu().view(torch.int32), want.view(torch.int32))


def test_images_of_the_gpu_are_the_images_of_the_cpu():
    options = dict(steps=10, output="float", seed=3)
    want = Sampler(cifar(), SCHEDULE, (3, 32, 32)).sample(2, **options)
    got = Sampler(cifar().cuda(), SCHEDULE, (3, 32, 32)).sample(2, **options)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-3)


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


def test_more_elements_than_32_bits_count():
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


def test_training_on_the_gpu_is_training_on_the_cpu():
    """Order, timesteps, flips and noise to the bit; the weights after some steps to rounding."""
    here, there = (trainer(device, random_flip=True) for device in ("cpu", "cuda"))
    for number in (0, 5):
        want, got = (t._noised(t.loader.batch(number)) for t in (here, there))
        for name in ("x_0", "t", "row", "image", "labels"):
            assert torch.equal(getattr(want, name), getattr(got, name).cpu())
        assert relative_error(got.x_t.cpu(), want.x_t) < 1e-6
    for _ in range(3):
        here.step()
        there.step()
    assert relative_error(there.weights.detach().cpu(), here.weights.detach()) < 1e-3


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


def test_a_resumed_training_on_the_gpu_goes_on():
    straight = trainer("cuda", mixed_precision="bf16")
    for _ in range(4):
        straight.step()
    held = {k: v.clone() for k, v in straight.state().items()}
    resumed = trainer("cuda", mixed_precision="bf16")
    resumed.load_state(held, 4)
    for t in (straight, resumed):
        for _ in range(4):
            t.step()
    assert torch.equal(straight.weights, resumed.weights) and torch.equal(
        straight.average, resumed.average
    )
