"""A forward pass for each network, batch size and precision, by ddpm_fast and the baselines."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from bench.workloads import NETWORKS, ROOT, TINY_UNET
from ddpm_fast import NoiseSchedule, UNet, load_pretrained
from ddpm_fast.benchmark.baselines import BASELINES, Baseline, baseline
from ddpm_fast.benchmark.runner import TOLERANCES
from ddpm_fast.benchmark.workload import Unavailable, Workload
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.models.unet import channels_last
from ddpm_fast.utils.numerics import relative_error

SIZES = {  # network -> batch sizes on a CPU, on a GPU
    "fashion_mnist": ((1, 16), (1, 64, 256)),
    "cifar10": ((1, 4), (1, 16, 256)),
    "celebahq256": ((), (1, 16)),
}


@cache
def workload_of(network: str, dtype: str, device: str, tiny: bool, folder: Path) -> Workload:
    if network == "fashion_mnist":
        checkpoint = load_pretrained(ROOT / "weights" / "fashion-mnist-32")
    else:
        torch.manual_seed(0)
        checkpoint = Checkpoint(
            UNet(TINY_UNET if tiny else NETWORKS[network]).eval(), NoiseSchedule.linear()
        )
    channels_last(checkpoint.unet.requires_grad_(False).to(device))
    return Workload(checkpoint, dtype, folder)


@cache
def baseline_of(name: str, workload: Workload) -> Baseline | str:
    """Created once for all batch sizes; the reason if it is unavailable."""
    try:
        return baseline(name, workload)
    except Unavailable as reason:
        return str(reason)


@torch.no_grad()
def error_of(engine: Baseline, workload: Workload, batch: int) -> float:
    """Relative error of two images' outputs against fp64."""
    inputs = workload.inputs(batch)
    exact = UNet(workload.unet.config).double().eval().to(workload.device)
    exact.load_state_dict(workload.unet.state_dict())
    return relative_error(
        engine.forward(*inputs)[:2], exact(inputs[0][:2].double(), *(v[:2] for v in inputs[1:]))
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_gpu = torch.cuda.is_available() and not metafunc.config.getoption("--tiny")
    dtypes = ["fp32", "bf16", "fp8"] if on_gpu else ["fp32"]
    metafunc.parametrize("name", BASELINES)
    metafunc.parametrize("dtype", dtypes)
    metafunc.parametrize(
        ("network", "batch"), [(n, b) for n, sizes in SIZES.items() for b in sizes[on_gpu]]
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


def test_forward(name, dtype, network, batch, timed, device, tiny, folder, benchmark):
    if tiny and (name not in ("ddpm_fast", "plain PyTorch", "diffusers") or batch > 1):
        pytest.skip("not in tiny")
    caches = folder / f"{network}-{dtype}"
    caches.mkdir(exist_ok=True)
    workload = workload_of(network, dtype, str(device), tiny, caches)
    engine = baseline_of(name, workload)
    if isinstance(engine, str):
        pytest.skip(f"{name}: {engine}")
    try:
        error, inputs = error_of(engine, workload, batch), workload.inputs(batch)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    seconds = timed(lambda: engine.forward(*inputs), error, TOLERANCES[dtype], engine=engine.name)
    benchmark.extra_info.update(ms_per_image=1e3 * seconds / batch, images_per_s=batch / seconds)
