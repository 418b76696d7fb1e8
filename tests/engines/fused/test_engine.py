"""Engines: equal images, captured steps, buffers, and errors of a GPU simulated on a CPU."""

import gc
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import NoiseSchedule, Sampler, Trajectory, UNet, UNetConfig
from ddpm_fast.engines.base import SamplingState
from ddpm_fast.engines.fused import verification
from ddpm_fast.engines.fused.calibration import load_calibration
from ddpm_fast.engines.fused.engine import STEPS_PER_GRAPH, FusedEngine
from ddpm_fast.kernels.step_index import advance, advance_reference
from ddpm_fast.utils.numerics import relative_error

SCHEDULE = NoiseSchedule.linear()
NET = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    channels=(16, 32),
    layers=1,
    attention=(False, True),
    norm_groups=4,
)
LOOPS = [
    dict(solver="ddpm", steps=6),
    dict(solver="ddim", steps=5, eta=0.5),
    dict(solver="dpm++2m", steps=5),
    dict(solver="dpm++2m-sde", steps=4),
]


def unet(num_classes=10, **options):
    torch.manual_seed(0)
    return UNet(UNetConfig(**NET | options, num_classes=num_classes)).eval().requires_grad_(False)


def sampler(engine, model=None, **options):
    return Sampler(model or unet(), SCHEDULE, (1, 8, 8), engine=engine, **options)


class Recorded:
    """Replacement of a CUDA graph that stores the step and counts its replays."""

    made: ClassVar[list["Recorded"]] = []

    def __init__(self, step, repeats=1, pool=None):
        self.step, self.repeats, self.replays, self.freed = step, repeats, 0, False
        step(), step()  # as a capture's warm-up does
        Recorded.made.append(self)

    def __call__(self):
        assert not self.freed
        self.replays += 1
        with torch._C._DisableTorchDispatch():  # the device's work, not the host's
            for _ in range(self.repeats):
                self.step()

    def free(self):
        self.freed = True


@pytest.fixture
def graphed():
    """Creates samplers whose engine captures its steps with `Recorded`."""
    Recorded.made.clear()

    def make(model=None, **options):
        s = sampler("fused", model, dtype="fp32", **options)
        s.engine = FusedEngine(s.model, s.shape, "fp32", s.device, len(SCHEDULE), graph=Recorded)
        return s

    return make


# ---- images


@pytest.mark.parametrize("loop", LOOPS, ids=lambda v: v["solver"])
def test_fused_by_fallbacks_equals_the_reference(loop):
    options = dict(seed=3, batch_size=2, output="float") | loop
    expected = sampler("reference").sample(5, **options)
    result = sampler("fused", dtype="fp32").sample(5, **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("loop", "dtype"),
    [
        *(pytest.param(loop, "fp32", marks=pytest.mark.full) for loop in LOOPS),
        (LOOPS[2], "fp16"),
    ],
    ids=str,
)
def test_fused_by_kernels_equals_the_reference(loop, dtype, device, figure):
    options = dict(seed=3, labels=[1, 2], output="float") | loop | dict(steps=3)
    model = unet().to(device)
    exact = sampler("reference", model).sample(2, **options)
    result = sampler("fused", model, dtype=dtype).sample(2, **options)
    plain = sampler("reference", model, dtype=dtype).sample(2, **options)
    error, other = relative_error(result, exact), relative_error(plain, exact)
    figure(
        f"3 steps of {loop['solver']} by kernels, {dtype}; plain PyTorch in that type",
        f"{error:.1e}; {other:.1e}",
    )
    assert error <= max(2 * other, 1e-5)


def test_learned_variance_and_solvers_that_set_the_variance():
    model = unet(None, out_channels=2)
    for variance, loop in (
        ("learned_range", LOOPS[0]),
        ("fixed_small", LOOPS[0]),
        ("fixed_small", LOOPS[2]),
    ):
        options = dict(seed=1, output="float") | loop
        expected, result = (
            sampler(e, model, variance=variance, dtype="fp32").sample(3, **options)
            for e in ("reference", "fused")
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.kernel
@pytest.mark.full
def test_bits_do_not_depend_on_the_batch(device):
    s = sampler("fused", unet().to(device), dtype="fp16")
    options = dict(seed=2, solver="ddpm", steps=2, output="float")
    whole = s.sample(5, batch_size=5, **options)
    assert s.engine.invariant
    for images, batch in ((range(3, 4), 1), ([4, 0, 2], 2), (range(1, 5), 3)):
        assert torch.equal(s.sample(images, batch_size=batch, **options), whole[list(images)])


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_images_at_different_steps_share_a_batch(engine):
    """Image 0 starts two steps ahead of image 1; both equal the images of separate batches."""
    s = sampler(engine, dtype="fp32")
    table = s.table(steps=6)
    alone = s.sample(2, steps=6, batch_size=1, output="float")
    ahead, together = s.begin(torch.tensor([0]), 0), s.begin(torch.tensor([0, 1]), 0)
    run = s.engine.steps(ahead, table)
    assert [next(run), next(run)] == [1, 2]
    together.x[0], together.step_index[0] = ahead.x[0], ahead.step_index[0]
    assert together.step_index.tolist() == [2, 0]
    s.run(together, table)
    torch.testing.assert_close(together.x, alone, rtol=0, atol=1e-5)


# ---- capturing


def test_after_the_first_step_the_host_only_replays(graphed):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    s, seen, counts = graphed(), [], []
    table = s.table(solver="ddpm", steps=20)
    state = s.begin(torch.arange(4), 0)
    with Calls():
        for done in s.engine.steps(state, table):
            counts.append((done, len(seen)))
    assert [done for done, _ in counts] == list(range(1, 21))
    # no torch operation, so no synchronization and no allocation
    assert len({number for _, number in counts}) == 1
    single = next(g for g in Recorded.made if g.repeats == 1)
    assert single.replays == 20


def test_several_steps_per_graph_without_a_callback(graphed):
    s, expected = graphed(), sampler("reference")
    options = dict(seed=1, steps=STEPS_PER_GRAPH + 3, output="float")
    torch.testing.assert_close(
        s.sample(3, **options), expected.sample(3, **options), rtol=0, atol=1e-4
    )
    assert {g.repeats: g.replays for g in Recorded.made} == {STEPS_PER_GRAPH: 1, 1: 3}
    seen = Trajectory()
    s.sample(3, **options, callback=seen)
    assert len(seen.t) == STEPS_PER_GRAPH + 3 and {g.repeats: g.replays for g in Recorded.made} == {
        STEPS_PER_GRAPH: 1,
        1: STEPS_PER_GRAPH + 6,
    }


def test_the_last_batch_uses_the_captured_size(graphed):
    s = graphed()
    images = s.sample(10, batch_size=4, steps=3, output="float")
    assert [b.capacity for b in s.engine._buffers] == [4] and len(Recorded.made) == 2
    torch.testing.assert_close(
        images, sampler("reference").sample(10, steps=3, output="float"), rtol=0, atol=1e-4
    )
    s.sample(3, steps=3)  # one image of the buffers is unused
    assert [b.capacity for b in s.engine._buffers] == [4]
    s.sample(1, steps=3)
    assert [b.capacity for b in s.engine._buffers] == [4, 1]
    for images, capacities in (
        (17, [4, 1, 24]),
        (13, [4, 1, 24]),
        (25, [4, 1, 32]),  # replaces the buffers of 24
    ):
        s.sample(images, steps=1)
        assert [b.capacity for b in s.engine._buffers] == capacities


def test_one_graph_serves_every_solver_and_number_of_steps(graphed):
    s = graphed()
    for loop in LOOPS:
        result, expected = (
            v.sample(2, seed=4, output="float", **loop) for v in (s, sampler("reference"))
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert len(Recorded.made) == 2  # one step, and several


def test_a_state_stays_in_its_buffers_until_it_is_released(graphed):
    s = graphed()
    table = s.table(steps=2)
    with s.begin(torch.arange(2), 0) as first, s.begin(torch.arange(2), 1) as second:
        assert first.x.data_ptr() == s.engine._buffers[0].x.data_ptr()
        s.run(first, table)
        x = first.x.clone()
        s.run(second, table)
        assert torch.equal(first.x, x) and not torch.equal(second.x, x)
    with s.begin(torch.arange(2), 2) as third:
        first.release()  # a second time, after the buffers were reserved for another state
        assert len(s.engine._buffers) == 2 and not s.engine._buffers[0].idle
        s.run(third, table)
        with pytest.raises(ValueError, match="state is not in the buffers of this engine"):
            s.run(first, table)
    with pytest.raises(ValueError, match="state is not in the buffers of this engine"):
        s.run(SamplingState.empty(2, s.shape, s.device, True), table)


def test_the_buffers_of_a_deleted_state_are_idle(graphed):
    s = graphed()
    for seed in range(3):
        s.begin(torch.arange(2), seed)  # neither released nor kept
    assert len(s.engine._buffers) == 1 and s.engine._buffers[0].idle


def test_a_released_state_does_not_keep_the_network(graphed):
    """A stream whose batch ran out of memory refers to its state while it frees the engine."""
    s = graphed()
    with s.begin(torch.arange(2), 0) as state:
        s.run(state, s.table(steps=2))
    buffers = weakref.ref(s.engine._buffers[0])
    Recorded.made.clear()  # these refer to the buffers
    s.engine.free()
    gc.collect()
    assert state.x.shape == (2, 1, 8, 8) and buffers() is None


@pytest.mark.parametrize("loop", LOOPS, ids=lambda v: v["solver"])
def test_the_next_batch_overwrites_no_images(graphed, loop):
    """With one channel, images [N, 1, H, W] could be views of the state by mistake."""
    s, batches = graphed(), []
    for _, images in s.stream(6, batch_size=2, output="float", **loop):
        batches.append((images, images.clone()))
    assert [b.capacity for b in s.engine._buffers] == [2]
    assert all(torch.equal(images, before) for images, before in batches)
    x_0 = torch.cat([images for images, _ in batches])
    s.clip, expected = None, sampler("reference", clip=None).invert(x_0, 4, labels=3, batch_size=2)
    result = s.invert(x_0, 4, labels=3, batch_size=2)
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-4)
    assert [b.capacity for b in s.engine._buffers] == [2]


def test_buffers_are_idle_after_a_batch_ends_early(graphed, monkeypatch):
    """A closed stream, a stop, an exception in a callback, and one while x_T is computed."""
    s, options = graphed(), dict(steps=4, batch_size=2)
    expected = s.sample(2, **options)
    idle = lambda: [b.idle for b in s.engine._buffers] == [True]
    stream = s.stream(6, **options)
    next(stream)
    stream.close()
    assert idle()
    assert len(s.sample(2, stop=iter([False, True]).__next__, **options)) == 0 and idle()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.sample(2, callback=interrupt, **options)
    assert idle()
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.sampling.batch_sampler.noise.noise", interrupt)
        with pytest.raises(KeyboardInterrupt):
            s.sample(2, **options)
    assert idle() and torch.equal(s.sample(2, **options), expected)


def test_new_weights_during_a_batch(graphed):
    """A batch that has started continues with the old weights."""
    model = unet()
    s, expected = graphed(model), sampler("reference").sample(2, steps=4, output="float")
    state = s.begin(torch.arange(2), 0)
    run = s.steps(state, s.table(steps=4))
    next(run)
    with torch.no_grad():
        model.conv_out.weight.mul_(1.5)
    changed = s.sample(2, steps=4, output="float")
    assert list(run)[-1] == 4
    torch.testing.assert_close(state.x, expected, rtol=0, atol=1e-4)
    assert relative_error(changed, state.x) > 1e-3
    state.release()


def test_out_of_memory_halves_the_batch(graphed):
    s = graphed()
    make = s.engine._make

    def scarce(batch):
        if batch > 3:
            raise torch.OutOfMemoryError("no memory")
        return make(batch)

    s.engine._make = scarce
    with pytest.warns(UserWarning, match="out of memory") as caught:
        result = s.sample(9, batch_size=8, steps=3, output="float")
    assert [str(w.message) for w in caught] == [
        "out of memory with a batch of 8 images; continuing with 4",
        "out of memory with a batch of 4 images; continuing with 2",
    ]
    torch.testing.assert_close(
        result, sampler("reference").sample(9, steps=3, output="float"), rtol=0, atol=1e-4
    )
    s.engine.free()
    assert all(g.freed for g in Recorded.made)
    s.engine._make = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory at all"))
    with (
        pytest.warns(UserWarning, match="continuing with 1"),
        pytest.raises(torch.OutOfMemoryError, match="at all"),
    ):
        s.sample(2, steps=3)


@pytest.mark.parametrize("change", ["in place", "through .data"])
@pytest.mark.parametrize("engine", ["reference", "fused", "cpu"])
def test_new_weights_are_used(engine, change):
    model = unet()
    s = sampler(engine, model, dtype="fp32")
    before = s.sample(2, steps=3, output="float")
    with torch.no_grad():
        weight = model.conv_out.weight
        (weight if change == "in place" else weight.data).mul_(1.5)
    after = s.sample(2, steps=3, output="float")
    assert relative_error(after, before) > 1e-3
    torch.testing.assert_close(
        after, sampler("reference", model).sample(2, steps=3, output="float"), rtol=0, atol=1e-4
    )


def test_sampling_during_another_batch(graphed):
    """A second batch of the same size uses other buffers."""
    s, expected = graphed(), sampler("reference").sample(4, steps=6, output="float")
    table = s.table(steps=6)
    state = s.begin(torch.arange(4), 0)
    run = s.engine.steps(state, table)
    next(run)
    torch.testing.assert_close(s.sample(4, steps=6, output="float"), expected, rtol=0, atol=1e-4)
    assert list(run)[-1] == 6
    torch.testing.assert_close(state.x, expected, rtol=0, atol=1e-4)


def test_inference_mode_and_newer_precision_settings():
    expected = sampler("reference").sample(2, steps=2, output="float")
    with torch.inference_mode():
        assert torch.equal(sampler("reference").sample(2, steps=2, output="float"), expected)
        torch.testing.assert_close(
            sampler("fused", dtype="fp32").sample(2, steps=2, output="float"),
            expected,
            rtol=0,
            atol=1e-4,
        )
        s = sampler("fused", dtype="fp32")
        s.engine.prepare(2)  # buffers of inference mode could not be written after it
    torch.testing.assert_close(s.sample(2, steps=2, output="float"), expected, rtol=0, atol=1e-4)
    code = (
        "import torch\n"
        "conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul\n"
        "conv.fp32_precision = matmul.fp32_precision = 'tf32'\n"
        "from ddpm_fast import NoiseSchedule, Sampler\n"
        "Sampler(lambda x, t: x, NoiseSchedule.linear(), (1, 4, 4)).sample(1, steps=2)\n"
        "assert conv.fp32_precision == matmul.fp32_precision == 'tf32'"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# ---- stopping


def test_stop_keeps_finished_batches():
    s, calls = sampler("reference"), []

    def stop():
        calls.append(1)
        return len(calls) == 8

    whole = s.sample(6, batch_size=2, steps=3)
    result = s.sample(6, batch_size=2, steps=3, stop=stop)
    assert torch.equal(result, whole[:4])  # stopped in the second step of the third batch


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_stop_after_the_last_step_keeps_the_batch(engine):
    s = sampler(engine, dtype="fp32")
    whole, calls = s.sample(4, batch_size=2, steps=3, output="float"), []
    result = s.sample(
        4, batch_size=2, steps=3, output="float", stop=lambda: calls.append(1) or len(calls) == 4
    )
    assert torch.equal(result, whole[:2])  # stop is called before a batch and after its steps 1, 2


# ---- choice of the engine


def test_reason_of_the_auto_engine():
    assert sampler("auto", lambda x, t: x).engine.reason == "the model is not a ddpm_fast UNet"
    half = sampler("auto", unet().bfloat16())
    assert (half.engine.name, half.precision) == (
        "reference",
        "bf16",
    ) and half.engine.reason == "bf16 on cpu"
    assert sampler("fused", dtype="fp8").engine.name == "fused"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(engine="cuda"),
            "engine is 'cuda'; expected one of auto, fused, compile, cpu, reference",
        ),
        (
            dict(engine="fused", model=lambda x, t: x),
            "engine 'fused' takes a UNet; this model is function",
        ),
        (dict(engine="cpu", model=lambda x, t: x), "engine 'cpu' takes a UNet in fp32 on a CPU"),
        (
            dict(engine="reference", dtype="fp8"),
            r"fp8 needs engine 'fused'; this is engine 'reference' \(as requested\)",
        ),
        (
            dict(engine="auto", dtype="fp8"),
            r"fp8 needs engine 'fused'; this is engine 'reference' \(fp8 on cpu\)",
        ),
        (
            dict(engine="auto", dtype="int8"),
            "dtype is 'int8'; expected one of fp32, fp16, bf16, fp8",
        ),
        (dict(engine="auto", dtype="bf16", model=lambda x, t: x), "only a UNet is cast"),
    ],
    ids=lambda v: re.sub(r" at 0x\w+", "", str(v)),
)
def test_invalid_requests_raise(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_half_precision_by_name_copies_the_weights():
    model = unet()
    s = sampler("reference", model, dtype="bf16")
    assert model.dtype == torch.float32 and s.model.dtype == torch.bfloat16
    torch.testing.assert_close(
        s.sample(2, steps=3), sampler("reference", unet().bfloat16()).sample(2, steps=3)
    )


def test_torch_compile_is_compared_with_the_network(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: lambda *a: model(*a) * 1.001)
    with pytest.raises(RuntimeError, match=r"error of torch\.compile is 1\.0e-03; expected"):
        sampler("compile").sample(1, steps=2)
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: model)
    assert torch.equal(
        sampler("compile").sample(2, steps=3), sampler("reference").sample(2, steps=3)
    )


# ---- advance


@pytest.mark.kernel
def test_advance(device):
    t_of = torch.tensor([900, 500, 3, 0], device=device)
    row = torch.tensor([0, 1, 2, 3, 3] * 120, dtype=torch.int32, device=device)
    label = torch.arange(600, device=device) % 10
    t, entry = torch.full_like(label, -1), torch.full_like(label, -1)
    for by in (0, 1, 1):
        expected = advance_reference(row, t_of, label, 10, by)
        advance(row, t_of, t, entry, label, 10, by)
        assert all(
            torch.equal(result.long(), v)
            for result, v in zip((row, t, entry), expected, strict=True)
        )
    assert (
        row[:5].tolist() == [2, 3, 3, 3, 3] and t[:5].tolist() == [3, 0, 0, 0, 0] and entry[3] == 3
    )


def test_invalid_arguments_of_advance_raise():
    row, other = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    for options in (dict(t=other[:1]), dict(step=other), dict(t_of=other.float()), dict(label=row)):
        with pytest.raises(ValueError, match="expected int"):
            advance(
                **dict(step=row, t_of=other, t=other, time_row=other, label=other, classes=1)
                | options
            )


# ---- a wrong kernel


@pytest.mark.kernel
@pytest.mark.full
def test_a_wrong_kernel_runs_by_its_fallback(device, tmp_path, monkeypatch):
    from ddpm_fast.kernels.conv3x3 import Conv3x3

    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    model = unet(None, attention=False, mid_attention=False).to(device)
    run = Conv3x3.run

    def wrong(self, x, out, **more):
        run(self, x=x, out=out, **more)
        if out.channels == 1:
            out.pixels[:, :, 2, 3] += 0.5

    monkeypatch.setattr(Conv3x3, "run", wrong)
    monkeypatch.setattr(
        verification, "run_checks", partial(verification.run_checks, command=planted(tmp_path))
    )
    s = sampler("fused", model, dtype="fp32")
    s.engine = FusedEngine(model, s.shape, "fp32", s.device, len(SCHEDULE), graph=None, check=True)
    with pytest.warns(UserWarning, match="conv_out"):
        result = s.sample(2, steps=2, output="float")
    (buffers,) = s.engine._buffers
    assert "conv_out" in buffers.network.plan().fallbacks and not s.engine.invariant
    torch.testing.assert_close(
        result, sampler("reference", model).sample(2, steps=2, output="float"), rtol=0, atol=1e-4
    )


def planted(folder):
    """Command of a self-check worker with the same fault."""
    script = folder / "child.py"
    script.write_text(
        "from ddpm_fast.engines.fused import checks\n"
        "from ddpm_fast.kernels.conv3x3 import Conv3x3\n"
        "from ddpm_fast.testing import interpret_like_a_gpu\n"
        "interpret_like_a_gpu()\n"
        "run = Conv3x3.run\n"
        "def wrong(self, x, out, **more):\n"
        "    run(self, x=x, out=out, **more)\n"
        "    if out.channels == 1:\n"
        "        out.pixels[:, :, 2, 3] += 0.5\n"
        "Conv3x3.run = wrong\n"
        "checks.main()\n"
    )
    return [sys.executable, str(script)]


def test_fp8_uses_the_calibration_of_the_folder():
    """Units of the included network, and the accuracy of its samples."""
    folder = Path(__file__).parents[3] / "weights" / "fashion-mnist-32"
    s = Sampler.from_pretrained(folder, "cpu", "fp8", engine="fused")
    s.engine.prepare(1)
    (buffers,) = s.engine._buffers
    calibration = load_calibration(folder, s.model)
    assert calibration is not None and buffers.network._packed.units == calibration.units
    exact = Sampler.from_pretrained(folder, "cpu", engine="reference")
    result, expected = (v.sample(1, solver="ddim", steps=3, output="float") for v in (s, exact))
    assert relative_error(result, expected) < 0.15


def test_a_failed_capture_restores_the_state(graphed):
    """The warm-up runs steps before the capture fails; a second attempt draws the same images."""
    s, expected = graphed(), sampler("reference").sample(2, steps=4, output="float")
    state, table = s.begin(torch.arange(2), 0), s.table(steps=4)
    before = [v.clone() for v in (state.x, state.x_0, state.step_index)]

    def failing(step, repeats, pool):
        step()
        assert not torch.equal(state.x, before[0])
        raise RuntimeError("the step could not be captured")

    s.engine.graph = failing
    with pytest.raises(RuntimeError, match="could not be captured"):
        next(s.engine.steps(state, table))
    after = (state.x, state.x_0, state.step_index)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    s.engine.graph = Recorded
    assert list(s.engine.steps(state, table))[-1] == 4
    torch.testing.assert_close(state.x, expected, rtol=0, atol=1e-4)
