"""A forward pass for each network, batch size and type, by ours and by what a user would run instead."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from bench.networks import NETWORKS, ROOT, TINY_UNET
from ddpm_fast import NoiseSchedule, UNet, load_pretrained
from ddpm_fast.benchmark.baselines import BASELINES, Baseline, Missing, Subject, baseline
from ddpm_fast.benchmark.runner import ALLOWED
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.models.unet import channels_last
from ddpm_fast.testing import relative_error

SIZES = {  # network -> batch sizes on a CPU, on a GPU
    "fashion_mnist": ((1, 16), (1, 64, 256)),
    "cifar10": ((1, 4), (1, 16, 256)),
    "celebahq256": ((), (1, 16)),
}


@cache
def subject_of(network: str, dtype: str, device: str, tiny: bool, folder: Path) -> Subject:
    if network == "fashion_mnist":
        checkpoint = load_pretrained(ROOT / "weights" / "fashion-mnist-32")
    else:
        torch.manual_seed(0)
        checkpoint = Checkpoint(UNet(TINY_UNET if tiny else NETWORKS[network]).eval(), NoiseSchedule.linear())
    channels_last(checkpoint.unet.requires_grad_(False).to(device))
    return Subject(checkpoint, dtype, folder)


@cache
def baseline_of(name: str, subject: Subject) -> Baseline | str:
    """Made once for all batch sizes; the reason where it cannot be had."""
    try:
        return baseline(name, subject)
    except Missing as reason:
        return str(reason)


@torch.no_grad()
def error_of(made: Baseline, subject: Subject, batch: int) -> float:
    """Of two images' outputs against fp64."""
    given = subject.inputs(batch)
    exact = UNet(subject.unet.config).double().eval().to(subject.device)
    exact.load_state_dict(subject.unet.state_dict())
    return relative_error(made.forward(*given)[:2], exact(given[0][:2].double(), *(v[:2] for v in given[1:])))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What this machine is asked."""
    on_gpu = torch.cuda.is_available() and not metafunc.config.getoption("--tiny")
    dtypes = ["fp32", "bf16", "fp8"] if on_gpu else ["fp32"]
    metafunc.parametrize("name", BASELINES)
    metafunc.parametrize("dtype", dtypes)
    metafunc.parametrize(("network", "batch"), [(n, b) for n, sizes in SIZES.items() for b in sizes[on_gpu]])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


def test_forward(name, dtype, network, batch, timed, device, tiny, folder, benchmark):
    if tiny and (name not in ("ddpm_fast", "plain PyTorch", "diffusers") or batch > 1):
        pytest.skip("not in tiny")
    own = folder / f"{network}-{dtype}"
    own.mkdir(exist_ok=True)
    subject = subject_of(network, dtype, str(device), tiny, own)
    made = baseline_of(name, subject)
    if isinstance(made, str):
        pytest.skip(f"{name}: {made}")
    try:
        error, given = error_of(made, subject, batch), subject.inputs(batch)
    except Missing as reason:
        pytest.skip(f"{name}: {reason}")
    seconds = timed(lambda: made.forward(*given), error, ALLOWED[dtype], engine=made.name)
    benchmark.extra_info.update(ms_per_image=1e3 * seconds / batch, images_per_s=batch / seconds)
