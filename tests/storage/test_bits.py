import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.storage._bits import CHUNK, pack_bits, packed_length, unpack_bits, width_and_offset

DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


def by_the_definition(values, bits, offset):
    """The packing as one big Python integer."""
    number = sum((int(v) - offset) << (i * bits) for i, v in enumerate(values))
    return number.to_bytes(-(-len(values) * bits // 8), "little")


@given(st.data())
def test_packs_as_defined_and_comes_back(data):
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    info = np.iinfo(dtype)
    values = np.array(data.draw(st.lists(st.integers(int(info.min), int(info.max)), max_size=40)), dtype)
    bits, offset = width_and_offset(values)
    packed = pack_bits(values, bits, offset)
    assert packed.tobytes() == by_the_definition(values, bits, offset)
    assert np.array_equal(unpack_bits(packed, values.size, bits, offset, dtype), values)


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 11])
def test_more_than_a_chunk(bits):
    values = np.random.default_rng(0).integers(-5, 2**bits - 5, CHUNK + 1234).astype(np.int16)
    packed = pack_bits(values, bits, -5)
    assert packed.size == packed_length(values.size, bits) == -(-values.size * bits // 8)
    assert np.array_equal(unpack_bits(packed, values.size, bits, -5, values.dtype), values)
    head = values[:1000]
    assert packed.tobytes().startswith(by_the_definition(head, bits, -5))


def test_width_is_that_of_the_range():
    assert width_and_offset(np.array([7, 7, 7])) == (0, 7)
    assert width_and_offset(np.array([-8, 7], np.int8)) == (4, -8)
    assert width_and_offset(np.array([-(2**63), 2**63 - 1])) == (64, -(2**63))
    assert width_and_offset(np.array([], np.int8)) == (0, 0)
