"""Fused UNet on a GPU. Kernel tests also run on a GPU: pytest -m kernel."""

import warnings

import pytest
import torch

from bench.workloads import NETWORKS
from ddpm_fast import UNet
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.utils.numerics import relative_error

pytestmark = pytest.mark.gpu


def cifar():
    torch.manual_seed(0)
    return UNet(NETWORKS["cifar10"]).eval().requires_grad_(False).cuda()


def inputs(batch):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 32, 32, generator=generator).cuda(), (
        torch.arange(batch) * 37 % 1000
    ).cuda()


def types():
    return [
        "fp32",
        "fp16",
        "bf16",
        *(["fp8"] if torch.cuda.get_device_capability() >= (8, 9) else []),
    ]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("batch", [1, 16])
def test_every_launch_passes_its_self_check(dtype, batch, tmp_path, monkeypatch):
    if dtype not in types():
        pytest.skip("this GPU has no e4m3")
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*deterministic.*")  # cuBLAS, where weights are packed
        fused = FusedUNet(cifar(), batch, dtype)
    assert not fused.plan().fallbacks and fused.invariant


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_bits_do_not_depend_on_the_batch(dtype):
    if dtype not in types():
        pytest.skip("this GPU has no e4m3")
    unet = cifar()
    x, t = inputs(256)
    expected = FusedUNet(unet, 256, dtype, check=False)(x, t)
    for batch in (1, 3, 64):
        fused = FusedUNet(unet, batch, dtype, check=False)
        for first in (0, 101, 256 - batch):
            assert torch.equal(
                fused(x[first : first + batch], t[first : first + batch]),
                expected[first : first + batch],
            )


def test_accuracy_by_type(figure):
    unet, (x, t) = cifar(), inputs(16)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact = unet.double()(x.double(), t)
    unet.float()
    errors = {}
    for dtype in types():
        fused = FusedUNet(unet, 16, dtype, check=False)
        fused.plan().poison()
        errors[dtype] = relative_error(fused(x, t), exact)
    plain = {
        "fp32": relative_error(unet(x, t), exact),
        "fp16": relative_error(unet.half()(x, t), exact),
    }
    plain["bf16"] = relative_error(unet.bfloat16()(x, t), exact)
    figure(
        "FusedUNet on the GPU against fp64", ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
    )
    assert all(errors[d] <= 2 * plain[d] for d in plain) and errors.get("fp8", 0) < 0.15


def test_a_plan_can_be_captured():
    fused = FusedUNet(cifar(), 4, "bf16", check=False)
    x, t = inputs(4)
    expected = fused(x, t)
    plan = fused.plan()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    plan.poison()
    graph.replay()
    assert torch.equal(plan.maps[plan.out].pixels, expected)
