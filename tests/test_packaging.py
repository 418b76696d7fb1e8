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


def test_kernels_is_a_link_and_no_package_of_its_own():
    """A top-level package `kernels` would collide with the one that other libraries look for."""
    assert (ROOT / "ddpm_fast" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The directory with the built wheel and sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, ROOT], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_wheel_and_sdist_hold_every_module_of_one_package(dist):
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
    """In a fresh environment, which sees the packages of the running one after its own."""
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
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        interpreter,
        "install",
        "--no-index",
        "--no-deps",
        wheel,
    )
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "running.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("site-packages"))
    )

    assert run(interpreter, "-c", "import ddpm_fast; print(ddpm_fast.__file__)").startswith(
        str(packages)
    )
    weights = ROOT / "weights" / "fashion-mnist-32"
    options = ["--solver", "ddim", "--steps", "2", "--engine", "reference", "--out", "one.png"]
    script = tmp_path / "env" / "bin" / "ddpm-fast"
    assert "1 images of seed 0" in run(
        script, "sample", "--weights", weights, "--images", "1", *options
    )
    assert Image.open(tmp_path / "one.png").size == (68, 68)


def test_import_needs_torch_and_numpy_alone():
    """Nothing else can be imported; the package, and sampling with it, still work."""
    code = """
import sys
for name in ("triton", "safetensors", "PIL", "tqdm", "click", "diffusers", "matplotlib", "scipy", "ray"):
    sys.modules[name] = None
import torch, ddpm_fast
from ddpm_fast import *
x = Sampler(lambda x, t: x, NoiseSchedule.linear(), (3, 8, 8)).sample(2, steps=3)
assert x.shape == (2, 8, 8, 3)
unet = UNet(UNetConfig(8, channels=(16,), layers=1, norm_groups=4, attention=False, mid_attention=False)).eval()
x = torch.randn(1, 3, 8, 8)
assert (FusedUNet(unet, 1, "fp32")(x, 5) - unet(x, 5)).abs().max() < 1e-5
print("ok")
"""
    assert python(code).endswith("ok\n")


def test_the_gpu_tests_need_no_other_library():
    """A bare machine with a GPU has torch, triton, numpy and pytest: everything must at least be collected there."""
    code = """
import sys
for name in ("safetensors", "PIL", "tqdm", "click", "diffusers", "matplotlib", "scipy", "build", "mpmath"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu or kernel", "tests"]))
"""
    assert "error" not in python(code).lower()


def test_import_adds_little_to_torch(figure):
    code = """
import time, torch
began = time.perf_counter()
import ddpm_fast
bare = time.perf_counter() - began
ddpm_fast.Sampler
print(bare, time.perf_counter() - began)
"""
    bare, sampler = map(
        min, zip(*(map(float, python(code).split()) for _ in range(3)), strict=True)
    )
    figure(
        "import ddpm_fast beyond import torch; with its Sampler (and Triton)",
        f"{bare:.3f} s; {sampler:.3f} s",
    )
    assert bare < 0.3


def test_public_names():
    import ddpm_fast

    assert all(getattr(ddpm_fast, name).__name__ == name for name in ddpm_fast.__all__)
    assert set(ddpm_fast.__all__) == set(ddpm_fast._HOME)
    assert dir(ddpm_fast) == sorted(ddpm_fast.__all__) and not [
        name for name in dir(ddpm_fast) if name.startswith("_")
    ]
    with pytest.raises(AttributeError, match="no attribute 'Unet'"):
        _ = ddpm_fast.Unet


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"],
)
def test_the_house_is_whole(name):
    assert (ROOT / name).stat().st_size > 0
