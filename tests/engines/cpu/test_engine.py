"""CPU engine: accuracy against the fp64 network and the reference loop, and batch invariance."""

import builtins
import copy
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.diffusion.solvers import StepTable
from ddpm_fast.engines.base import SamplingState
from ddpm_fast.engines.cpu.engine import CPUEngine
from ddpm_fast.engines.eager import EagerEngine
from ddpm_fast.kernels import noise
from ddpm_fast.kernels.ddpm_step import COLUMNS
from ddpm_fast.utils.cache import cached_files
from ddpm_fast.utils.numerics import relative_error

T = 50
SMALL = dict(sample_size=16, channels=(16, 32), layers=1, attention=(False, True), norm_groups=8)
NETWORKS = {
    "plain": dict(),
    "odd widths": dict(channels=(20, 36), norm_groups=4),
    "28x28": dict(channels=(8, 16, 24), attention=(False, True, False), sample_size=28),
    "not square": dict(sample_size=(8, 24)),
    "classes": dict(num_classes=7),
    "heads": dict(heads=(1, 4)),
    "narrow heads": dict(channels=(12, 24), head_dim=6, norm_groups=4),
    "attention everywhere": dict(attention=True, heads=2, sample_size=(12, 4)),
    "attention up only": dict(attention=False, up_attention=(True, False), mid_attention=False),
    "scale-shift, learned variance": dict(
        scale_shift=True, out_channels=6, cos_first=True, freq_shift=0
    ),
    "resblocks resample": dict(
        down_resample="resnet", up_resample="resnet", scale_shift=True, num_classes=3
    ),
    "centred, divided": dict(
        center_input=True, mid_scale=1.4142135, mid_norm_groups=0, downsample_padding=1
    ),
    "one pixel at the bottom": dict(
        channels=(8, 8, 8, 8), norm_groups=4, attention=(False, False, False, True), sample_size=8
    ),
    "blocks per level": dict(
        channels=(16, 24, 32), layers=(1, 1, 2), attention=(False, True, True), num_classes=3
    ),
    "one channel": dict(in_channels=1, out_channels=1, layers=2),
}


def network(**changes):
    config = UNetConfig(**{**SMALL, **changes})
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for p in unet.parameters():  # norms and biases without effect would hide faults
        p.data += 0.1 * torch.randn_like(p)
    return unet


def shape_of(unet):
    return (unet.config.in_channels, *unet.config.size)


def batch(unet, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape_of(unet), generator=g)
    t = torch.randint(0, T, (count,), generator=g)
    classes = unet.config.num_classes
    return (x, t) if classes is None else (x, t, torch.randint(0, classes, (count,), generator=g))


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_references():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def one_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def engine(unet, threads=2):
    pytest.importorskip("llvmlite")
    return CPUEngine(unet, shape_of(unet), T, threads)


@torch.no_grad()
def exact_output(unet, x, t, *labels):
    return copy.deepcopy(unet).double()(x.double(), t, *labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_equals_that_of_the_unet(name):
    unet = network(**NETWORKS[name])
    inputs = batch(unet, 3)
    out = engine(unet)(*inputs)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(out, exact_output(unet, *inputs)) < 1e-5


def test_winograd_and_direct_convolutions_are_both_used():
    from collections import Counter

    pytest.importorskip("llvmlite")
    from ddpm_fast.engines.cpu.lowering import UNetProgram
    from ddpm_fast.engines.cpu.program import NUMBERS

    program = UNetProgram(network(), (3, 16, 16), 16)
    count = Counter(row[0] for row in program.instructions)
    assert (
        count[NUMBERS["winograd_in"]] > 5
        and count[NUMBERS["gemm"]] > count[NUMBERS["winograd_in"]] + 5
    )


# ---- bits


@pytest.mark.parametrize("name", ["heads", "resblocks resample", "28x28"])
def test_bits_do_not_depend_on_the_batch(name):
    """Alone, first, last and in a partial batch, on 1 to 3 threads, which may share an image."""
    unet = network(**NETWORKS[name])
    inputs = batch(unet, 7)
    two = engine(unet, threads=2)
    assert two.invariant
    every = two(*inputs)
    for threads in (1, 3):
        other = engine(unet, threads=threads)
        for part in (slice(0, 1), slice(6, 7), slice(2, 5), slice(1, 7), slice(0, 7)):
            assert torch.equal(other(*(v[part] for v in inputs)), every[part]), (threads, part)


def test_running_threads_take_over_unclaimed_parts():
    """As on a machine whose other cores are busy."""
    from concurrent.futures import Future

    unet = network()
    inputs = batch(unet, 3)
    shared = engine(unet, threads=3)
    every = shared(*inputs)

    class NotRunning:
        def submit(self, *_):
            done = Future()
            done.set_result(None)
            return done

    shared._executor._helpers = NotRunning()
    assert torch.equal(shared(*inputs), every)
    assert torch.equal(shared(*(v[:1] for v in inputs)), every[:1])


def test_time_rows_are_computed_per_step_if_the_table_is_too_large(monkeypatch):
    unet = network(num_classes=7)
    inputs = batch(unet, 5)
    whole = engine(unet)(*inputs)
    monkeypatch.setattr("ddpm_fast.models.time_table.LARGEST", 0)
    row_by_row = engine(unet)
    out = row_by_row(*inputs)
    assert relative_error(out, whole) < 1e-6
    assert torch.equal(row_by_row(*(v[3:] for v in inputs)), out[3:])


def test_noise_is_bit_exact():
    unet = network(sample_size=(12, 8))
    coef = np.zeros((2, len(COLUMNS)))
    coef[:, COLUMNS.index("sigma")] = coef[:, COLUMNS.index("clip")] = 1  # x_{t-1} = z
    seed, image = torch.tensor([0, -5, 2**62, 9]), torch.tensor([0, 3, 2**40 + 5, 2**62])
    state = SamplingState(
        torch.zeros(4, *shape_of(unet)), torch.zeros(4, dtype=torch.int32), seed, image, None
    )
    for i in engine(unet).steps(state, StepTable(np.array([3, 2]), coef)):
        z = noise.noise_reference(
            seed, image, torch.full((4,), i - 1), noise.REVERSE, shape_of(unet)
        )
        assert torch.equal(state.x, z)


@pytest.mark.parametrize("width", [4, 8])
def test_narrower_vectors(width, monkeypatch):
    pytest.importorskip("llvmlite")
    for module in ("executor", "runtime"):
        monkeypatch.setattr(f"ddpm_fast.engines.cpu.{module}.vector_width", lambda: width)
    for name in ("heads", "odd widths", "resblocks resample"):
        unet = network(**NETWORKS[name])
        inputs = batch(unet, 2)
        assert relative_error(engine(unet)(*inputs), exact_output(unet, *inputs)) < 1e-5
    s = sampler(unet)
    table = s.table(solver="dpm++2m-sde", steps=3)
    state, exact = start(s, table), start(s, table)
    list(engine(unet).steps(state, table))
    s.run(exact, table)
    assert (state.x - exact.x).abs().max() < 1e-4


# ---- loops


def sampler(unet, variance="fixed_large", prediction="eps", clip=1.0):
    return Sampler(
        unet,
        NoiseSchedule.linear(timesteps=T),
        shape_of(unet),
        prediction,
        variance,
        clip,
        engine="reference",
    )


def start(s, table, count=5, layout=torch.channels_last):
    state = s.begin(torch.arange(count) + 3, 11)
    state.x = state.x.contiguous(memory_format=layout)
    if table.multistep:
        state.x_0 = torch.zeros_like(state.x)
    return state


LOOPS = {
    "ddpm": dict(solver="ddpm", steps=10),
    "ddim": dict(solver="ddim", steps=5),
    "ddim, eta": dict(solver="ddim", steps=5, eta=0.7),
    "multistep": dict(solver="dpm++2m", steps=5),
    "multistep, noisy": dict(solver="dpm++2m-sde", steps=5),
    "as diffusers": dict(solver="ddpm", steps=5, preset="diffusers"),
}
SHORT = dict(channels=(8, 16), sample_size=8, norm_groups=4)
OF_NETWORKS = {
    "plain": (dict(), dict()),
    "classes": (dict(num_classes=7), dict(prediction="v", clip=None)),
    "fixed variance of two": (dict(out_channels=6), dict()),
    "learned": (dict(out_channels=6), dict(variance="learned")),
    "learned range": (dict(out_channels=6, num_classes=3), dict(variance="learned_range")),
}


@pytest.mark.parametrize("which", OF_NETWORKS)
def test_steps_equal_the_reference_loop(which):
    """x, x_0 and step_index after a loop; the truth is the reference loop with an fp64 network."""
    changes, options = OF_NETWORKS[which]
    unet = network(**SHORT, **changes)
    s, exact_unet = sampler(unet, **options), copy.deepcopy(unet).double()
    model = lambda x, *a: exact_unet(x.double(), *a).float()
    reference = Sampler(model, s.schedule, s.shape, s.prediction, s.variance, s.clip)
    e = engine(unet)
    for name, loop in LOOPS.items():
        table = s.table(**loop)
        exact = start(s, table)
        reference.run(exact, table)
        state = start(s, table)
        assert list(e.steps(state, table)) == list(range(1, len(table) + 1))
        assert torch.equal(state.step_index, exact.step_index)
        pairs = [(state.x, exact.x), (state.x_0, exact.x_0)][: 1 + table.multistep]
        for computed, truth in pairs:
            bound = 1e-4 * max(1, float(truth.abs().max()))
            assert (computed - truth).abs().max() < bound, name


def test_steps_do_not_depend_on_the_batch_and_update_the_state_in_place():
    unet = network(num_classes=7)
    s, e = sampler(unet), engine(unet)
    table = s.table(solver="dpm++2m-sde", steps=6)
    every, alone = start(s, table), start(s, table)
    alone = SamplingState(
        *(
            v[4:]
            for v in (alone.x, alone.step_index, alone.seed, alone.image, alone.labels, alone.x_0)
        )
    )
    seen = []
    for i in e.steps(every, table):
        assert every.step_index.tolist() == [i] * 5
        seen.append(every.x[4].clone())
    for i in e.steps(alone, table):
        assert torch.equal(alone.x[0], seen[i - 1])


def test_images_at_different_steps_and_in_another_layout():
    unet = network()
    s, e = sampler(unet), engine(unet)
    table = s.table(solver="ddpm", steps=4)
    apart, together = start(s, table, layout=torch.contiguous_format), start(s, table)
    assert not apart.x.is_contiguous(memory_format=torch.channels_last)
    for state in (apart, together):
        state.step_index[:] = torch.tensor([2, 0, 1, 4, 0])
    at_rest = apart.x[3].clone()
    assert list(e.steps(apart, table)) == list(
        EagerEngine(unet, torch.float32).steps(together, table)
    )
    assert (
        torch.equal(apart.x[3], at_rest)
        and apart.step_index.tolist() == together.step_index.tolist() == [4] * 5
    )
    assert (apart.x - together.x).abs().max() < 1e-4


def test_a_sampler_uses_the_cpu_engine(monkeypatch):
    unet = network(num_classes=7)
    reference = Sampler(
        unet, NoiseSchedule.linear(timesteps=T), shape_of(unet), engine="reference"
    ).sample(3, steps=5, output="float")
    monkeypatch.setattr("ddpm_fast.engines.cpu.engine.CPUEngine", lambda *args: engine(unet))
    s = Sampler(unet, NoiseSchedule.linear(timesteps=T), shape_of(unet))
    assert s.engine.name == "cpu"
    every = s.sample(3, steps=5, output="float")
    assert (every - reference).abs().max() < 1e-4
    assert torch.equal(s.sample(range(2, 3), steps=5, output="float"), every[2:])


# ---- cache and dependencies


def test_code_is_cached_and_a_damaged_file_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    unet = network(channels=(8, 8), attention=False, mid_attention=False, sample_size=4)
    inputs = batch(unet, 2)
    first = engine(unet)
    assert not first._executor.from_cache
    [cached] = cached_files()  # no temporary files
    whole = cached.read_bytes()
    second = engine(unet)
    assert second._executor.from_cache and torch.equal(second(*inputs), first(*inputs))
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        cached.write_bytes(damaged)
        again = engine(unet)
        assert not again._executor.from_cache and torch.equal(again(*inputs), first(*inputs))
        assert cached.read_bytes() == whole and len(cached_files()) == 1


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "file"))
    unet = network(channels=(8, 8), attention=False, mid_attention=False, sample_size=4)
    assert engine(unet)(*batch(unet, 2)).isfinite().all()


def test_without_llvmlite_the_reference_runs_and_names_the_package(monkeypatch):
    for name in [m for m in sys.modules if m.startswith(("ddpm_fast.engines.cpu", "llvmlite"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("ddpm_fast.engines.cpu", raising=False)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("llvmlite"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    unet = network()
    s = Sampler(unet, NoiseSchedule.linear(), shape_of(unet))
    assert s.engine.name == "reference" and "pip install ddpm-fast[cpu]" in s.engine.reason
    with pytest.raises(ValueError, match=r"ddpm-fast\[cpu\]"):
        Sampler(unet, NoiseSchedule.linear(), shape_of(unet), engine="cpu")


def test_weights_are_copied():
    unet = network()
    inputs = batch(unet, 2)
    e, changed = engine(copy.deepcopy(unet)), network()
    e2 = engine(changed)
    before = e2(*inputs)
    for p in changed.parameters():
        p.data.zero_()
    assert torch.equal(e2(*inputs), before) and torch.equal(e(*inputs), before)


# ---- errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_raise(dtype):
    unet = network().to(dtype)
    with pytest.raises(ValueError, match=f"{dtype}.*float32"):
        CPUEngine(unet, shape_of(unet), T)


def test_invalid_arguments_raise():
    unet = network(num_classes=7)
    for options, message in {
        (("shape", (3, 15, 16)),): r"divisible by 2",
        (("shape", (1, 16, 16)),): r"expected \(3, height, width\)",
        (("timesteps", 0),): "at least 1",
        (("threads", 0),): "at least 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            CPUEngine(unet, **{"shape": shape_of(unet), "timesteps": T, **dict(options)})
    e = engine(unet)
    x, t, labels = batch(unet, 3)
    for arguments, message in [
        ((x[:, :, :8], t, labels), r"x_t .*\(16, 16\)"),
        ((x.long(), t, labels), "x_t is torch.int64 on cpu; expected floating"),
        ((x, t + T, labels), f"0..{T - 1}"),
        ((x, t.float(), labels), "expected integers"),
        ((x, t[:2], labels), r"expected integers \[3\]"),
        ((x, t), "labels missing"),
        ((x, t, labels + 7), r"labels\b.* 0..6"),
    ]:
        with pytest.raises(ValueError, match=message):
            e(*arguments)
    assert e(x, 3, labels).shape == x.shape and e(x[:0], t[:0], labels[:0]).shape == (0, 3, 16, 16)


def test_invalid_states_and_tables_raise():
    unet = network()
    s, e = sampler(unet), engine(unet)
    state = s.begin(torch.arange(2), 0)
    with pytest.raises(ValueError, match="mean and variance"):
        e.steps(state, replace(s.table(solver="ddpm", steps=5), learned=True))
    longer = Sampler(unet, NoiseSchedule.cosine(2 * T), s.shape)
    with pytest.raises(ValueError, match=f"0..{T - 1}"):
        e.steps(state, longer.table(solver="ddpm", steps=5))
    state.step_index += 6
    with pytest.raises(ValueError, match="step_index"):
        e.steps(state, s.table(solver="ddpm", steps=5))


def test_an_interrupt_leaves_no_thread_waiting(monkeypatch):
    """An interrupt while threads are started: the call ends, and the next call computes."""
    unet = network()
    inputs, e = batch(unet, 4), engine(unet)
    expected = e(*inputs)
    lead = e._executor._lead
    submit = lead.submit

    def interrupted(*arguments):
        submit(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(lead, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        e(*inputs)
    monkeypatch.undo()
    assert torch.equal(e(*inputs), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_computes():
    code = (
        "import os, torch\n"
        "from ddpm_fast import UNet, UNetConfig\n"
        "from ddpm_fast.engines.cpu.engine import CPUEngine\n"
        "c = UNetConfig(8, channels=(16,), norm_groups=4, attention=False, mid_attention=False)\n"
        "e = CPUEngine(UNet(c).eval(), (3, 8, 8), 10, threads=2)\n"
        "x, t = torch.randn(4, 3, 8, 8), torch.arange(4)\n"
        "expected = e(x, t)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(e(x, t), expected) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    pytest.importorskip("llvmlite")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
