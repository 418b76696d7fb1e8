"""Projection of the time embedding for all layers: `kernels.time_embedding`."""

import pytest
import torch

from ddpm_fast.kernels._gemm import Target, choose_tiles
from ddpm_fast.kernels.time_embedding import TimeEmbeddingProjection, time_embedding_reference
from ddpm_fast.testing import assert_operation, assert_written, poisoned, relative_error

STEPS, CLASSES, WIDTH = 20, 7, 64


def case(n, outputs, dtype, device):
    """Returns (operation, t, label) for n images; the weights are exact in `dtype`."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng).to(device)
    weight = (normal(outputs, WIDTH) * WIDTH**-0.5).to(dtype)
    target = Target.of(torch.device(device))
    tiles = choose_tiles(target, dtype, WIDTH, outputs, n, tma=False, warps=4)
    time, classes, bias = normal(STEPS, WIDTH), normal(CLASSES, WIDTH), normal(outputs)
    t = torch.randint(STEPS, (n,), generator=rng).to(device)
    label = torch.randint(CLASSES, (n,), generator=rng).to(device)
    return TimeEmbeddingProjection(time, classes, weight, bias, tiles), t, label


def reference(op, t, label, dtype):
    time, classes, weight, bias = (v.to(dtype) for v in (op.time, op.classes, op.weight, op.bias))
    return time_embedding_reference(time, classes, t, label, weight, bias)[:, :, None, None]


@pytest.mark.kernel
@pytest.mark.parametrize(("n", "outputs"), [(1, 64), (5, 80), (130, 192)])
def test_fp32(n, outputs, device):
    """The fallback computes SiLU in fp32, so its tolerance is that of fp32."""
    op, t, label = case(n, outputs, torch.float32, device)
    out = poisoned(n, 1, 1, outputs, torch.float32, device, bordered=False)
    assert_operation(
        op, out, lambda dtype: reference(op, t, label, dtype), fallback=1e-6, t=t, label=label
    )


@pytest.mark.kernel
def test_fp16_operands(device):
    op, t, label = case(5, 80, torch.float16, device)
    exact = reference(op, t, label, torch.float64)
    for run in (op.run, op.fallback):
        out = poisoned(5, 1, 1, 80, torch.float32, device, bordered=False)
        run(out=out, t=t, label=label)
        assert_written(out)
        assert relative_error(out.pixels, exact) < 2**-11  # SiLU is rounded to fp16


def test_reference_of_one_row_by_hand():
    time, classes = torch.tensor([[0.0], [2.0]]), torch.tensor([[-2.0], [1.0]])
    weight = torch.tensor([[3.0]])
    got = time_embedding_reference(
        time, classes, torch.tensor([1, 1]), torch.tensor([0, 1]), weight, torch.tensor([0.5])
    )
    assert got[0].item() == 0.5  # SiLU(0) = 0
    assert got[1].item() == pytest.approx(0.5 + 9 / (1 + 2.718281828459045**-3))
