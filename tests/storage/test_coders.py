"""What every entropy coder promises."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._coders import CODERS
from lowrank_nn.storage._frequencies import count_symbols
from lowrank_nn.storage._lanes import MAX_STEPS
from tests.storage.symbols import BELL, GEOMETRIC, SPARSE, TWO_SIDED, draw

UNUSUAL = [[], [0], [255], [7] * 1000, [0, 255] * 3, list(range(256)), [0] * 70000 + [1]]


@pytest.fixture(params=CODERS.values(), ids=CODERS)
def coder(request):
    return request.param


@pytest.mark.parametrize("symbols", UNUSUAL, ids=range(len(UNUSUAL)))
def test_unusual_symbols(coder, symbols):
    symbols = np.array(symbols, np.uint8)
    data = coder.encode(symbols)
    back, used = coder.decode(np.r_[data, np.arange(5, dtype=np.uint8)], symbols.size)  # what follows is not read
    assert used == data.size
    assert np.array_equal(back, symbols)


@pytest.mark.parametrize("shares", [BELL, TWO_SIDED, SPARSE, GEOMETRIC], ids=["bell", "two-sided", "sparse", "gaps"])
@pytest.mark.parametrize("count", [40_000, 600_000])
def test_the_size_is_known_before(coder, shares, count):
    symbols = draw(count, shares)
    data = coder.encode(symbols)
    assert abs(coder.coded_size(count_symbols(symbols)) - data.size) < 0.003 * data.size + 8
    assert np.array_equal(coder.decode(data, count)[0], symbols)


def test_decoding_takes_little_memory_beside_the_symbols(coder):
    symbols = draw(4_000_000, TWO_SIDED)
    data = coder.encode(symbols)
    tracemalloc.start()
    coder.decode(data, symbols.size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * symbols.size


@pytest.mark.parametrize("name", CODERS)
@given(data=st.data())
def test_damaged_blocks(name, data):
    coder = CODERS[name]
    symbols = draw(data.draw(st.sampled_from([1, 40, 3000])), GEOMETRIC)
    broken = coder.encode(symbols).copy()
    for _ in range(data.draw(st.integers(1, 5))):
        broken[data.draw(st.integers(0, broken.size - 1))] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, broken.size))]
    try:
        back, used = coder.decode(broken, symbols.size)
    except FileFormatError:
        return
    assert (back.dtype, back.size) == (np.uint8, symbols.size)
    assert used <= broken.size


@pytest.mark.parametrize("name", CODERS)
@given(data=st.binary(max_size=400), count=st.integers(1, 2000))
def test_random_blocks(name, data, count):
    data = np.frombuffer(bytes([12, 9]) + data, np.uint8)
    try:
        back, _ = CODERS[name].decode(data, count)
    except FileFormatError:
        return
    assert back.size == count


@pytest.mark.parametrize("count", [10**7, 2**40, 2**62])
def test_more_symbols_than_the_lanes_may_hold(coder, count):
    data = coder.encode(np.zeros(100, np.uint8))  # of one symbol every number takes little
    begin = time.perf_counter()
    with pytest.raises(FileFormatError, match="cannot hold"):
        coder.decode(data, count)
    data[2:6] = 255
    with pytest.raises(FileFormatError, match="cannot hold"):
        coder.decode(data, count)
    assert time.perf_counter() - begin < 1


def test_no_lane_has_more_than_so_many_symbols(coder):
    nearly_one = np.zeros(MAX_STEPS * 5 + 7, np.uint8)
    nearly_one[::1000] = 1
    data = coder.encode(nearly_one)
    back, _ = coder.decode(data, nearly_one.size)
    assert np.array_equal(back, nearly_one)
    with pytest.raises(FileFormatError, match="cannot hold"):
        coder.decode(data, MAX_STEPS * 6 + 1)
