import numpy as np
import pytest

from ddpm_fast.utils.validation import integer, is_count, is_counts, is_number, seed_bits, shown


def test_seed_bits_are_those_of_the_unsigned_seed():
    for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**64 - 2)):
        assert np.array(seed_bits(seed), np.int64).view(np.uint64) == np.uint64(seed)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, None, "1"])
def test_seeds_out_of_range_or_of_another_type_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed = .*; expected"):
        seed_bits(seed)


def test_integer_and_counts():
    assert integer("n", np.int32(3)) == 3
    assert is_counts([1, 2]) and is_counts((1, 2), 2)
    assert (
        not is_counts([]) and not is_counts([1], 2) and not is_counts([0]) and not is_counts([True])
    )


def test_integers_beyond_fp64_are_not_numbers():
    assert is_number(10**300) and not is_number(10**400) and not is_number(float("inf"))
    assert is_count(5, 5) and not is_count(6, 5) and not is_counts([5, 6], 2, 5)


@pytest.mark.parametrize(
    "value",
    ["a\nb" * 999, 10**5000, [10**5000] * 999, np.zeros((99, 99)), {"a": [[[[[1]]]]]}],
    ids=range(5),
)
def test_values_are_shown_in_one_short_line(value):
    assert "\n" not in shown(value) and len(shown(value)) < 1000
    assert shown("plain") == "'plain'" and shown(1e-300) == "1e-300" and shown(True) == "True"
