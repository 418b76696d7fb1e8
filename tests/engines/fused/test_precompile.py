"""Compilation of plans for sm_90; `make compile-check` covers the other architectures."""

import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from bench.tools.compile_check import Case, compile_all, distinct, faults, launches_of, with_fp32
from bench.workloads import NETWORKS
from ddpm_fast.utils.triton_tools import _shortest_loop, compile_launch, launch_key

pytestmark = pytest.mark.compile


@pytest.mark.full
def test_every_launch_compiles_without_faults(figure):
    cases = distinct(NETWORKS, [256], ["bf16"], 90)
    known = {launch_key(c.launch) for c in cases}
    more = [
        *distinct(NETWORKS, [256], ["fp8"], 90),
        *distinct(["cifar10"], [256], ["fp8-unbounded"], 90),
        *distinct(["cifar10"], [1], ["bf16"], 90),
    ]
    cases += [c for c in more if launch_key(c.launch) not in known]
    cases, wrong, serial = with_fp32(cases), [], 0.0
    for case, result, seconds in compile_all(cases):
        serial += seconds
        problems = [result] if isinstance(result, str) else faults(case, result)
        wrong += [f"{case.kernel} in {case.where}: {'; '.join(problems)}"] if problems else []
    figure(
        "launches of four networks, sm_90: distinct, seconds to compile one by one",
        f"{len(cases)}, {serial:.0f}",
    )
    assert not wrong


def test_one_launch_of_every_kernel_compiles_without_faults():
    """For the CIFAR-10 network."""
    cases = {c.kernel: c for c in distinct(["cifar10"], [256], ["bf16"], 90)}
    assert len(cases) >= 7
    for case, result, _ in compile_all(list(cases.values())):
        assert not isinstance(result, str), (case.kernel, result)
        assert not faults(case, result), case.kernel


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_number_of_compilations_of_the_cifar10_network(batch, figure):
    count = len({launch_key(launch) for _, launch in launches_of("cifar10", batch, "bf16", 90)})
    figure(f"distinct compilations, CIFAR-10 network, batch {batch}", count)
    assert count < 40


def test_batches_divisible_by_16_compile_no_other_kernels():
    """Kernels are not specialized on sizes that depend on the batch size."""

    def keys(batch):
        return {launch_key(launch) for _, launch in launches_of("cifar10", batch, "bf16", 90)}

    assert keys(256) == keys(255) == keys(257) and keys(16) == keys(17)


def test_spills_and_large_shared_memory_are_faults():
    """A convolution with too few registers, and one with too much shared memory."""
    cases = distinct(["cifar10"], [256], ["bf16"], 90)
    conv = next(c for c in cases if c.kernel == "_conv3x3_kernel" and c.launch.args["RESIDUAL"])
    spilling = Case(
        90,
        conv.where,
        type(conv.launch)(
            conv.launch.kernel, (1,), conv.launch.args, dict(conv.launch.options, maxnreg=96)
        ),
    )
    large = Case(
        90,
        conv.where,
        type(conv.launch)(
            conv.launch.kernel, (1,), conv.launch.args, dict(conv.launch.options, num_stages=7)
        ),
    )
    for case, message in ((spilling, "local-memory"), (large, "shared memory")):
        _, result, _ = next(compile_all([case]))
        assert any(
            message in fault
            for fault in ([result] if isinstance(result, str) else faults(case, result))
        )


def test_narrow_accesses_and_instructions_of_another_gpu_are_faults():
    """A map at an odd address is read by 2 bytes; code for sm_90 does not contain tcgen05."""
    cases = distinct(["cifar10"], [256], ["bf16"], 90)
    norm = next(c for c in cases if c.kernel == "_one_pass_kernel")
    x = norm.launch.args["x_ptr"]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="meta")[1:]
    odd = replace(norm, launch=replace(norm.launch, args=norm.launch.args | dict(x_ptr=shifted)))
    assert any(".U16" in fault for fault in faults(odd, compile_launch(odd.launch, 90)))
    conv = next(c for c in cases if c.kernel == "_conv3x3_kernel")
    compiled = compile_launch(conv.launch, 90)
    assert faults(conv, compiled) == [] and faults(replace(conv, sm=100), compiled) == [
        "no tcgen05.mma"
    ]


def test_shortest_loop_excludes_skipped_instructions():
    lines = [
        "MOV",
        "HGMMA.64",
        "@P0 BRA 0x50",
        "FADD",
        "STG",
        "@P1 BRA 0x10",
        "EXIT",
    ]  # the product, an epilogue, the loop's end
    numbered = [
        (f"{16 * i:04x}", *(line.split(" ", 1) if line.startswith("@") else ("", line)))
        for i, line in enumerate(lines)
    ]
    assert _shortest_loop(numbered) == 3 and _shortest_loop(numbered[:5]) == 0


@pytest.mark.full
def test_kernels_compiled_in_parallel_are_those_of_the_plan(tmp_path, monkeypatch, figure):
    """A second run compiles nothing, because all kernels are in Triton's cache."""
    from ddpm_fast import UNet
    from ddpm_fast.engines.fused.precompile import compile_in_parallel, distinct_launches
    from ddpm_fast.engines.fused.unet import FusedUNet
    from ddpm_fast.kernels._gemm import H100

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = NETWORKS["cifar10"]
    with torch.device("meta"):
        fused = FusedUNet(UNet(config), 256, "bf16", "meta", target=H100)
    spec = fused.spec()
    start = time.perf_counter()
    assert compile_in_parallel(spec, 2) == [0, 0]
    first, cached = time.perf_counter() - start, sorted(tmp_path.rglob("*.cubin"))
    start = time.perf_counter()
    assert compile_in_parallel(spec, 1) == [0]
    second = time.perf_counter() - start
    assert sorted(tmp_path.rglob("*.cubin")) == cached and len(cached) == len(
        distinct_launches(spec)
    )
    figure(
        f"{len(cached)} kernels of the CIFAR-10 network: seconds in two processes, in a second run",
        f"{first:.1f}, {second:.1f}",
    )


def test_a_worker_that_does_not_end_in_time_is_killed(monkeypatch):
    from ddpm_fast.engines.fused import precompile
    from ddpm_fast.utils.subprocess import JsonWorker

    monkeypatch.setattr(precompile, "TIMEOUT", 0.1)
    with JsonWorker("sleeper", command=[sys.executable, "-c", "import time; time.sleep(60)"]) as w:
        assert precompile._end_of(w) == -signal.SIGKILL
