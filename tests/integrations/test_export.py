"""A sampling step under torch.compile(fullgraph=True), torch.export and AOTInductor."""

import subprocess
import sys

import pytest
import torch

from ddpm_fast import NoiseSchedule, UNet, UNetConfig
from ddpm_fast.diffusion.presets import EXACT
from ddpm_fast.diffusion.timesteps import choose_timesteps
from ddpm_fast.kernels import noise
from ddpm_fast.kernels.ddpm_step import ddpm_step
from ddpm_fast.utils.numerics import relative_error

TABLE = EXACT.table(NoiseSchedule.linear(), "ddpm", choose_timesteps(1000, 5))


class Step(torch.nn.Module):
    """x_t -> x_{t-1} of the images at their rows of a step table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = UNetConfig(
            sample_size=8, channels=(8, 16), layers=1, attention=(False, True), norm_groups=4
        )
        self.unet = UNet(config).eval().requires_grad_(False)
        t, coef = TABLE.padded(len(TABLE) + 1)
        self.register_buffer("t", t)
        self.register_buffer("coef", coef)

    def forward(self, x, step, seed, image):
        x = x.clone()
        ddpm_step(x, self.unet(x, self.t[step]), self.coef, step, seed, image)
        return x


def arguments(batch):
    image = torch.arange(batch)
    seed = torch.full((batch,), 7)
    x = noise.noise(seed, image, torch.zeros_like(image), noise.X_T, 3, 8, 8)
    return x.contiguous(), image % len(TABLE), seed, image


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.mark.full
def test_torch_compile_without_graph_breaks(step):
    compiled = torch.compile(step, fullgraph=True)
    assert relative_error(compiled(*arguments(3)), step(*arguments(3))) < 1e-5


@pytest.fixture(scope="module")
def exported(step):
    batch = torch.export.Dim("batch", min=1, max=512)
    return torch.export.export(
        step, arguments(2), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}, {0: batch})
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_torch_export_with_a_dynamic_batch(step, exported, batch):
    assert relative_error(exported.module()(*arguments(batch)), step(*arguments(batch))) < 1e-6


def test_noise_with_a_dynamic_batch():
    class Noise(torch.nn.Module):
        def forward(self, seed, image):
            row = torch.zeros_like(image)
            z = noise.noise(seed, image, row, noise.X_T, 3, 4, 4)
            return z, noise.words(seed, image, row, noise.LABEL, 2)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Noise(), arguments(2)[2:], dynamic_shapes=({0: batch}, {0: batch})
    )
    for result, expected in zip(
        program.module()(*arguments(5)[2:]), Noise()(*arguments(5)[2:]), strict=True
    ):
        assert torch.equal(result, expected)


LOAD = """
import sys, torch, ddpm_fast.kernels.ddpm_step
program = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([program(*a) for a in torch.load(sys.argv[2])], sys.argv[3])
"""


@pytest.mark.acceptance
def test_aotinductor_package_in_another_process(step, exported, tmp_path):
    """The operations are Python's, so the loading process imports ddpm_fast."""
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "step.pt2")
    )
    inputs = [arguments(batch) for batch in (1, 4)]
    torch.save(inputs, tmp_path / "in.pt")
    command = [sys.executable, "-c", LOAD, package, tmp_path / "in.pt", tmp_path / "out.pt"]
    subprocess.run(list(map(str, command)), check=True)
    for given, result in zip(inputs, torch.load(tmp_path / "out.pt"), strict=True):
        assert relative_error(result, step(*given)) < 1e-5
