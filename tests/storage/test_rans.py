import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._frequencies import PRECISIONS, coded_bits, count_symbols, read_table, scale_counts, write_table
from lowrank_nn.storage._lanes import MANY_LANES, MAX_STEPS
from lowrank_nn.storage._rans import coded_size, decode, encode
from tests.storage.symbols import BELL, GEOMETRIC, SPARSE, TWO_SIDED, any_symbols, draw


def by_the_document(data, count):
    """Decode a block with whole numbers, symbol by symbol, as docs/file_format.md describes it."""
    precision, largest, lanes = data[0], data[1], int.from_bytes(data[2:6], "little")
    bits = (byte >> i & 1 for byte in data[6:] for i in range(8))
    shares, length, read = [], 0, 0
    for _ in range(largest + 1):
        zeros = sum(1 for _ in itertools.takewhile(lambda bit: not bit, bits))
        length += (zeros + 1) // 2 if zeros % 2 else -zeros // 2
        shares.append((1 << length - 1) + sum(next(bits) << i for i in range(length - 1)) if length else 0)
        read += zeros + 1 + max(length - 1, 0)
    assert sum(shares) == 2**precision
    at = 6 + -(-read // 8)
    states = [int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in range(lanes)]
    at += 4 * lanes
    width = max(1, largest.bit_length())
    tail = min(count, 16 * lanes // width)
    owner = [symbol for symbol, share in enumerate(shares) for _ in range(share)]
    begins = [0, *itertools.accumulate(shares)]
    symbols = []
    for i in range(count - tail):
        x = states[i % lanes]
        slot = x % 2**precision
        symbols.append(owner[slot])
        x = shares[owner[slot]] * (x >> precision) + slot - begins[owner[slot]]
        if x < 2**16:
            x = x << 16 | int.from_bytes(data[at : at + 2], "little")
            at += 2
        states[i % lanes] = x
    assert all(x >> 16 == 1 for x in states)
    lower = sum((x & 0xFFFF) << 16 * i for i, x in enumerate(states))
    symbols += [lower >> width * i & (1 << width) - 1 for i in range(tail)]
    return symbols, at


@given(any_symbols())
def test_comes_back_also_by_the_document(symbols):
    data = encode(symbols)
    back, used = decode(data, symbols.size)
    assert used == data.size
    assert np.array_equal(back, symbols)
    assert by_the_document(data.tobytes(), symbols.size) == (symbols.tolist(), data.size)


@pytest.mark.parametrize(
    ("shares", "over"),
    [(BELL, 0.006), (TWO_SIDED, 0.006), (SPARSE, 0.011), (GEOMETRIC, 0.009), ([0.9, 0.1], 0.012)],
)
def test_size_is_near_the_entropy(shares, over):
    symbols = draw(600_000, shares)
    data = encode(symbols)
    best = entropy(np.bincount(symbols), base=2) * symbols.size / 8
    assert best < data.size < best * (1 + over) + 100
    assert abs(coded_size(count_symbols(symbols)) - data.size) < 0.003 * data.size + 8
    assert np.array_equal(decode(data, symbols.size)[0], symbols)


def lanes_of(data):
    return int.from_bytes(data[2:6].tobytes(), "little")


def test_the_number_of_steps_is_bounded():
    nearly_one = np.zeros(10_000_000, np.uint8)
    nearly_one[::1000] = 1
    data = encode(nearly_one)
    assert -(-nearly_one.size // MAX_STEPS) == lanes_of(data)
    assert data.size < nearly_one.size / 400  # of which the lanes take half
    assert np.array_equal(decode(data, nearly_one.size)[0], nearly_one)
    assert lanes_of(encode(draw(6_000_000, BELL))) == MANY_LANES


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=256).filter(any),
    st.sampled_from(PRECISIONS),
)
def test_frequencies(counts, precision):
    counts = np.array(counts, np.int64)
    frequencies = scale_counts(counts, precision)
    assert frequencies.sum() == 1 << precision
    assert np.array_equal(frequencies > 0, counts > 0)
    table = write_table(frequencies)
    back, used = read_table(np.r_[table, np.full(9, 255, np.uint8)], counts.size, precision)
    assert used == table.size
    assert np.array_equal(back, frequencies)


def test_frequencies_are_nearly_the_best():
    counts = np.bincount(draw(3000, BELL), minlength=256)
    frequencies = scale_counts(counts, 10)
    bits = coded_bits(counts, frequencies)
    for giver, taker in itertools.permutations(np.flatnonzero(frequencies > 1), 2):
        other = frequencies.copy()
        other[giver] -= 1
        other[taker] += 1
        assert coded_bits(counts, other) > bits * 0.9995


def test_tables_that_lie():
    table = write_table(np.array([5, 0, 251]))
    assert read_table(table, 3, 8)[0].tolist() == [5, 0, 251]
    for size, precision in ((2, 8), (3, 9), (200, 8)):
        with pytest.raises(FileFormatError, match="frequencies"):
            read_table(table, size, precision)
    for wrong in (table[:0], table[:1], np.zeros(2000, np.uint8), np.full(2000, 255, np.uint8)):
        with pytest.raises(FileFormatError, match="frequencies"):
            read_table(wrong, 3, 8)
