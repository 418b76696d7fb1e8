"""The noise kernels compile as expected for sm_80, sm_90 and sm_100, without a GPU."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from bench.studies.predict import CASES, Operation, launch_of, predict
from ddpm_fast.utils.triton_tools import compile_launch

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("sm", [90, 80, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.each_value
def test_compiled_code(case, sm, figure):
    p = predict(case, sm)
    _, c, h, w = case.shape
    assert p.compiled.spills == 0
    assert p.compiled.registers <= 128 and p.compiled.shared <= 48 * 1024
    # an fma would round the noise differently; the fma of sqrt.rn itself is in SASS, not in PTX
    assert "fma" not in p.compiled.ptx
    assert p.compiled.ptx.count("sqrt.rn.f32") == p.compiled.count("MUFU.RSQ")
    # loads and stores of 16 bytes
    if case.channels_last and c * h * w % 16 == 0 and not case.learned:
        if case.operation is not Operation.NOISE_MSE:  # the loss writes one number per program
            assert p.compiled.count("STG.E.128") > 0 and p.compiled.count("STG.E ") == 0
        if case.operation not in (Operation.NOISE, Operation.WORDS) and case.dtype == torch.float32:
            assert p.compiled.count("LDG.E.128") > 0
    if sm == 90:
        worst, best = p.shares
        figure(
            f"{p.name}, sm_90",
            f"{p.compiled.registers} registers, {p.instructions:.0f} instructions and {p.bytes} "
            f"bytes per element, predicted {worst:.0%} to {best:.0%} of an H100's copy rate",
        )


def test_fma_check_detects_an_fma():
    launch = launch_of(CASES[0])
    fused = dataclasses.replace(launch, options={**launch.options, "enable_fp_fusion": True})
    assert "fma" in compile_launch(fused, 90).ptx


def test_every_launcher_forbids_fusion():
    assert all(launch_of(case).options["enable_fp_fusion"] is False for case in CASES)


def test_history_is_part_of_the_launch():
    steps = [case for case in CASES if case.operation is Operation.DDPM_STEP]
    assert {case.history for case in steps} == {False, True}
    assert all(launch_of(case).args["HISTORY"] == case.history for case in steps)
