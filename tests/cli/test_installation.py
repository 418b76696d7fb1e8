"""`make sample` installs the requirements of sampling only."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def plan(target):
    """Returns the commands that make would run in an empty environment."""
    make = shutil.which("make") or pytest.skip("no make")
    command = [make, "-n", "-C", ROOT, "VENV=absent", target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_make_sample_installs_neither_triton_nor_test_requirements():
    commands = plan("sample")
    assert "-m ddpm_fast sample" in commands and "llvmlite" in commands
    assert not re.search(r"triton|\[dev\]|pytest", commands)
    messages = [line for line in commands.splitlines() if line.startswith('echo "')]
    assert len(messages) == 3 and "installing torch" in commands


def test_other_targets_install_test_requirements():
    commands = plan("check")
    assert "-e '.[dev]'" in commands and "--target" not in commands
    assert plan("test-all").count("--target") == 2  # two other releases of Triton
    assert commands.index("llvmlite") < commands.index("[dev]")


def test_the_makefile_installs_the_requirements_in_pyproject():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {*project["dependencies"], *project["optional-dependencies"]["cpu"]}
    required = {name for name in required if not re.match("torch|triton", name)}
    line = re.search(r"^NEEDED := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    installed = set(re.findall(r'"([^"]+)"', line))
    assert installed - {"setuptools>=77"} == required


def test_sampling_imports_no_optional_package(tmp_path):
    """Triton and the packages of extras are hidden, except llvmlite."""
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
