"""Wheel, sdist, public names, and imports without optional dependencies."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, *flags):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_is_a_link_and_not_a_top_level_package():
    """A top-level package `kernels` would collide with another library's."""
    assert (ROOT / "ddpm_fast" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Directory with the built wheel and sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_wheel_and_sdist_contain_every_module(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"ddpm_fast"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ddpm_fast").rglob("*.py")}
    modules |= {f"ddpm_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules and "ddpm_fast/py.typed" in names
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(n.endswith("kernels/ddpm_step.py") for n in archive.getnames())


def test_installed_wheel_samples(dist, tmp_path):
    """In a new environment that also sees the packages of the running one."""
    Image = pytest.importorskip("PIL.Image")
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    interpreter = tmp_path / "env" / "bin" / "python"
    install = ("install", "--no-index", "--no-deps", wheel)
    run(sys.executable, "-m", "pip", "--python", interpreter, *install)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    running = [p for p in sys.path if p.endswith("site-packages")]
    (packages / "running.pth").write_text("\n".join(running))

    file = run(interpreter, "-c", "import ddpm_fast; print(ddpm_fast.__file__)")
    assert file.startswith(str(packages))
    options = ["--solver", "ddim", "--steps", "2", "--engine", "reference", "--out", "one.png"]
    weights = ("--weights", ROOT / "weights" / "fashion-mnist-32")
    script = tmp_path / "env" / "bin" / "ddpm-fast"
    assert "1 images of seed 0" in run(script, "sample", "--images", "1", *weights, *options)
    assert Image.open(tmp_path / "one.png").size == (68, 68)


def test_import_and_sampling_need_only_torch_and_numpy():
    code = """
import sys
for name in "triton safetensors PIL tqdm click diffusers matplotlib scipy ray".split():
    sys.modules[name] = None
import torch, ddpm_fast
from ddpm_fast import *
x = Sampler(lambda x, t: x, NoiseSchedule.linear(), (3, 8, 8)).sample(2, steps=3)
assert x.shape == (2, 8, 8, 3)
config = dict(channels=(16,), layers=1, norm_groups=4, attention=False, mid_attention=False)
unet = UNet(UNetConfig(8, **config)).eval()
x = torch.randn(1, 3, 8, 8)
assert (FusedUNet(unet, 1, "fp32")(x, 5) - unet(x, 5)).abs().max() < 1e-5
print("ok")
"""
    assert python(code).endswith("ok\n")


def test_the_gpu_tests_are_collected_without_other_libraries():
    """A bare machine with a GPU has only torch, triton, numpy and pytest."""
    code = """
import sys
for name in "safetensors PIL tqdm click diffusers matplotlib scipy build mpmath".split():
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu or kernel", "tests"]))
"""
    assert "error" not in python(code).lower()


def test_import_adds_little_time_to_that_of_torch(figure):
    code = """
import time, torch
start = time.perf_counter()
import ddpm_fast
package = time.perf_counter() - start
ddpm_fast.Sampler
print(package, time.perf_counter() - start)
"""
    runs = [map(float, python(code).split()) for _ in range(3)]
    package, sampler = map(min, zip(*runs, strict=True))
    name = "import ddpm_fast after import torch; with its Sampler (and Triton)"
    figure(name, f"{package:.3f} s; {sampler:.3f} s")
    assert package < 0.3


def test_public_names():
    import ddpm_fast

    assert all(getattr(ddpm_fast, name).__name__ == name for name in ddpm_fast.__all__)
    assert set(ddpm_fast.__all__) == set(ddpm_fast._HOME)
    assert dir(ddpm_fast) == sorted(ddpm_fast.__all__)
    assert not any(name.startswith("_") for name in dir(ddpm_fast))
    with pytest.raises(AttributeError, match="no attribute 'Unet'"):
        _ = ddpm_fast.Unet


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"],
)
def test_files_of_the_repository(name):
    assert (ROOT / name).stat().st_size > 0
