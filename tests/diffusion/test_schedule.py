import copy
import pickle

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule

diffusers = pytest.importorskip("diffusers")

FAMILIES = {
    "linear": (NoiseSchedule.linear(), "linear"),
    "scaled_linear": (NoiseSchedule.scaled_linear(), "scaled_linear"),
    "cosine": (NoiseSchedule.cosine(), "squaredcos_cap_v2"),
    "sigmoid": (NoiseSchedule.sigmoid(), None),
}
each_family = pytest.mark.parametrize(
    ("schedule", "beta_schedule"), FAMILIES.values(), ids=FAMILIES
)


def exact_chain(schedule):
    """alpha_bar and 1 - alpha_bar in 50 digits."""
    import mpmath

    mpmath.mp.dps = 50
    bar, out = mpmath.mpf(1), []
    for beta in schedule.beta:
        bar *= 1 - mpmath.mpf(float(beta))
        out.append((bar, 1 - bar))
    return out


# diffusers' sigmoid is another function
@pytest.mark.parametrize("name", [name for name, (_, known) in FAMILIES.items() if known])
def test_matches_diffusers(name):
    schedule, beta_schedule = FAMILIES[name]
    beta = diffusers.DDPMScheduler(beta_schedule=beta_schedule).betas.double().numpy()
    # diffusers computes in fp32, with cancellation at small t
    np.testing.assert_allclose(schedule.beta, beta, rtol=2e-4, atol=1e-7)


@each_family
def test_every_quantity_against_fifty_digits(schedule, beta_schedule):
    chain = exact_chain(schedule)
    prev = [(1, 0), *chain[:-1]]
    import mpmath

    want = {
        "alpha_bar": [b for b, _ in chain],
        "noise_var": [n for _, n in chain],
        "snr": [b / n for b, n in chain],
        "posterior_var": [
            float(be) * pn / n
            for be, (_, pn), (_, n) in zip(schedule.beta, prev, chain, strict=True)
        ],
        "posterior_mean_x_0": [
            mpmath.sqrt(pb) * float(be) / n
            for be, (pb, _), (_, n) in zip(schedule.beta, prev, chain, strict=True)
        ],
        "posterior_mean_x_t": [
            mpmath.sqrt(1 - mpmath.mpf(float(be))) * pn / n
            for be, (_, pn), (_, n) in zip(schedule.beta, prev, chain, strict=True)
        ],
    }
    for name, exact in want.items():
        # the largest error is the rounding of 1 - beta in fp64 near beta = 1
        np.testing.assert_allclose(
            getattr(schedule, name), np.array(exact, float), rtol=1e-12, err_msg=name
        )


@each_family
def test_exact_at_both_ends(schedule, beta_schedule):
    assert schedule.noise_var[0] == schedule.beta[0]
    assert (
        schedule.posterior_mean_x_0[0],
        schedule.posterior_mean_x_t[0],
        schedule.posterior_var[0],
    ) == (1, 0, 0)
    assert schedule.alpha_bar_prev[0] == 1
    assert 0 < schedule.alpha_bar[-1] < 1e-2


def test_published_values():
    schedule = NoiseSchedule.linear()
    assert schedule.alpha_bar[-1] == pytest.approx(157.41**-2, rel=1e-4)
    assert schedule.posterior_var[1] == pytest.approx(5.453e-5, rel=1e-3)


@pytest.mark.parametrize(
    "betas", [[], [0.1, 0.0], [1.0, 0.5], [0.1, -0.1], [float("nan")], [float("inf")], [[0.1]]]
)
def test_refuses_bad_betas(betas):
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule.from_betas(betas)


@each_family
@pytest.mark.parametrize("visited", [range(1000), range(0, 1000, 7), [999], [0, 1, 998, 999]])
def test_respaced_keeps_alpha_bar(schedule, beta_schedule, visited):
    sub = schedule.respaced(visited)
    np.testing.assert_allclose(sub.alpha_bar, schedule.alpha_bar[list(visited)], rtol=1e-6)
    np.testing.assert_allclose(sub.noise_var, schedule.noise_var[list(visited)], rtol=1e-13)


@pytest.mark.parametrize("visited", [[], [3, 2], [0, 1000], [-1, 5], [5, 5]])
def test_respaced_refuses(visited):
    with pytest.raises(ValueError, match="timesteps"):
        NoiseSchedule.linear().respaced(visited)


def test_arrays_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        NoiseSchedule.linear().alpha_bar[0] = 2


def test_q_sample_table():
    table = NoiseSchedule.linear().q_sample_table()
    assert table.dtype == torch.float32
    np.testing.assert_allclose((table.double() ** 2).sum(1), 1, rtol=2e-7)


def test_from_alpha_bar_goes_through_every_level():
    levels = NoiseSchedule.cosine().alpha_bar
    np.testing.assert_allclose(NoiseSchedule.from_alpha_bar(levels).alpha_bar, levels, rtol=1e-12)
    fine = 1 / (1 + np.exp(-np.linspace(9, -9, 500)))
    chain = NoiseSchedule.from_alpha_bar(fine)
    np.testing.assert_allclose(np.diff(np.log(chain.snr)), -18 / 499, rtol=1e-9)
    for bad in ([0.5, 0.6], [0.9, 0.9], [1.0, 0.5], [0.5, -0.1], [0.5, 0.0, 0.0]):
        with pytest.raises(ValueError, match="beta"):
            NoiseSchedule.from_alpha_bar(bad)


def test_zero_terminal_snr_is_lin_et_als_rescaling():
    """Ends at 0, starts at the same value; the new sqrt(alpha_bar) is affine in the old one."""
    plain = NoiseSchedule.linear()
    zero = plain.zero_terminal_snr()
    assert zero.alpha_bar[-1] == 0 and zero.snr[-1] == 0 and zero.beta[-1] == 1
    assert zero.alpha_bar[0] == pytest.approx(plain.alpha_bar[0], rel=1e-12)
    before, after = np.sqrt(plain.alpha_bar), np.sqrt(zero.alpha_bar)
    slope = np.diff(after) / np.diff(before)
    np.testing.assert_allclose(slope, slope[0], rtol=1e-9)
    assert zero.noise_var[-1] == 1 and zero.posterior_mean_x_t[-1] == 0
    assert zero.respaced([0, 500, 999]).alpha_bar[-1] == 0
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule.from_betas([0.1, 1.0, 0.1])


def test_repr_is_one_line():
    assert (
        repr(NoiseSchedule.linear())
        == "NoiseSchedule(T=1000, beta=0.0001..0.02, alpha_bar[-1]=4.036e-05)"
    )


def test_schedules_are_compared_by_their_betas():
    same = [
        NoiseSchedule.cosine(),
        NoiseSchedule.cosine(),
        NoiseSchedule(NoiseSchedule.cosine().beta),
    ]
    assert same[0] == same[1] == same[2] and len({hash(schedule) for schedule in same}) == 1
    other = same[0].beta.copy()
    other[500] = np.nextafter(other[500], 1)
    assert NoiseSchedule(other) != same[0] and NoiseSchedule(other[:-1]) != same[0]
    assert same[0] != "cosine" and {NoiseSchedule.linear(), NoiseSchedule.linear()} == {
        NoiseSchedule.linear()
    }


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
def test_copies_are_equal_and_cannot_be_changed(copied):
    schedule = copied(NoiseSchedule.linear())
    assert schedule == NoiseSchedule.linear()
    with pytest.raises(ValueError, match="read-only"):
        schedule.beta[0] = 2


INF, NAN = float("inf"), float("nan")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NoiseSchedule.linear(1e-4, INF), r"end \(a beta\) = inf; expected a number"),
        (lambda: NoiseSchedule.linear(NAN, 0.02), r"start \(a beta\) = nan"),
        (lambda: NoiseSchedule.linear("1e-4", 0.02), r"start \(a beta\) = '1e-4'"),
        (lambda: NoiseSchedule.scaled_linear(-1, 0.02), r"start \(a beta\) = -1"),
        (lambda: NoiseSchedule.linear(1e-300, 0.02), r"start \(a beta\) = 1e-300"),
        (lambda: NoiseSchedule.linear(10**400, 0.02), "an integer of 1329 bits"),
        (lambda: NoiseSchedule.linear(timesteps=True), "timesteps = True"),
        (lambda: NoiseSchedule.linear(timesteps=10**5000), "timesteps = an integer of"),
        (lambda: NoiseSchedule.cosine(offset=-1), "offset = -1"),
        (lambda: NoiseSchedule.cosine(max_beta=NAN), "max_beta = nan"),
        (lambda: NoiseSchedule.sigmoid(tau=0), "tau = 0"),
        (lambda: NoiseSchedule.sigmoid(start=1, end=1), "beta"),
        (lambda: NoiseSchedule.from_betas([1e-300, 0.1]), "beta\\[0\\] = 1e-300"),
        (lambda: NoiseSchedule.from_betas({"a": 1}), "betas is"),
        (lambda: NoiseSchedule.from_betas([[0.1], 0.2]), "betas is"),
        (lambda: NoiseSchedule.from_betas(np.full(2**24, 0.1)), "beta has shape"),
        (lambda: NoiseSchedule.from_alpha_bar([INF]), "beta"),
        (lambda: NoiseSchedule.linear(timesteps=1).zero_terminal_snr(), "at least two steps"),
    ],
)
def test_refuses_in_one_line_and_without_warnings(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
