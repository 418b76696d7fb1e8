"""Sampling loops: images per second at T = 1000, latency of one image, the first image of a cold process, and peak memory.

Every engine runs in a worker process and is checked against fp64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.workloads import NETWORKS, ROOT, TINY_UNET
from ddpm_fast import NoiseSchedule, UNet, save_pretrained
from ddpm_fast.benchmark.baselines import BASELINES
from ddpm_fast.benchmark.runner import FIRST_STEPS, EngineProcess, ReferenceCheck
from ddpm_fast.benchmark.worker import Setting

SIZES = {
    "fashion-mnist-32": ((1, 16), (1, 256)),
    "cifar10": ((1, 4), (1, 256)),
    "celebahq256": ((), (1, 16)),
}
STEPS = 10  # of the loops; the time of a step does not depend on it


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny: bool) -> Any:
    """network -> a checkpoint's folder."""
    folder = tmp_path_factory.mktemp("weights")

    def of(network: str) -> Path:
        if network == "fashion-mnist-32":
            return ROOT / "weights" / network
        if not (folder / network).exists():
            torch.manual_seed(0)
            save_pretrained(
                folder / network,
                UNet(TINY_UNET if tiny else NETWORKS[network]),
                NoiseSchedule.linear(),
            )
        return folder / network

    return of


@pytest.fixture
def setting(
    network: str, dtype: str, weights: Any, device: torch.device, tmp_path: Path
) -> Setting:
    return Setting(
        str(weights(network)), dtype, str(device), torch.get_num_threads(), folder=str(tmp_path)
    )


@pytest.fixture
def process(name: str, setting: Setting) -> Iterator[EngineProcess]:
    try:
        process = EngineProcess(name, setting)
    except RuntimeError as reason:
        pytest.skip(f"{name}: {reason}")
    yield process
    process.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tiny = metafunc.config.getoption("--tiny")
    on_gpu = torch.cuda.is_available() and not tiny
    cases = [
        (n, d, b)
        for n, s in SIZES.items()
        for b in s[on_gpu]
        for d in (["bf16", "fp8"] if on_gpu else ["fp32"])
    ]
    if "batch" not in metafunc.fixturenames:
        cases = [(n, d, b) for n, d, b in cases if b == 1 and d != "fp8"]
        metafunc.parametrize(("network", "dtype"), sorted({(n, d) for n, d, _ in cases}))
    else:
        metafunc.parametrize(
            ("network", "dtype", "batch"), [c for c in cases if c[2] == 1] if tiny else cases
        )
    metafunc.parametrize("name", ["ddpm_fast", "plain PyTorch"] if tiny else BASELINES)


def test_loop(name, network, dtype, batch, process, setting, timed, benchmark):
    """Ten steps; `images_per_s` is of a thousand."""
    error = ReferenceCheck(setting.workload()).error(
        process, batch
    )  # raises if the output or the loop is wrong
    call = lambda: process.request("loop", batch=batch, steps=STEPS)
    seconds = timed(call, error, float("inf"), rounds=5, engine=process.name)
    rate = batch * STEPS / seconds
    memory = process.request("memory", batch=batch)["bytes"]
    benchmark.extra_info.update(
        ms_per_step=1e3 * seconds / STEPS,
        image_steps_per_s=rate,
        images_per_s=rate / 1000,
        peak_bytes=memory,
    )


def test_first_image(name, network, dtype, setting, timed):
    """From the start of a process to an image of ten steps; after the first round with filled caches."""

    def start() -> None:
        process = EngineProcess(name, setting)
        try:
            process.request("loop", batch=1, steps=FIRST_STEPS)
        finally:
            process.close()

    try:
        start()
    except RuntimeError as reason:
        pytest.skip(f"{name}: {reason}")
    timed(start, 0.0, 0.0, rounds=2)
