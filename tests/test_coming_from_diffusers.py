"""docs/coming-from-diffusers.md: the code runs, and the names in the table exist."""

import inspect
import re
from pathlib import Path

import pytest

import ddpm_fast
from ddpm_fast import Sampler
from ddpm_fast.diffusion.solvers import SOLVERS
from ddpm_fast.diffusion.timesteps import SPACINGS
from ddpm_fast.sampling.keywords import DIFFUSERS
from ddpm_fast.sampling.request import StreamOptions

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coming-from-diffusers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_runs(number, tmp_path, monkeypatch):
    weights = ROOT / "weights" / "fashion-mnist-32"
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[number].replace("weights/fashion-mnist-32", str(weights)), {})
    if "save_grid" in BLOCKS[number]:
        assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_code_and_a_table():
    assert len(BLOCKS) >= 4
    assert all(name in PAGE for name in ("num_inference_steps", "generator", "PIL", "preset="))


def test_names_on_the_page_exist():
    options = {*StreamOptions.__annotations__, "output"}
    constructor = {*inspect.signature(Sampler).parameters}
    keywords = {*options, *constructor, *inspect.signature(Sampler.from_pretrained).parameters}
    table = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| ")]
    used = {name for cell in table for name in re.findall(r"\b(\w+)=", cell)}
    assert used <= keywords
    assert {*re.findall(r'solver="([^"]+)"', PAGE)} <= {*SOLVERS}
    assert {*re.findall(r'spacing="([^"]+)"', "\n".join(table))} <= {*SPACINGS}
    for name in re.findall(r"ddpm_fast\.(\w+)\(", PAGE):
        assert hasattr(ddpm_fast, name)


def test_hints_name_existing_keywords():
    known = {*StreamOptions.__annotations__, "output", "every", "dtype"}
    for name, hint in DIFFUSERS.items():
        assert name not in StreamOptions.__annotations__
        assert {*re.findall(r"\b(\w+)=", hint)} <= known
