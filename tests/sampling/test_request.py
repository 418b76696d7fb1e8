import json
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, SamplingParams
from ddpm_fast.sampling.request import check_indices

SAMPLER = Sampler(lambda x, t: 0.1 * x, NoiseSchedule.linear(), (1, 4, 4))
PARAMS = [
    SamplingParams(),
    SamplingParams(2**64 - 1, "ddim", 5, "quadratic", 0.5),
    SamplingParams(3, steps=(900, 20, 1)),
    SamplingParams(3, steps="2,3", preset="openai"),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_json_round_trip(params):
    text = params.to_json()
    assert SamplingParams.from_json(text) == params == SamplingParams(**asdict(params))
    assert hash(SamplingParams.from_json(text)) == hash(params)
    assert set(json.loads(text)) == set(asdict(params))
    with pytest.raises(FrozenInstanceError):
        params.seed = 1


def test_equality_does_not_depend_on_number_types():
    a = SamplingParams(np.uint64(7), "ddim", np.int32(5), eta=np.float32(0.5))
    b = SamplingParams(7, "ddim", 5, eta=0.5)
    assert a == b and hash(a) == hash(b) and a.to_json() == b.to_json()
    steps = [[9, 5, 0], (9, 5, 0), np.array([9, 5, 0]), torch.tensor([9, 5, 0])]
    assert {SamplingParams(steps=s) for s in steps} == {SamplingParams(steps=(9, 5, 0))}
    assert SamplingParams(eta=0) == SamplingParams() == SamplingParams.from_json("{}")


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_keywords_and_params_are_the_same_request(params):
    if params.steps:
        expected = SAMPLER.sample(3, **asdict(params), output="float")
        assert torch.equal(SAMPLER.sample(3, params, output="float"), expected)
        stream = SAMPLER.stream(3, params, batch_size=2, output="float")
        assert torch.equal(torch.cat([x for _, x in stream]), expected)
    a, b = SAMPLER.table(params), SAMPLER.table(**asdict(params))
    assert np.array_equal(a.t, b.t) and np.array_equal(a.coef, b.coef)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=-1), "seed = -1"),
        (dict(seed="1"), "seed = '1'; expected an integer"),
        (dict(solver="heun"), "solver 'heun'"),
        (dict(solver=["ddim"]), "expected a name"),
        (dict(steps=2.5), "steps = 2.5; expected an integer"),
        (dict(steps=[1.5]), "steps = 1.5; expected an integer"),
        (dict(spacing="even"), "spacing is 'even'"),
        (dict(spacing=["linspace"]), "spacing"),
        (dict(eta=float("nan"), solver="ddim"), "eta = nan"),
        (dict(eta="1", solver="ddim"), "eta = '1'"),
        (dict(eta=0.5), 'belongs to solver="ddim"'),
        (dict(preset="mine"), "preset 'mine'"),
        (dict(preset=None), "expected a name"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
    if not any(isinstance(v, float) and v != v for v in options.values()):
        with pytest.raises(ValueError, match=message):
            SamplingParams.from_json(json.dumps(options))


@pytest.mark.parametrize("text", ["", "[1]", '"a"', "{", '{"sed": 1}'])
def test_refuses_other_json(text):
    with pytest.raises(ValueError, match="sampling parameters"):
        SamplingParams.from_json(text)


def test_params_and_keywords_together_are_refused():
    with pytest.raises(ValueError, match="params and seed were both given"):
        SAMPLER.sample(1, SamplingParams(), seed=1)
    with pytest.raises(ValueError, match="params is int; expected SamplingParams"):
        SAMPLER.sample(1, 7)
    assert replace(SamplingParams(), seed=1).seed == 1


def test_indices():
    assert check_indices(3) == range(3) and check_indices(range(5, 9, 2)) == range(5, 9, 2)
    assert check_indices(np.array([4, 2], np.int32)).tolist() == [4, 2]
    for indices in (2.5, [[1]], [-1], ["a"], None, [0.5], [True]):
        with pytest.raises(ValueError, match="ind"):
            check_indices(indices)
