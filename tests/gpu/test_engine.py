"""Fused engine on a GPU: captured steps, synchronization, batch invariance and memory."""

import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, Trajectory, UNet, UNetConfig
from ddpm_fast.engines.fused.cuda_graph import Graphed
from ddpm_fast.engines.fused.engine import FusedEngine
from ddpm_fast.utils.numerics import relative_error

pytestmark = pytest.mark.gpu
SCHEDULE = NoiseSchedule.linear()
LOOPS = [
    dict(solver="ddpm", steps=12),
    dict(solver="ddim", steps=10, eta=0.5),
    dict(solver="dpm++2m", steps=10),
    dict(solver="dpm++2m-sde", steps=9),
]


def unet():
    torch.manual_seed(0)
    return UNet(UNetConfig()).eval().requires_grad_(False).cuda()


def sampler(dtype="bf16", graph=None, model=None):
    """A sampler without the self-check."""
    s = Sampler(model or unet(), SCHEDULE, (3, 32, 32), engine="fused", dtype=dtype)
    s.engine = FusedEngine(
        s.model, s.shape, dtype, s.device, len(SCHEDULE), graph=graph, check=False
    )
    return s


class Uncaptured:
    def __init__(self, step, repeats=1, pool=None):
        self.step, self.repeats = step, repeats

    def __call__(self):
        for _ in range(self.repeats):
            self.step()

    def free(self):
        pass


@pytest.mark.parametrize("loop", LOOPS, ids=lambda v: v["solver"])
def test_captured_steps_equal_uncaptured_steps(loop):
    options = dict(seed=3, output="float") | loop
    captured, free = sampler(), sampler(graph=Uncaptured)
    expected = free.sample(5, **options)
    assert torch.equal(captured.sample(5, **options), expected)
    seen = Trajectory()
    # with a callback: one step per graph instead of several
    assert torch.equal(captured.sample(5, **options, callback=seen), expected)
    assert torch.equal(seen.x[-1], expected.cpu())


@pytest.mark.parametrize("loop", LOOPS, ids=lambda v: v["solver"])
def test_images_equal_those_of_the_reference(loop, figure):
    model = unet()
    options = dict(seed=3, output="float") | loop
    exact, plain = (
        Sampler(model, SCHEDULE, (3, 32, 32), engine="reference", dtype=d).sample(4, **options)
        for d in ("fp32", "bf16")
    )
    error, other = (
        relative_error(sampler(model=model).sample(4, **options), exact),
        relative_error(plain, exact),
    )
    figure(f"{loop['solver']}, captured, bf16; plain PyTorch in bf16", f"{error:.1e}; {other:.1e}")
    assert error <= 2 * other


def test_bits_do_not_depend_on_the_batch():
    s = sampler()
    options = dict(seed=2, steps=10, output="float")
    whole = s.sample(256, batch_size=256, **options)
    for images, batch in ((range(77, 78), 1), (range(250, 253), 3), (range(100, 200), 64)):
        assert torch.equal(s.sample(images, batch_size=batch, **options), whole[list(images)])


def test_the_captured_loop_never_waits_for_the_device():
    s = sampler()
    table = s.table(steps=20)
    s.run(s.begin(torch.arange(4), 0), table)
    state = s.begin(torch.arange(4), 0)
    run = s.engine.steps(state, table)
    next(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert list(run)[-1] == 20
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_released():
    s = sampler()
    s.sample(1, steps=1)  # libraries allocate memory at their first call
    s.engine.free()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    s.sample(64, steps=2, batch_size=64)
    assert torch.cuda.memory_allocated() > before
    s.engine.free()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_batch_that_is_too_large_is_halved():
    s = sampler()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")  # leaves 1 GiB
    with pytest.warns(UserWarning, match="out of memory with a batch of 1024 images"):
        result = s.sample(range(1024), batch_size=1024, steps=2, output="float")
    del taken
    torch.cuda.empty_cache()
    assert torch.equal(
        result, sampler().sample(range(1024), batch_size=256, steps=2, output="float")
    )


def test_a_step_that_waits_raises():
    x = torch.ones(3, device="cuda")
    with pytest.raises(
        RuntimeError,
        match=r"waits for the device, at .*test_engine\.py:\d+, .*x\.sum\(\)\.item\(\)",
    ):
        Graphed(lambda: x.sum().item())


def test_a_replay_reads_the_current_values():
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = Graphed(lambda: y.add_(x), repeats=4)
    y.zero_()
    x.fill_(2)
    graph()
    assert y.tolist() == [8, 8, 8]
    graph.free()
    with pytest.raises(RuntimeError, match="freed"):
        graph()


def test_auto_selects_the_fused_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    s = Sampler(unet(), SCHEDULE, (3, 32, 32), dtype="bf16")
    assert (s.engine.name, s.engine.reason) == ("fused", "bf16 on a GPU")
    assert s.sample(2, steps=3).shape == (2, 32, 32, 3) and s.engine.invariant
    assert Sampler(unet(), SCHEDULE, (3, 32, 32)).engine.name == "reference"  # fp32
