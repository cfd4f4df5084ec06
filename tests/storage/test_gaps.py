import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._gaps import CHUNK, from_gaps, to_gaps


def by_the_definition(marked):
    """The symbols, one entry after the other."""
    symbols, left_out = [], 0
    for kept in marked:
        if kept:
            symbols += [255] * (left_out // 255) + [left_out % 255]
            left_out = 0
        else:
            left_out += 1
    return symbols


@given(size=st.integers(0, 3000), share=st.sampled_from([0, 0.001, 0.01, 0.2, 0.9, 1]), seed=st.integers(0, 999))
def test_gaps_as_defined_and_back(size, share, seed):
    marked = np.random.default_rng(seed).random(size) < share
    symbols = to_gaps(marked)
    assert symbols.tolist() == by_the_definition(marked)
    assert np.array_equal(from_gaps(symbols, size), marked)


@pytest.mark.parametrize("left_out", [0, 1, 254, 255, 256, 509, 510, 511, CHUNK - 1, CHUNK, CHUNK + 300])
def test_one_entry_after_a_long_way(left_out):
    marked = np.zeros(left_out + 1 + 400, np.bool_)
    marked[left_out] = True
    symbols = to_gaps(marked)
    assert symbols.tolist() == [255] * (left_out // 255) + [left_out % 255]
    assert np.array_equal(from_gaps(symbols, marked.size), marked)


def test_more_than_a_chunk():
    marked = np.random.default_rng(0).random(2 * CHUNK + 12345) < 0.3
    symbols = to_gaps(marked)
    assert symbols.size > marked.sum() * 0.99
    assert np.array_equal(from_gaps(symbols, marked.size), marked)


def test_gaps_that_lead_too_far():
    assert from_gaps(np.array([9], np.uint8), 10).tolist() == [False] * 9 + [True]
    for symbols in ([10], [255], [4, 5], [0] * 11):
        with pytest.raises(FileFormatError, match="of 10"):
            from_gaps(np.array(symbols, np.uint8), 10)
