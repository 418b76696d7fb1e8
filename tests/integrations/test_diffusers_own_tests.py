"""diffusers' own tests on accelerated pipelines and fused schedulers: what passes must still pass.

DIFFUSERS_CHECKOUT names a folder with the `tests` of huggingface/diffusers near the installed
release (without its `src`). They need the packages transformers, accelerate and parameterized.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = {
    "pipelines": ["tests/pipelines/ddpm", "tests/pipelines/ddim"],
    "schedulers": [
        f"tests/schedulers/test_scheduler_{name}.py" for name in ("ddpm", "ddim", "dpm_multi")
    ],
}


def passed(suite, tmp_path, *options):
    report = tmp_path / "report.xml"
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(PYTHONPATH=path)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options]
    subprocess.run(
        [sys.executable, *command, *SUITES[suite]],
        cwd=os.environ["DIFFUSERS_CHECKOUT"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    cases = ET.parse(report).iter("testcase")
    return {f"{c.get('classname')}.{c.get('name')}" for c in cases if not len(c)}


@pytest.mark.acceptance
@pytest.mark.parametrize("suite", SUITES)
def test_what_passes_with_diffusers_passes_with_these_classes(suite, tmp_path, figure):
    assert "DIFFUSERS_CHECKOUT" in os.environ, "set it to a checkout of huggingface/diffusers"
    expected = passed(suite, tmp_path)
    results = passed(suite, tmp_path, "-p", "diffusers_exchange")
    figure(
        f"diffusers' own {suite} tests: passed, of those that pass with diffusers",
        f"{len(expected & results)} of {len(expected)}",
    )
    assert expected and not expected - results
