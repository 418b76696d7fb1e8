"""GeneratedImages: each index once over ranks and workers, Sampler's pixels, bit-exact resume."""

import pytest
import torch
from torch.utils.data import DataLoader

import ddpm_fast
from ddpm_fast import NoiseSchedule, Sampler, SamplingParams, UNet, UNetConfig
from ddpm_fast.integrations.torch_dataset import GeneratedImages

PARAMS = SamplingParams(seed=3, solver="ddim", steps=2)


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8, channels=(8, 16), layers=1, attention=False, norm_groups=4, num_classes=5
    )
    return Sampler(UNet(config).eval(), NoiseSchedule.linear(), (3, 8, 8), engine="reference")


def check(rows, sampler, indices):
    assert sorted(row["index"] for row in rows) == sorted(indices)
    expected = sampler.sample(list(indices), PARAMS)
    labels = sampler.labels(list(indices), PARAMS.seed)
    position = {index: i for i, index in enumerate(indices)}
    for row in rows:
        i = position[row["index"]]
        difference = row["image"].int() - expected[i].int()
        assert difference.abs().max() <= 1 and row["label"] == labels[i]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("indices", [range(5, 28), [9, 2, 40, 7, 8]])
def test_ranks_draw_every_index_once(sampler, world, indices):
    datasets = [
        GeneratedImages(sampler, indices, PARAMS, batch_size=4, rank=rank, world_size=world)
        for rank in range(world)
    ]
    shares = [list(dataset) for dataset in datasets]
    assert [len(share) for share in shares] == [len(dataset) for dataset in datasets]
    check([row for share in shares for row in share], sampler, list(indices))


def test_spawned_workers_draw_every_index_once(sampler):
    dataset = GeneratedImages(sampler, 11, PARAMS, batch_size=2)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    check(list(loader), sampler, list(range(11)))


def test_even_shares(sampler):
    shares = [
        list(
            GeneratedImages(
                sampler, 23, PARAMS, batch_size=4, rank=r, world_size=2, drop_uneven=True
            )
        )
        for r in range(2)
    ]
    assert [len(share) for share in shares] == [8, 8]


@pytest.mark.parametrize("stop", [0, 1, 4, 6, 10])
def test_resume_is_bit_exact(sampler, stop):
    make = lambda: GeneratedImages(sampler, 11, PARAMS, batch_size=4, output="float")
    every = list(make())
    first, second = make(), make()
    rows = iter(first)
    taken = [next(rows) for _ in range(stop)]
    second.load_state_dict(first.state_dict())
    taken += list(second)
    assert [row["index"] for row in taken] == list(range(11))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(taken, every, strict=True))
    assert [row["index"] for row in second] == list(range(11))  # the next epoch


def test_labels_and_shard_false(sampler, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one = GeneratedImages(sampler, 8, PARAMS, batch_size=2, labels=4)
    assert [row["index"] for row in one] == [2, 3, 6, 7]
    assert {row["label"] for row in one} == {4}
    whole = GeneratedImages(sampler, 8, PARAMS, batch_size=2, shard=False)
    assert [row["index"] for row in whole] == list(range(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size is 0"),
        (dict(output="pil"), "output is 'pil'"),
        (dict(rank=1), "belong together"),
        (dict(rank=2, world_size=2), "rank is 2 of world_size 2"),
        (dict(labels=9), "expected 0..4"),
        (dict(params=SamplingParams(steps=2000)), "steps"),
    ],
    ids=str,
)
def test_refuses(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedImages(sampler, 4, **options)


def test_refuses_a_gpu_in_a_worker(sampler, monkeypatch):
    dataset = GeneratedImages(sampler, 4, PARAMS)
    module = "ddpm_fast.integrations.torch_dataset.get_worker_info"
    monkeypatch.setattr(module, lambda: object())
    monkeypatch.setattr(sampler, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="num_workers=0"):
        next(iter(dataset))


def test_is_public():
    assert ddpm_fast.GeneratedImages is GeneratedImages
