"""The example examples/gaussian_mixture.py: its files, and its numbers against theory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_fast import NoiseSchedule

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).parents[1] / "examples" / "gaussian_mixture.py"
SCHEDULE = NoiseSchedule.linear()


def run(*options):
    return subprocess.run([sys.executable, EXAMPLE, *options], capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("example") / "figures"
    done = run("--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.full
def test_figures_and_numbers(quick):
    out, stdout = quick
    names = ("forward", "density", "reverse", "one-jump", "variance")
    files = {*(f"gaussian-{name}.png" for name in names), "numbers.json"}
    assert {p.name for p in out.iterdir()} == files
    assert "W1 to data" in stdout and "DPM-Solver++" in stdout


@pytest.mark.full
def test_variances_and_distances_of_the_forward_process(quick):
    numbers = json.loads((quick[0] / "numbers.json").read_text())
    spread = {name: np.array(v) for name, v in numbers["variance"].items()}
    # 2,000 points of a mixture with variance 4.5: a standard error of 3 % at most
    np.testing.assert_allclose(spread["preserving"], 1 + 3.5 * SCHEDULE.alpha_bar, rtol=0.12)
    np.testing.assert_allclose(spread["exploding"], 4.5 + np.cumsum(SCHEDULE.beta), rtol=0.12)
    first, last = numbers["forward"][0], numbers["forward"][-1]
    assert (first["t"], last["t"]) == (0, 999)
    assert first["ks_normal"] > 0.3 and last["ks_normal"] < 0.05  # from two modes to one normal
    # 1.36 / sqrt(800) is the 5 % point of KS
    assert all(row["ks"] < 0.05 for row in numbers["forward"])


@pytest.mark.full
def test_one_step_predicts_at_best_the_mean(quick):
    """The best prediction at t = T has a deviation of sqrt(alpha_bar) 4.5 from the data's mean."""
    best = json.loads((quick[0] / "numbers.json").read_text())["one_jump"]["best possible"]
    assert abs(best["mean"]) < 0.02
    assert best["std"] == pytest.approx(SCHEDULE.alpha_bar[-1] ** 0.5 * 4.5, rel=0.15)


def test_a_missing_directory_is_an_error():
    done = run("--out", "/nowhere/at/all")
    assert done.returncode == 2 and "does not exist" in done.stderr
