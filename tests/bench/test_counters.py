"""bench.tools.counters: no counter grew, and planted slowdowns are detected."""

import json
from dataclasses import replace

import pytest

from bench.tools import counters
from ddpm_fast.engines.fused import engine as fused_engine
from ddpm_fast.engines.fused.builder import PlanBuilder
from ddpm_fast.kernels import _triton


@pytest.fixture(scope="module")
def pinned():
    return json.loads(counters.PINNED.read_text())


@pytest.mark.skipif(not _triton.PRESENT, reason="counting compilations needs Triton")
def test_no_counter_grew(pinned):
    assert not counters.worse(counters.counters(), pinned)


def test_a_doubled_launch_is_detected(pinned, monkeypatch):
    build = PlanBuilder._build

    def doubled(self, unet):
        build(self, unet)
        self.launches.append(replace(self.launches[1], name="again"))

    monkeypatch.setattr(PlanBuilder, "_build", doubled)
    name = "cifar10, batch 256, bf16"
    lines = counters.worse({name: counters.of_plan("cifar10", 256, "bf16")}, {name: pinned[name]})
    assert {line.split(": ")[1].split()[0] for line in lines} == {
        "arena_kb",
        "kb_per_image",
        "launches",
    }


def test_an_extra_copy_per_step_is_detected(pinned, monkeypatch):
    steps = fused_engine.FusedEngine.steps

    def copying(self, state, table, every_step=True):
        for done in steps(self, state, table, every_step):
            state.x.clone()
            yield done

    monkeypatch.setattr(fused_engine.FusedEngine, "steps", copying)
    name = "a step, fused"
    lines = counters.worse({name: counters.of_step("fused")}, {name: pinned[name]})
    assert lines == ["a step, fused: host calls 0 -> 1", "a step, fused: new tensors 0 -> 1"]


def test_counters_that_are_not_pinned_are_reported():
    assert counters.worse({"new": {}}, {"old": {}}) == [
        "new: not pinned",
        "old: pinned, but not counted any more",
    ]
    assert not counters.worse(
        {"a": dict(kb_per_image=1009, launches=3)}, {"a": dict(kb_per_image=1000, launches=4)}
    )
