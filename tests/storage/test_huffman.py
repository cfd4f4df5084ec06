import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._frequencies import count_symbols
from lowrank_nn.storage._huffman import LONGEST, code_lengths, decode, encode
from lowrank_nn.storage._rans import encode as encode_rans
from tests.storage.symbols import BELL, GEOMETRIC, SPARSE, TWO_SIDED, any_symbols, draw


def huffman_bits(counts):
    """The bits that Huffman's own algorithm takes: the sum of all merged counts."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits


def by_the_document(data, count):
    """Decode a block bit by bit, as docs/file_format.md describes it."""
    alphabet, lanes = data[0] + 1, int.from_bytes(data[1:5], "little")
    at = 5 + -(-alphabet * 4 // 8)
    lengths = [data[5 + i // 2] >> 4 * (i % 2) & 15 for i in range(alphabet)]
    words, code, previous = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - previous
        words[length, code] = symbol
        code, previous = code + 1, length
    sizes = [int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in range(lanes)]
    at += 4 * lanes
    symbols = [0] * count
    for lane, size in enumerate(sizes):
        bits = (byte >> i & 1 for byte in data[at : at + 4 * size] for i in range(8))
        at += 4 * size
        for i in range(lane, count, lanes):
            length = code = 0
            while (length, code) not in words:
                length, code = length + 1, code << 1 | next(bits)
            symbols[i] = words[length, code]
    return symbols, at


@given(any_symbols())
def test_comes_back_also_by_the_document(symbols):
    data = encode(symbols)
    back, used = decode(data, symbols.size)
    assert used == data.size
    assert np.array_equal(back, symbols)
    assert by_the_document(data.tobytes(), symbols.size) == (symbols.tolist(), data.size)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=256).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_lengths_are_the_best_where_none_is_cut(counts):
    counts = np.array(counts)
    lengths = code_lengths(counts)
    assert np.array_equal(lengths > 0, counts > 0)
    assert sum(0.5 ** lengths[lengths > 0]) == 1
    if lengths.max() < LONGEST:
        assert int((counts * lengths).sum()) == huffman_bits(counts)


def test_long_words_are_cut():
    counts = 2 ** np.arange(30)
    lengths = code_lengths(counts)
    assert lengths.max() == LONGEST
    assert sum(0.5**lengths) == 1
    assert huffman_bits(counts) < (counts * lengths).sum() < 1.005 * huffman_bits(counts)


@pytest.mark.parametrize(
    ("shares", "more"), [(BELL, 0.01), (TWO_SIDED, 0.015), (SPARSE, 0.06), (GEOMETRIC, 0.008), ([0.95, 0.05], 2.2)]
)
def test_larger_than_rans_whatever_the_shares(shares, more):
    symbols = draw(300_000, shares)
    huffman, rans = encode(symbols), encode_rans(symbols)
    assert huffman_bits(count_symbols(symbols)) / 8 < huffman.size
    assert huffman.size > (1 + more) * rans.size


@pytest.mark.parametrize("lengths", [[0, 0], [1, 1, 1], [1, 2], [13, 1], [2, 2, 2]])
def test_lengths_that_are_no_code(lengths):
    table = bytes([lengths[0] | lengths[1] << 4, lengths[2] if len(lengths) > 2 else 0][: -(-len(lengths) // 2)])
    data = bytes([len(lengths) - 1, 1, 0, 0, 0]) + table + bytes([1, 0, 0, 0]) + bytes(4)
    with pytest.raises(FileFormatError, match="code lengths"):
        decode(np.frombuffer(data, np.uint8), 9)
