"""Forward passes of ddpm_fast and the baselines, per network, batch size and precision."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from bench.workloads import NETWORKS, TINY_UNET, WEIGHTS, random_checkpoint
from ddpm_fast import load_pretrained
from ddpm_fast.benchmark.baselines import BASELINES, Baseline, baseline
from ddpm_fast.benchmark.check import TOLERANCES, ReferenceCheck
from ddpm_fast.benchmark.workload import Unavailable, Workload
from ddpm_fast.models.unet import channels_last

SIZES = {  # network -> batch sizes on a CPU, on a GPU
    "fashion_mnist": ((1, 16), (1, 64, 256)),
    "cifar10": ((1, 4), (1, 16, 256)),
    "celebahq256": ((), (1, 16)),
}


@cache
def workload_of(network: str, dtype: str, device: str, tiny: bool, folder: Path) -> Workload:
    if network == "fashion_mnist":
        checkpoint = load_pretrained(WEIGHTS)
    else:
        checkpoint = random_checkpoint(TINY_UNET if tiny else NETWORKS[network])
    channels_last(checkpoint.unet.requires_grad_(False).to(device))
    return Workload(checkpoint, dtype, folder)


@cache
def baseline_of(name: str, workload: Workload) -> Baseline | str:
    """The engine, created once for all batch sizes; the reason if it is unavailable."""
    try:
        return baseline(name, workload)
    except Unavailable as reason:
        return str(reason)


@cache
def check_of(workload: Workload) -> ReferenceCheck:
    return ReferenceCheck(workload)


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
        pytest.skip("excluded by --tiny")
    caches = folder / f"{network}-{dtype}"
    caches.mkdir(exist_ok=True)
    workload = workload_of(network, dtype, str(device), tiny, caches)
    engine = baseline_of(name, workload)
    if isinstance(engine, str):
        pytest.skip(f"{name}: {engine}")
    inputs = workload.inputs(batch)
    try:
        error = check_of(workload).error_of(engine.forward(*inputs), batch)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    seconds = timed(lambda: engine.forward(*inputs), error, TOLERANCES[dtype], engine=engine.name)
    benchmark.extra_info.update(ms_per_image=1e3 * seconds / batch, images_per_s=batch / seconds)
