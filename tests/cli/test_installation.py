"""make sample installs what sampling needs, and nothing else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def plan(target):
    """The commands that make would run in an empty environment."""
    make = shutil.which("make") or pytest.skip("no make")
    command = [make, "-n", "-C", ROOT, "VENV=absent", target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_sample_installs_no_tests_and_no_further_triton():
    commands = plan("sample")
    assert "-m ddpm_fast sample" in commands and "llvmlite" in commands
    assert not re.search(r"triton|\[dev\]|pytest", commands)
    announced = [line for line in commands.splitlines() if line.startswith('echo "')]
    assert len(announced) == 3 and "installing torch" in commands


def test_the_other_targets_add_the_rest():
    commands = plan("check")
    assert "-e '.[dev]'" in commands and "--target" not in commands
    assert plan("test-all").count("--target") == 2  # two further releases of Triton
    assert commands.index("llvmlite") < commands.index("[dev]")


def test_what_is_installed_is_what_pyproject_names():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {*project["dependencies"], *project["optional-dependencies"]["cpu"]}
    named = {requirement for requirement in named if not re.match("torch|triton", requirement)}
    line = re.search(r"^NEEDED := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    needed = set(re.findall(r'"([^"]+)"', line))
    assert needed - {"setuptools>=77"} == named


def test_sampling_imports_no_more(tmp_path):
    """With triton and everything of the extras hidden, except llvmlite."""
    hidden = ("triton", "pytest", "matplotlib", "diffusers", "scipy", "av", "onnx", "torchmetrics")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({hidden!r}))
from ddpm_fast.cli.main import main
main(sys.argv[1:])
"""
    weights = ROOT / "weights" / "fashion-mnist-32"
    line = f"sample --weights {weights} --images 1 --solver ddim --steps 2 --device cpu --json"
    command = [sys.executable, "-c", code, *line.split(), "--out", tmp_path / "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"engine": "cpu"' in done.stdout and (tmp_path / "x.png").exists()
