"""The self-check passes what is right and finds what is wrong, whatever the launch does to its process."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.engines.fused import verification as verdicts
from ddpm_fast.engines.fused.checks import FORWARD, STEP_LAUNCHES, Verdict, check_launch, judge
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels import _triton, group_norm_silu, noise
from ddpm_fast.kernels._feature_map import FeatureMap
from ddpm_fast.testing import Damaged, relative_error
from ddpm_fast.utils.cache import cache_dir, cached_files, clear_cache

TINY = UNetConfig(8, 1, 1, channels=(16, 16), layers=1, attention=False, mid_attention=False, norm_groups=4)
# what a child runs instead of `python -m ddpm_fast.engines.fused.checks`: the same, with faults planted in some launches
PLANTED = """
import json, os, sys, time
from ddpm_fast import self_check
from ddpm_fast.kernels.conv3x3 import Conv3x3
from ddpm_fast.kernels.conv_downsample import ConvDownsample
from ddpm_fast.kernels.conv_in import ConvIn
from ddpm_fast.kernels.conv1x1 import Conv1x1
from ddpm_fast.kernels.conv_upsample import ConvUpsample
from ddpm_fast.kernels.group_norm_silu import GroupNormSiLU

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
self_check.main(sys.stdin, lambda message: print(json.dumps(message), flush=True))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "cache"))


def fused(config=TINY, batch=3, dtype="fp32"):
    torch.manual_seed(0)
    return FusedUNet(UNet(config), batch, dtype, check=False)


def subject_of(network):
    return network.subject(network.size, network.plan())


def planted(faults):
    return [sys.executable, "-c", PLANTED.replace("FAULTS", faults)]


@pytest.mark.kernel
def test_right_kernels_pass():
    network, seen = fused(dtype="fp16"), []
    found = verdicts.check(subject_of(network), progress=seen.append)
    names = [*STEP_LAUNCHES, *(launch.name for launch in network.plan()), FORWARD]
    assert list(found) == seen == names
    assert all(v.passed for v in found.values()), {k: v for k, v in found.items() if not v.passed}
    assert all(v.allowed > 0 for k, v in found.items() if k not in STEP_LAUNCHES)


@pytest.mark.kernel
def test_planted_faults_are_found_and_count_against_their_launch():
    """All in one plan: whatever a launch does to its process, those behind it are judged."""
    network = fused()
    faults = {
        "ConvIn": ("crashes", "ended with code -6", ["conv_in"]),
        "ConvDownsample": ("wrong_pixel", "relative error|worst pixel", ["down_blocks.0.downsamplers.0.conv"]),
        "ConvUpsample": ("does_not_compile", "SyntaxError: no such instruction", ["up_blocks.0.upsamplers.0.conv"]),
        "Conv1x1": ("border", "border is not zero", [n.name for n in network.plan() if n.op.name == "conv1x1"]),
        "GroupNormSiLU": (
            "differs",
            "two runs differ",
            [n.name for n in network.plan() if "x2" in n.reads and n.op.name != "conv1x1"],
        ),
        "Conv3x3": ("never_returns", "no answer for 12 s", ["conv_out"]),
    }
    command = planted("[" + ", ".join(f"({op}, {fault})" for op, (fault, _, _) in faults.items()) + "]")
    found = verdicts.check(subject_of(network), command, timeout=12)
    reasons = {k: v.reason for k, v in found.items() if not v.passed}
    assert set(reasons) == {name for _, _, names in faults.values() for name in names}
    for _, reason, names in faults.values():
        for name in names:
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(reasons[name])
    assert found[FORWARD].passed  # by then what failed runs by its fallback


@pytest.mark.kernel
def test_what_failed_runs_by_its_fallback_and_the_images_are_right(monkeypatch):
    """Verdicts are found once, kept, and obeyed; the warning names the launch."""
    monkeypatch.setattr(verdicts, "COMMAND", planted("[(ConvDownsample, wrong_pixel)]"))
    torch.manual_seed(0)
    unet = UNet(TINY).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1 of \d+ failed .* down_blocks\.0\.downsamplers\.0\.conv \(relative"):
        network = FusedUNet(unet, 2, "fp32", check=True)
    assert network.plan().fallbacks == {"down_blocks.0.downsamplers.0.conv"} and not network.invariant
    x = torch.randn(2, 1, 8, 8)
    assert relative_error(network(x, 500), unet(x, torch.tensor(500))) < 3e-6
    kept = subject_of(network).kept()
    assert len(cached_files()) == 1 and sum(not v.passed for v in kept.values()) == 1
    monkeypatch.setattr(verdicts, "_child", lambda *_: pytest.fail("checked again"))
    with pytest.warns(UserWarning, match="downsamplers"):
        assert FusedUNet(unet, 2, "fp32", check=True).plan().fallbacks
    assert clear_cache() == 1 and not cached_files()


@torch.no_grad()
@pytest.mark.kernel
def test_statistics_are_checked_beside_the_map(monkeypatch, device):
    monkeypatch.setattr(group_norm_silu, "HELD", 1)  # one pass holds nothing
    network = FusedUNet(UNet(TINY).to(device), 3, "fp16", check=False)
    plan = network.load(torch.randn(3, 1, 8, 8, device=device), 500)
    found = {}
    for launch in plan:
        if "stats" in launch.writes and launch.op.name not in found:
            found[launch.op.name] = check_launch(plan, launch)
        plan.run_one(launch)
    assert set(found) == {"conv_in", "conv3x3", "conv_downsample", "conv_upsample"}
    assert all(v.passed for v in found.values()), found
    launch = plan.launches[0]
    for fault, says in (
        (lambda stats: stats[-1, 0, 1, 3].mul_(1.001), "statistics: relative errors"),
        (lambda stats: stats[0, 0, 0].fill_(float("nan")), "statistics: relative errors nan"),
        (lambda stats: stats[0, 0, 0, 0].mul_(1 + 1e-6 * torch.rand(())), "two runs differ"),
    ):
        broken = replace(launch, op=DamagedStatistics(launch.op, fault))
        assert says in check_launch(plan, broken).reason


class DamagedStatistics(Damaged):
    """The damage is in the statistics."""

    fallback = property(lambda self: self.op.fallback)
    tiling = property(lambda self: self.op.tiling)

    def run(self, stats, **arguments):
        self.op.run(stats=stats, **arguments)
        self.damage(stats.grid)


def test_what_follows_from_a_verdict(monkeypatch):
    """A launch that failed runs by its fallback; noise and step, which are no launches of the plan, by their references."""
    good, bad = Verdict(), Verdict("wrong")
    names = [*STEP_LAUNCHES, "conv_in", "conv_out", FORWARD]
    monkeypatch.setattr(_triton, "UNTRUSTED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.fallbacks_of(dict.fromkeys(names, good)) == set()
    with pytest.warns(UserWarning, match=r"1 of 6 failed .* what failed runs by plain PyTorch.*: conv_in \(wrong\)"):
        assert verdicts.fallbacks_of(dict.fromkeys(names, good) | dict(conv_in=bad)) == {"conv_in"}
    with pytest.warns(UserWarning, match="the whole network runs"):
        assert verdicts.fallbacks_of(dict.fromkeys(names, good) | {FORWARD: bad}) == {"conv_in", "conv_out"}
    assert not _triton.UNTRUSTED
    with pytest.warns(UserWarning, match="noise"):
        assert verdicts.fallbacks_of(dict.fromkeys(names, good) | dict(noise=bad)) == set()
    assert {"noise"} == _triton.UNTRUSTED


@pytest.mark.kernel
def test_an_untrusted_kernel_is_not_launched(monkeypatch, device):
    """Operations that rest on it run their references, and come out right."""
    seed, row = torch.tensor([3], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    want = noise.noise(seed, row, row, noise.X_T, 1, 4, 4)
    monkeypatch.setattr(noise, "_fill", lambda *_, **__: pytest.fail("launched"))
    monkeypatch.setattr(_triton, "UNTRUSTED", {"noise"})
    assert torch.equal(noise.noise(seed, row, row, noise.X_T, 1, 4, 4), want)
    assert not _triton.launches_kernel(seed, "noise", "ddpm_step") and _triton.launches_kernel(seed, "ddpm_step")


def test_a_child_that_cannot_begin_is_no_verdict():
    command = [sys.executable, "-c", "import sys; sys.exit('no torch here')"]
    with pytest.raises(RuntimeError, match=r"could not begin .*no torch here"):
        verdicts.verdicts(subject_of(fused()), command=command)
    assert not cached_files()


def test_running_out_of_memory_is_no_verdict():
    command = [
        sys.executable,
        "-c",
        "import json; print(json.dumps(dict(begin='noise'))); print(json.dumps(dict(memory='tried 80 GiB')))",
    ]
    with pytest.raises(RuntimeError, match=r"ran out of memory: take a smaller batch_size .*80 GiB"):
        verdicts.verdicts(subject_of(fused()), command=command)
    assert not cached_files()


def test_a_killed_child_and_a_late_answer_are_not_kept():
    """The first is what happens when the host's memory runs out; the second may be a busy machine's fault, and counts this once."""
    begin = "import json, os, time; print(json.dumps(dict(begin='noise')), flush=True); "
    with pytest.raises(torch.OutOfMemoryError, match="killed"):
        verdicts.verdicts(subject_of(fused()), command=[sys.executable, "-c", begin + "os.kill(os.getpid(), 9)"])
    late = {"noise": Verdict("no answer for 1 s"), "conv_in": Verdict()}
    subject = subject_of(fused())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "check", lambda *_, **__: late)
        assert verdicts.verdicts(subject) == late
    assert not cached_files()


def test_a_verdict_that_cannot_be_kept_is_still_obeyed(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(verdicts, "check", lambda *_, **__: {"conv_in": Verdict()})
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert verdicts.verdicts(subject_of(fused())) == {"conv_in": Verdict()}


def test_only_what_is_ours_is_cleared(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    (tmp_path / "verdicts").mkdir()
    (tmp_path / "verdicts" / "a.json").touch()
    (tmp_path / "thesis.tex").touch()
    assert clear_cache() == 1 and [p.name for p in tmp_path.rglob("*.*")] == ["thesis.tex"]
    monkeypatch.delenv("DDPM_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_dir().name.startswith("ddpm_fast-")


def test_a_child_finds_this_package_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "queue.py").write_text("raise SystemExit('not the queue you wanted')")
    monkeypatch.chdir(tmp_path)
    command = verdicts.python("ddpm_fast.engines.fused.checks")
    done = subprocess.run(command, input="{", capture_output=True, text=True, env=verdicts.child_environment())
    assert "JSONDecodeError" in done.stderr and "queue you wanted" not in done.stderr


def test_a_verdict_belongs_to_its_plan():
    """Another batch, type, size or network, other tiles: another key. A damaged file is as good as none."""
    keys = {
        subject_of(n).key
        for n in (
            fused(),
            fused(batch=4),
            fused(dtype="fp16"),
            fused(replace(TINY, norm_eps=1e-5)),
            fused(replace(TINY, sample_size=16)),
        )
    }
    assert len(keys) == 5 and subject_of(fused()).key in keys
    subject = subject_of(fused())
    subject.path.parent.mkdir(parents=True)
    for damage in ("", "[]", '{"noise": 3}', '{"noise": {"speed": 1}}'):
        subject.path.write_text(damage)
        assert not subject.kept()
    subject.path.write_text(json.dumps({"noise": {"reason": "no"}}))
    assert subject.kept() == {"noise": Verdict("no")}


def test_judge():
    torch.manual_seed(0)
    exact = FeatureMap.of(torch.randn(2, 16, 4, 4, dtype=torch.float64))
    plain = FeatureMap.of(exact.pixels.to(torch.float16))
    assert judge(plain, exact, plain).passed
    worse = FeatureMap.of(exact.pixels * (1 + 3e-3), torch.float16)
    assert "relative error" in judge(worse, exact, plain).reason
    pixel = FeatureMap.of(plain.pixels)
    pixel.pixels[1, :, 2, 2] += 5e-3
    assert "worst pixel" in judge(pixel, exact, plain).reason  # L2 alone would let it pass
    pixel.pixels[1, :, 2, 2] = float("nan")
    assert "relative error" in judge(pixel, exact, plain).reason
    pixel.rows.copy_(plain.rows)
    pixel.grid[0, 0, 0, 0] = float("nan")
    assert "border" in judge(pixel, exact, plain).reason
