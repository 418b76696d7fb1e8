"""The example runs, and its figures are what they must be."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_fast import NoiseSchedule

ROOT = Path(__file__).parent.parent
SCHEDULE = NoiseSchedule.linear()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("example") / "figures"
    command = [sys.executable, ROOT / "examples" / "gaussian_mixture.py", "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.full
def test_leaves_figures_and_numbers(quick):
    out, said = quick
    names = ("forward", "density", "reverse", "one-jump", "variance")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(f"gaussian-{name}.png" for name in names), "numbers.json"]
    )
    assert "W1 to data" in said and "DPM-Solver++" in said


@pytest.mark.full
def test_the_chain_goes_where_it_must(quick):
    numbers = json.loads((quick[0] / "numbers.json").read_text())
    spread = {name: np.array(v) for name, v in numbers["variance"].items()}
    # 2,000 points of a mixture with variance 4.5: a standard error of 3 % at most
    np.testing.assert_allclose(spread["preserving"], 1 + 3.5 * SCHEDULE.alpha_bar, rtol=0.12)
    np.testing.assert_allclose(spread["exploding"], 4.5 + np.cumsum(SCHEDULE.beta), rtol=0.12)
    first, last = numbers["forward"][0], numbers["forward"][-1]
    assert (first["t"], last["t"]) == (0, 999)
    assert first["ks_normal"] > 0.3 and last["ks_normal"] < 0.05  # from two modes to one normal
    assert all(
        row["ks"] < 0.05 for row in numbers["forward"]
    )  # 1.36 / sqrt(800) is the 5 % point of KS


@pytest.mark.full
def test_one_jump_can_at_best_find_the_mean(quick):
    """The best prediction of eps at t = T leaves a deviation of sqrt(alpha_bar) 4.5 around the mean of the data."""
    best = json.loads((quick[0] / "numbers.json").read_text())["one_jump"]["best possible"]
    assert abs(best["mean"]) < 0.02 and best["std"] == pytest.approx(
        SCHEDULE.alpha_bar[-1] ** 0.5 * 4.5, rel=0.15
    )


def test_refuses_a_missing_directory():
    command = [
        sys.executable,
        ROOT / "examples" / "gaussian_mixture.py",
        "--out",
        "/nowhere/at/all",
    ]
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "does not exist" in done.stderr
