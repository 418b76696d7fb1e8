"""Every launch compiles as meant for the GPUs that matter, without one at hand."""

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
def test_compiles_as_meant(case, sm, figure):
    p = predict(case, sm)
    _, c, h, w = case.shape
    assert p.compiled.spills == 0
    assert p.compiled.registers <= 128 and p.compiled.shared <= 48 * 1024
    # an fma would round the noise differently from the reference; sqrt.rn's own refinement appears in SASS, not in PTX
    assert "fma" not in p.compiled.ptx and p.compiled.ptx.count("sqrt.rn.f32") == p.compiled.count(
        "MUFU.RSQ"
    )
    if (
        case.channels_last and c * h * w % 16 == 0 and not case.learned
    ):  # 16 bytes an access, both ways
        if case.operation is not Operation.NOISE_MSE:  # the loss itself writes one number a program
            assert p.compiled.count("STG.E.128") > 0 and p.compiled.count("STG.E ") == 0
        if case.operation not in (Operation.NOISE, Operation.WORDS) and case.dtype == torch.float32:
            assert p.compiled.count("LDG.E.128") > 0
    if sm == 90:
        worst, best = p.shares
        figure(
            f"{p.name}, sm_90",
            f"{p.compiled.registers} registers, {p.instructions:.0f} instructions and {p.bytes} bytes an element, "
            f"predicted {worst:.0%} to {best:.0%} of an H100's copy rate",
        )


def test_the_fma_check_would_see_one():
    launch = launch_of(CASES[0])
    fused = dataclasses.replace(launch, options={**launch.options, "enable_fp_fusion": True})
    assert "fma" in compile_launch(fused, 90).ptx


def test_every_launcher_forbids_fusion():
    assert all(launch_of(case).options["enable_fp_fusion"] is False for case in CASES)


def test_a_history_is_part_of_the_launch():
    history = {
        case.history: launch_of(case).args["HISTORY"]
        for case in CASES
        if case.operation is Operation.DDPM_STEP
    }
    assert history == {False: False, True: True}
