"""Plans: arena, totals, tiles and roofline."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.workloads import NETWORKS
from ddpm_fast import UNet, UNetConfig
from ddpm_fast.engines.fused.plan import ALIGNMENT, Arena, Buffer, Launch, lifetimes
from ddpm_fast.engines.fused.roofline import GAP, GPUS, estimate
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels._gemm import Target, choose_block_n, choose_tiles
from ddpm_fast.models.flops import unet_cost

CELEBA = NETWORKS["celebahq256"]


class Nothing:
    name = "nothing"

    def run(self, **_):
        pass

    fallback = run

    def cost(self, **_):
        return 0, 0


def chain(generator, count):
    """A random list of launches: each reads some of the earlier buffers and writes a new one."""
    buffers, launches = [], []
    for i in range(count):
        dtype = torch.float32 if generator.random() < 0.3 else torch.bfloat16
        b = Buffer(
            f"b{i}",
            2,
            int(generator.integers(1, 9)),
            5,
            int(generator.integers(1, 40)),
            dtype,
            bool(generator.integers(2)),
        )
        reads = {f"r{j}": buffers[j] for j in generator.integers(0, i, min(i, 3))} if i else {}
        launches.append(Launch(f"l{i}", Nothing(), reads, {"out": b}))
        buffers.append(b)
    return launches


@pytest.mark.parametrize("seed", range(20))
def test_buffers_with_overlapping_lifetimes_do_not_share_memory(seed):
    launches = chain(np.random.default_rng(seed), 40)
    arena, life = Arena.of(launches), lifetimes(launches)
    assert set(arena.offsets) == set(life)
    for i, launch in enumerate(launches):
        alive = sorted(
            (arena.offsets[b], arena.offsets[b] + b.nbytes)
            for b, (first, last) in life.items()
            if first <= i <= last
        )
        assert all(end <= begin for (_, end), (begin, _) in pairwise(alive))
        assert {b for b, (first, last) in life.items() if first <= i <= last} >= set(
            launch.buffers.values()
        )
    assert all(at % ALIGNMENT == 0 for at in arena.offsets.values())
    most = max(
        sum(b.nbytes for b, (first, last) in life.items() if first <= i <= last)
        for i in range(len(launches))
    )
    assert most <= arena.size <= 1.35 * most + ALIGNMENT * len(launches)


def planned(config, batch, dtype="bf16", sm=90, **options):
    with torch.device("meta"):
        unet = UNet(config)
    return FusedUNet(unet, batch, dtype, "meta", target=Target(sm, 132), **options)


def test_memory_of_the_cifar10_network(figure):
    arena = planned(UNetConfig(), 256).plan().arena
    figure("arena, CIFAR-10 network, batch 256, bf16", f"{arena.size / 2**30:.3f} GiB")
    assert arena.size < 0.9 * 2**30


@pytest.mark.parametrize(
    ("config", "launches", "gn_pass"),
    [(UNetConfig(), 130, 36.5e6), (CELEBA, 200, 1525e6)],
    ids=["cifar", "celeba"],
)
def test_the_plan_counts_what_the_reference_counts(config, launches, gn_pass, figure):
    """The plan's FLOP are torch's count of the reference minus `savings`. gn_pass: bytes per image
    of one pass per norm, with everything else fused.
    """
    plan = planned(config, 16).plan()
    assert len(plan) < launches
    flops = sum(launch.cost()[0] for launch in plan) / 16
    saved = savings(config)
    expected = unet_cost(config).flops - sum(saved.values())
    assert abs(flops / expected - 1) < 0.001
    weights = {id(launch.op): launch.op.weight for launch in plan if hasattr(launch.op, "weight")}
    moved = (
        sum(launch.cost()[1] for launch in plan)
        - sum(w.numel() * w.element_size() for w in weights.values())
    ) / 16
    name = f"plan, {config.channels}"
    figure(
        f"{name}: launches, GFLOP per image, saved",
        f"{len(plan)}, {flops / 1e9:.3f}, { {k: f'{v / 1e9:.3f}' for k, v in saved.items()} }",
    )
    figure(
        f"{name}: MB per image, ratio to one pass per norm",
        f"{moved / 1e6:.1f}, {moved / gn_pass:.2f}",
    )
    assert moved < 1.15 * gn_pass


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_launches_before_two_pass_norms_keep_statistics(sm, dtype):
    """With the same tiles for every batch size, and only if one pass cannot hold an image."""
    assert not any(
        "stats" in launch.buffers for launch in planned(UNetConfig(), 1, dtype, sm).plan()
    )
    tilings = []
    for batch in (1, 2, 16):
        plan = planned(CELEBA, batch, dtype, sm).plan()
        norms = [launch for launch in plan if launch.op.name == "group_norm_silu"]
        twice = [launch for launch in norms if "scratch" in launch.writes]
        assert [launch for launch in norms if "stats" in launch.reads] == twice and len(twice) == 31
        assert all(("x2" in n.reads) == ("stats2" in n.reads) for n in twice)
        writers = {launch.out: launch for launch in plan if "stats" in launch.writes}
        for n in twice:
            for x, s in (("x", "stats"), ("x2", "stats2"))[: len(n.op.tilings)]:
                writer = writers[n.reads[x]]
                assert n.reads[s] is writer.writes["stats"]
                assert n.op.tilings[x == "x2"] == writer.op.tiling(n.reads[x].empty("meta"))
        tilings.append([n.op.tilings for n in twice])
    assert tilings[0] == tilings[1] == tilings[2]


def savings(config):
    """FLOP per image saved by upsampling as four 2x2, folded attention and the time table."""
    with torch.device("meta"):
        unet = UNet(config)
    h, w = config.size
    resolution = {c: 0 for c in ("upsampling", "attention", "time")}
    for i, level in enumerate(unet.up_blocks):
        if level.upsamplers is not None:
            scale = 2 ** (len(config.channels) - 2 - i)
            resolution["upsampling"] += (
                (h // scale) * (w // scale) * 2 * level.upsamplers[0].conv.weight.numel() * 5 // 9
            )
    for name, module in unet.named_modules():
        if type(module).__name__ == "Attention":
            depth = (
                config.levels_of("attention").index(True)
                if "mid" not in name
                else len(config.channels) - 1
            )
            resolution["attention"] += (
                (h >> depth) * (w >> depth) * 2 * 2 * module.to_q.weight.numel()
            )
        if isinstance(module, torch.nn.Linear) and (
            "time_embedding" in name or "time_emb_proj" in name
        ):
            resolution["time"] += 2 * module.weight.numel()
    return resolution


def test_the_roofline_is_the_larger_of_two_times():
    gpu = GPUS["h100"]
    plan = planned(UNetConfig(), 256, sm=90).plan()
    for launch in plan:
        flops, moved = launch.cost()
        e = estimate(launch, gpu)
        assert e.floor == max(flops / gpu.half, moved / gpu.bandwidth) and e.predicted > e.floor
        assert (e.bound == "launch") == (e.floor < GAP)
    total = sum(estimate(launch, gpu).predicted for launch in plan)
    assert 5e-3 < total < 9e-3  # a separate estimate from the same rates: 7.1 ms
    fp8 = sum(
        estimate(launch, gpu).predicted for launch in planned(UNetConfig(), 256, "fp8").plan()
    )
    assert 4e-3 < fp8 < 5.5e-3  # a separate estimate: 4.6 ms
    assert all(
        GPUS[name].product < GPUS[name].half and GPUS[name].copy < GPUS[name].bandwidth
        for name in GPUS
    )


def test_the_rule_for_tiles():
    """block_k and block_n do not depend on the batch; block_m may, but is 64 or more."""
    for sm in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32):
            for c in (32, 48, 64, 96, 128, 384):
                cuts = [
                    choose_tiles(Target(sm, 132), dtype, c, 128, rows, tma=True, warps=4)
                    for rows in (16, 1000, 10**4, 10**6)
                ]
                assert len({(t.block_k, t.block_n, t.tma) for t in cuts}) == 1
                assert all(
                    t.block_m >= 64 and c % t.block_k == 0 and t.tma == (sm >= 90) for t in cuts
                )
    assert [choose_block_n(k) for k in (1, 3, 6, 16, 32, 48, 64, 96, 128, 192, 256, 320)] == [
        16,
        16,
        16,
        16,
        32,
        64,
        64,
        128,
        128,
        64,
        128,
        64,
    ]


def test_a_tile_can_be_overridden():
    key = "conv3x3 sm90 bfloat16 128->128 32x32"
    plan = planned(UNetConfig(), 4, tiles={key: dict(block_m=64, warps=8)}).plan()
    tiles = {launch.name: launch.op.tiles for launch in plan if launch.op.name == "conv3x3"}
    assert (
        tiles["down_blocks.0.resnets.0.conv1"].block_m,
        tiles["down_blocks.0.resnets.0.conv1"].warps,
    ) == (64, 8)
    assert tiles["down_blocks.1.resnets.1.conv2"].warps == 4
