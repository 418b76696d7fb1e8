"""What only a GPU can show. The kernels' own tests run there too: pytest -m "gpu or kernel"."""

import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels.ddpm_step import ddpm_step, ddpm_step_reference
from ddpm_fast.solver import choose_timesteps, step_table
from ddpm_fast.testing import relative_error

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
    half = relative_error(unet.bfloat16().to(memory_format=torch.channels_last)(x.cuda(), t.cuda()).cpu(), exact)
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
    t, coef = table.to("cuda")
    with torch.no_grad():
        sampler.step(state, t, coef, table.learned)  # compiles and chooses algorithms
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                sampler.step(state, t, coef, table.learned)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_more_elements_than_32_bits_count():
    batch, shape = 1400, (3, 720, 720)
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    table = step_table(SCHEDULE, "ddpm", choose_timesteps(1000, 10)).to("cuda")[1]
    x = torch.zeros(batch, 720, 720, 3, device="cuda").permute(0, 3, 1, 2)
    out = torch.ones(batch, 720, 720, 3, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    seed, image = torch.zeros(batch, dtype=torch.int64, device="cuda"), torch.arange(batch, device="cuda")
    row = torch.zeros(batch, dtype=torch.int32, device="cuda")
    ddpm_step(x, out, table, row, seed, image)
    z = N.noise_reference(seed[-1:], image[-1:], row[-1:], N.REVERSE, shape)
    assert torch.equal(x[-1:], ddpm_step_reference(torch.zeros_like(z), out[-1:], z, table, row[-1:]))
