import numpy as np
import pytest

from ddpm_fast.utils.validation import integer, is_counts, seed_bits


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
