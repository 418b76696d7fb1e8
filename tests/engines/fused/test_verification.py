"""Self-check: correct kernels pass, planted faults fail, and results are cached."""

import json
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.engines.fused import verification
from ddpm_fast.engines.fused.checks import FORWARD, STEP_CHECKS, CheckResult, check_launch, compare
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels import _triton, group_norm_silu, noise
from ddpm_fast.kernels._feature_map import FeatureMap
from ddpm_fast.testing import Damaged, relative_error
from ddpm_fast.utils.cache import cache_dir, cached_files, clear_cache

TINY = UNetConfig(
    8, 1, 1, channels=(16, 16), layers=1, attention=False, mid_attention=False, norm_groups=4
)
# a worker with planted faults
PLANTED = """
import os, time
from ddpm_fast.engines.fused import checks
from ddpm_fast.kernels.conv3x3 import Conv3x3
from ddpm_fast.kernels.conv_downsample import ConvDownsample
from ddpm_fast.kernels.conv_in import ConvIn
from ddpm_fast.kernels.conv1x1 import Conv1x1
from ddpm_fast.kernels.conv_upsample import ConvUpsample
from ddpm_fast.kernels.group_norm_silu import GroupNormSiLU
from ddpm_fast.testing import interpret_like_a_gpu

interpret_like_a_gpu()

def plant(op, fault):
    run = op.run
    def planted(self, *args, **maps):
        run(self, *args, **maps)
        fault(maps["out"])
    op.run = planted

def wrong_pixel(out):
    out.pixels[-1, 3, 2, 1] += 1.0

def border(out):
    out.grid[0, 0, 3, 1] = 1e-3

def does_not_compile(out):
    raise SyntaxError("no such instruction")

def crashes(out):
    os.abort()

def never_returns(out):
    if not out.bordered:  # the last one
        time.sleep(1000)

def differs(out, state=[0]):
    if out.channels == 32:  # where a skip joins
        state[0] += 1
        out.pixels[0, 0, 0, 0] += state[0] * 1e-6

for op, fault in FAULTS:
    plant(op, fault)
checks.main()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "cache"))


def fused(config=TINY, batch=3, dtype="fp32"):
    torch.manual_seed(0)
    return FusedUNet(UNet(config), batch, dtype, check=False)


def planted(faults):
    return [sys.executable, "-c", PLANTED.replace("FAULTS", faults)]


@pytest.mark.kernel
@pytest.mark.full
def test_correct_kernels_pass():
    network, seen = fused(dtype="fp16"), []
    results = verification.run_checks(network.spec(), progress=seen.append)
    names = [*STEP_CHECKS, *(launch.name for launch in network.plan()), FORWARD]
    assert list(results) == seen == names
    assert all(v.passed for v in results.values()), {
        k: v for k, v in results.items() if not v.passed
    }
    assert all(v.allowed > 0 for k, v in results.items() if k not in STEP_CHECKS)


@pytest.mark.kernel
@pytest.mark.full
def test_planted_faults_are_found_and_count_against_their_launch():
    """All in one plan: the launches after a fault are checked."""
    network = fused()
    faults = {
        "ConvIn": ("crashes", "ended with code -6", ["conv_in"]),
        "ConvDownsample": (
            "wrong_pixel",
            "relative error|worst pixel",
            ["down_blocks.0.downsamplers.0.conv"],
        ),
        "ConvUpsample": (
            "does_not_compile",
            "SyntaxError: no such instruction",
            ["up_blocks.0.upsamplers.0.conv"],
        ),
        "Conv1x1": (
            "border",
            "border is not zero",
            [n.name for n in network.plan() if n.op.name == "conv1x1"],
        ),
        "GroupNormSiLU": (
            "differs",
            "two runs differ",
            [n.name for n in network.plan() if "x2" in n.reads and n.op.name != "conv1x1"],
        ),
        "Conv3x3": ("never_returns", "no answer for 12 s", ["conv_out"]),
    }
    command = planted(
        "[" + ", ".join(f"({op}, {fault})" for op, (fault, _, _) in faults.items()) + "]"
    )
    results = verification.run_checks(network.spec(), command, timeout=12)
    reasons = {k: v.reason for k, v in results.items() if not v.passed}
    assert set(reasons) == {name for _, _, names in faults.values() for name in names}
    for _, reason, names in faults.values():
        for name in names:
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(reasons[name])
    assert results[FORWARD].passed  # failed launches run by their fallbacks


@pytest.mark.kernel
def test_a_failed_launch_runs_by_its_fallback(monkeypatch):
    """Results are computed once and cached; the warning names the launch."""
    command = planted("[(ConvDownsample, wrong_pixel)]")
    monkeypatch.setattr(
        verification, "run_checks", partial(verification.run_checks, command=command)
    )
    torch.manual_seed(0)
    unet = UNet(TINY).eval().requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"1 of \d+ checks .* down_blocks\.0\.downsamplers\.0\.conv \(relative"
    ):
        network = FusedUNet(unet, 2, "fp32", check=True)
    assert (
        network.plan().fallbacks == {"down_blocks.0.downsamplers.0.conv"} and not network.invariant
    )
    x = torch.randn(2, 1, 8, 8)
    assert relative_error(network(x, 500), unet(x, torch.tensor(500))) < 3e-6
    results = verification.cached_results(network.spec())
    assert len(cached_files()) == 1 and sum(not v.passed for v in results.values()) == 1
    monkeypatch.setattr(verification, "run_checks", lambda *_: pytest.fail("checked again"))
    with pytest.warns(UserWarning, match="downsamplers"):
        assert FusedUNet(unet, 2, "fp32", check=True).plan().fallbacks
    assert clear_cache() == 1 and not cached_files()


@torch.no_grad()
@pytest.mark.kernel
def test_statistics_are_checked_in_addition_to_the_map(monkeypatch, device):
    monkeypatch.setattr(group_norm_silu, "MAX_ONE_PASS_ELEMENTS", 1)  # one pass holds nothing
    network = FusedUNet(UNet(TINY).to(device), 3, "fp16", check=False)
    plan = network.load(torch.randn(3, 1, 8, 8, device=device), 500)
    results = {}
    for launch in plan:
        if "stats" in launch.writes and launch.op.name not in results:
            results[launch.op.name] = check_launch(plan, launch)
        plan.run_one(launch)
    assert set(results) == {"conv_in", "conv3x3", "conv_downsample", "conv_upsample"}
    assert all(v.passed for v in results.values()), results
    launch = plan.launches[0]
    for fault, says in (
        (lambda stats: stats[-1, 0, 1, 3].mul_(1.001), "statistics: relative errors"),
        (lambda stats: stats[0, 0, 0].fill_(float("nan")), "statistics: relative errors nan"),
        (lambda stats: stats[0, 0, 0, 0].mul_(1 + 1e-6 * torch.rand(())), "two runs differ"),
    ):
        broken = replace(launch, op=DamagedStatistics(launch.op, fault))
        assert says in check_launch(plan, broken).reason


class DamagedStatistics(Damaged):
    """A launch with wrong statistics."""

    fallback = property(lambda self: self.op.fallback)
    tiling = property(lambda self: self.op.tiling)

    def run(self, stats, **arguments):
        self.op.run(stats=stats, **arguments)
        self.damage(stats.grid)


def test_fallbacks_of_results(monkeypatch):
    """Failed launches run by their fallbacks; noise and step run by their references."""
    good, bad = CheckResult(), CheckResult("wrong")
    names = [*STEP_CHECKS, "conv_in", "conv_out", FORWARD]
    monkeypatch.setattr(_triton, "UNTRUSTED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verification.fallbacks_of(dict.fromkeys(names, good)) == set()
    with pytest.warns(
        UserWarning,
        match=r"1 of 6 checks .* the failed ones run in plain PyTorch.*: conv_in \(wrong\)",
    ):
        assert verification.fallbacks_of(dict.fromkeys(names, good) | dict(conv_in=bad)) == {
            "conv_in"
        }
    with pytest.warns(UserWarning, match="the whole network runs"):
        assert verification.fallbacks_of(dict.fromkeys(names, good) | {FORWARD: bad}) == {
            "conv_in",
            "conv_out",
        }
    assert not _triton.UNTRUSTED
    with pytest.warns(UserWarning, match="noise"):
        assert verification.fallbacks_of(dict.fromkeys(names, good) | dict(noise=bad)) == set()
    assert {"noise"} == _triton.UNTRUSTED


@pytest.mark.kernel
def test_a_kernel_that_failed_its_check_is_not_launched(monkeypatch, device):
    """Operations that use it run by their references."""
    seed, row = torch.tensor([3], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    expected = noise.noise(seed, row, row, noise.X_T, 1, 4, 4)
    monkeypatch.setattr(noise, "_fill", lambda *_, **__: pytest.fail("launched"))
    monkeypatch.setattr(_triton, "UNTRUSTED", {"noise"})
    assert torch.equal(noise.noise(seed, row, row, noise.X_T, 1, 4, 4), expected)
    assert not _triton.launches_kernel(seed, "noise", "ddpm_step") and _triton.launches_kernel(
        seed, "ddpm_step"
    )


def test_a_worker_that_cannot_start_raises():
    command = [sys.executable, "-c", "import sys; sys.exit('no torch here')"]
    with pytest.raises(RuntimeError, match=r"could not start: .*no torch here"):
        verification.verify(fused().spec(), command=command)
    assert not cached_files()


def test_running_out_of_memory_raises():
    command = [
        sys.executable,
        "-c",
        "import json; print(json.dumps(dict(started='noise')))\n"
        "print(json.dumps(dict(out_of_memory='tried 80 GiB')))",
    ]
    with pytest.raises(RuntimeError, match=r"ran out of memory; use a smaller batch_size .*80 GiB"):
        verification.verify(fused().spec(), command=command)
    assert not cached_files()


def test_a_killed_worker_and_a_timeout_are_not_cached():
    """The host's memory may have run out, or the machine may have been busy."""
    begin = "import json, os, time; print(json.dumps(dict(started='noise')), flush=True); "
    with pytest.raises(torch.OutOfMemoryError, match="killed"):
        verification.verify(
            fused().spec(), command=[sys.executable, "-c", begin + "os.kill(os.getpid(), 9)"]
        )
    late = {"noise": CheckResult("no answer for 1 s", timed_out=True), "conv_in": CheckResult()}
    spec = fused().spec()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "run_checks", lambda *_, **__: late)
        assert verification.verify(spec) == late
    assert not cached_files()


def test_a_result_that_cannot_be_cached_is_used(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(verification, "run_checks", lambda *_, **__: {"conv_in": CheckResult()})
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert verification.verify(fused().spec()) == {"conv_in": CheckResult()}


def test_other_files_in_the_cache_folder_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "a.json").touch()
    (tmp_path / "thesis.tex").touch()
    assert clear_cache() == 1 and [p.name for p in tmp_path.rglob("*.*")] == ["thesis.tex"]
    monkeypatch.delenv("DDPM_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_dir().name.startswith("ddpm_fast-")


def test_cache_keys_depend_on_the_plan():
    """Batch size, dtype, image size and network change the key. A damaged file is ignored."""
    keys = {
        verification.cache_key(n.spec())
        for n in (
            fused(),
            fused(batch=4),
            fused(dtype="fp16"),
            fused(replace(TINY, norm_eps=1e-5)),
            fused(replace(TINY, sample_size=16)),
        )
    }
    assert len(keys) == 5 and verification.cache_key(fused().spec()) in keys
    spec = fused().spec()
    path = verification.cache_path(spec)
    path.parent.mkdir(parents=True)
    for damage in ("", "[]", '{"noise": 3}', '{"noise": {"speed": 1}}'):
        path.write_text(damage)
        assert verification.cached_results(spec) is None
    path.write_text(json.dumps({"noise": {"reason": "no"}}))
    assert verification.cached_results(spec) == {"noise": CheckResult("no")}


def test_compare():
    torch.manual_seed(0)
    exact = FeatureMap.of(torch.randn(2, 16, 4, 4, dtype=torch.float64))
    plain = FeatureMap.of(exact.pixels.to(torch.float16))
    assert compare(plain, exact, plain).passed
    worse = FeatureMap.of(exact.pixels * (1 + 3e-3), torch.float16)
    assert "relative error" in compare(worse, exact, plain).reason
    pixel = FeatureMap.of(plain.pixels)
    pixel.pixels[1, :, 2, 2] += 5e-3
    assert "worst pixel" in compare(pixel, exact, plain).reason  # the L2 error is small enough
    pixel.pixels[1, :, 2, 2] = float("nan")
    assert "relative error" in compare(pixel, exact, plain).reason
    pixel.rows.copy_(plain.rows)
    pixel.grid[0, 0, 0, 0] = float("nan")
    assert "border" in compare(pixel, exact, plain).reason


def test_compare_allows_two_units_of_fp32_in_the_last_place():
    """Regression: a correct norm failed because plain PyTorch had a small error by chance."""
    torch.manual_seed(0)
    exact = FeatureMap.of(torch.randn(2, 16, 4, 4, dtype=torch.float64))
    plain, ulp = FeatureMap.of(exact.pixels.float()), torch.finfo(torch.float32).eps
    off = lambda ulps: FeatureMap.of(exact.pixels * (1 + ulps * ulp), torch.float32)
    assert compare(off(1.3), exact, plain).passed
    assert "relative error" in compare(off(2.5), exact, plain).reason
