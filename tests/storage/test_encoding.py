import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.layers import Packing
from lowrank_nn.storage import tensor_bytes
from lowrank_nn.storage._choose import HEADER_COST, choose_encoding
from lowrank_nn.storage._encoding import DTYPES, Encoding
from lowrank_nn.storage._payload import decode, encode
from tests.storage.models import bits_of


def round_trip(tensor, **arguments):
    encoding = choose_encoding(tensor, **arguments)
    payload = encode(tensor, encoding, arguments.get("mask"))
    assert encoding.coded or payload.nbytes == encoding.plain_bytes
    buffer = torch.frombuffer(bytearray(payload.tobytes() or b" "), dtype=torch.uint8)[: payload.nbytes]
    return payload.nbytes, encoding, decode(encoding, buffer, arguments.get("mask"))


def plain_bytes(tensor, *arguments):
    """The bytes without coding."""
    return tensor_bytes(tensor, *arguments, coding="none")


def of_bytes(data, dtype, shape):
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return ((raw & 1).bool() if dtype is torch.bool else raw.view(dtype)).reshape(shape)


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    shape=st.sampled_from([(), (1,), (17,), (3, 5), (2, 3, 3, 4), (700,), (50, 100)]),
    fill=st.sampled_from(["noise", "zeros", "mostly zeros", "low bytes"]),
    coding=st.sampled_from([{}, {"coder": "rans"}, {"coder": "rans", "floats": True}, {"coder": "huffman"}]),
    seed=st.integers(0, 1000),
)
def test_every_dtype_comes_back_bit_for_bit(dtype, shape, fill, coding, seed):
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    size = (count, dtype.itemsize)
    raw = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    if fill != "noise":
        raw[:, 1 if fill == "low bytes" else 0 :] = 0
    if fill == "mostly zeros":
        raw[::9] = 3
    tensor = of_bytes(raw.numpy().tobytes(), dtype, shape)
    size, _, back = round_trip(tensor, **coding)
    assert (back.dtype, back.shape) == (dtype, torch.Size(shape))
    assert bits_of(back) == bits_of(tensor)
    assert size <= count * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_empty_tensors(dtype):
    _, _, back = round_trip(torch.empty((0, 3), dtype=dtype))
    assert back.dtype is dtype
    assert back.shape == (0, 3)


def test_negative_zero_and_nan_payloads_survive():
    tensor = torch.zeros(4000)
    tensor[1], tensor[2] = -0.0, float("nan")
    tensor.view(torch.int32)[3] = 0x7FC00123
    size, encoding, back = round_trip(tensor)
    assert encoding.bitmap
    assert bits_of(back) == bits_of(tensor)
    assert size == 4000 // 8 + 3 * 4


@pytest.mark.parametrize("bits", range(1, 8))
def test_integers_take_their_bits(bits):
    tensor = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (33, 31), dtype=torch.int8)
    assert plain_bytes(tensor) == -(-33 * 31 * bits // 8)
    assert plain_bytes(tensor, Packing(bits=bits)) == plain_bytes(tensor)


def test_declared_bits_hold_even_where_fewer_would_do():
    tensor = torch.zeros(16, 16, dtype=torch.int8)
    assert plain_bytes(tensor, Packing(bits=4)) == 128
    assert plain_bytes(tensor, Packing(bits=8)) == 256
    assert plain_bytes(torch.tensor([-128, 127] * 100, dtype=torch.int8), Packing(bits=4)) == 200


def test_bools_take_a_bit():
    assert plain_bytes(torch.rand(1001) < 0.5) == 126


def test_zeros_are_left_out_where_that_saves():
    tensor = torch.randn(1000)
    assert plain_bytes(tensor) == 4000
    tensor[::10] = 0
    assert plain_bytes(tensor) == 125 + 900 * 4
    sparse = torch.zeros(1000, dtype=torch.int8)
    sparse[::100] = torch.tensor([-4, 3] * 5, dtype=torch.int8)
    assert plain_bytes(sparse) == 125 + 4  # ten values of three bits


def test_small_savings_are_not_worth_a_header():
    assert plain_bytes(torch.tensor(0)) == 8
    assert plain_bytes(torch.zeros(16)) == 64
    assert plain_bytes(torch.zeros(1000)) == 125
    assert HEADER_COST == 64


@pytest.mark.parametrize("mask_shape", [(12, 5, 3, 3), (12, 1, 1, 1), (5, 1, 3), (1,)])
def test_masked_entries_are_dropped(mask_shape):
    tensor, mask = torch.randn(12, 5, 3, 3), torch.rand(mask_shape) < 0.5
    packing = Packing(mask="mask")
    size, _, back = round_trip(tensor, packing=packing, mask=mask, mask_key="mask")
    kept = int(mask.expand_as(tensor).sum())
    assert size == kept * 4 == plain_bytes(tensor, packing, mask)
    assert torch.equal(back, torch.where(mask, tensor, 0))


def test_masked_integers_are_packed_too():
    tensor, mask = torch.randint(-4, 4, (64, 64), dtype=torch.int8), torch.rand(64, 64) < 0.3
    size, _, back = round_trip(tensor, packing=Packing(bits=3, mask="m"), mask=mask, mask_key="m")
    assert size == -(-int(mask.sum()) * 3 // 8)
    assert torch.equal(back, torch.where(mask, tensor, 0))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(10)[::3],
        torch.randn(1).expand(7),
        torch.randn(4, dtype=torch.complex64).conj(),
    ],
    ids=["transposed", "channels_last", "strided", "expanded", "conjugate"],
)
def test_memory_order_does_not_matter(tensor):
    _, _, back = round_trip(tensor)
    assert torch.equal(back, tensor)


def shares_of(symbols):
    """The bytes that symbols take at best, each by its share."""
    _, counts = np.unique(symbols.numpy(), return_counts=True)
    return entropy(counts, base=2) * symbols.numel() / 8


def test_integers_are_coded_where_that_saves():
    weight = (torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 20).round().to(torch.int8)
    size, encoding, back = round_trip(weight, coder="rans")
    assert encoding.coder == "rans"
    assert torch.equal(back, weight)
    assert shares_of(weight) < size < 1.015 * shares_of(weight)
    assert size == tensor_bytes(weight) < 0.9 * plain_bytes(weight)
    even = torch.arange(60000).remainder(256).to(torch.uint8)
    assert tensor_bytes(even) == plain_bytes(even) == 60000


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint16])
def test_of_wide_integers_the_upper_byte_is_coded(dtype):
    weight = (torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) * 2000 + 9000).round().to(dtype)
    size, encoding, back = round_trip(weight, coder="rans")
    assert encoding.coder == "rans"
    assert torch.equal(back, weight)
    assert size < 0.93 * plain_bytes(weight)


@given(
    bits=st.integers(1, 64), low=st.integers(-(2**63), 2**63 - 1), count=st.integers(1, 3000), seed=st.integers(0, 99)
)
def test_every_width_and_offset_comes_back(bits, low, count, seed):
    low = min(low, 2**63 - 2**bits) if bits < 64 else -(2**63)
    spread = np.random.default_rng(seed).integers(0, 2**bits - 1, count, np.uint64, endpoint=True)
    numbers = (spread + np.uint64(low % 2**64)).view(np.int64)
    tensor = torch.from_numpy(numbers)
    encoding = Encoding("I64", (count,), count, bits=(bits, low), coder="rans")
    payload = torch.from_numpy(encode(tensor, encoding))
    assert torch.equal(decode(encoding, payload), tensor)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 0.85), (torch.float16, 0.87), (torch.bfloat16, 0.7), (torch.float64, 0.9)]
)
def test_of_floats_the_upper_byte_is_coded_where_asked(dtype, share):
    weight = (torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, float("nan"), float("-inf")])
    assert tensor_bytes(weight) == weight.numel() * dtype.itemsize
    size, encoding, back = round_trip(weight, coder="rans", floats=True)
    assert encoding.coder == "rans"
    assert bits_of(back) == bits_of(weight)
    assert size == tensor_bytes(weight, coding="max") < share * tensor_bytes(weight)
    mask = torch.rand(200, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    arguments = {"mask": mask, "mask_key": "m", "coder": "rans", "floats": True}
    masked, _, back = round_trip(weight, **arguments)
    assert bits_of(back[mask]) == bits_of(weight[mask])
    assert masked < 0.52 * size


def test_places_of_zeros_are_coded():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 300, generator=generator) < 0.1
    at_best = entropy([0.1, 0.9], base=2) * 90000 / 8
    size, encoding, back = round_trip(mask, packing=Packing(bits=1), coder="rans")
    assert encoding.gaps == "rans"
    assert encoding.coder is None
    assert torch.equal(back, mask)
    assert 0.98 * at_best < size < 1.03 * at_best
    weight = torch.randn(300, 300, generator=generator) * mask
    weight[weight == 0] = 0.0  # not -0.0
    float_size, encoding, back = round_trip(weight, coder="rans")
    assert encoding.gaps == "rans"
    assert torch.equal(back, weight)
    assert float_size - 4 * int(mask.sum()) == size  # the same places


def test_masked_values_are_coded():
    generator = torch.Generator().manual_seed(0)
    levels = (torch.randn(100, 100, generator=generator) * 1.5).round().clamp(-7, 7).to(torch.int8)
    mask = torch.rand(100, 100, generator=generator) < 0.5
    size, encoding, back = round_trip(levels, packing=Packing(4, "m"), mask=mask, mask_key="m", coder="rans")
    assert (encoding.coder, encoding.mask) == ("rans", "m")
    assert torch.equal(back, torch.where(mask, levels, 0))
    assert size < 1.05 * shares_of(levels[mask])


def test_runs_of_zeros_cost_next_to_nothing():
    kernels = torch.zeros(200, 40, 3, 3, dtype=torch.bool)
    kernels[::5, ::3] = True
    size, _, back = round_trip(kernels, coder="rans")
    assert torch.equal(back, kernels)
    assert size < 0.3 * plain_bytes(kernels)


def test_little_is_not_worth_coding():
    tensor = torch.randint(0, 2, (3000,), dtype=torch.uint8)
    tensor[:60] = 0
    assert tensor_bytes(tensor) == plain_bytes(tensor) == 375
    assert tensor_bytes(torch.zeros(60, dtype=torch.bool)) == 60


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_coded_tensors_of_wrong_length_are_refused(cut):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(5000, generator=generator) * 9).round()
    for tensor in (
        values.to(torch.int8),
        (values * 100).to(torch.int32),
        values > 9,
        torch.where(values > 9, values, 0),
    ):
        encoding = choose_encoding(tensor, coder="rans")
        assert encoding.coded
        payload = torch.from_numpy(encode(tensor, encoding).copy())
        for wrong in (payload[:-cut], torch.cat([payload, payload[:cut]]), payload[: cut - 1]):
            with pytest.raises(FileFormatError):
                decode(encoding, wrong)


def test_more_gaps_than_entries_are_refused_before_they_are_decoded():
    """A coded block of one symbol takes a few bytes, whatever count it is asked for: only the bound saves memory."""
    tensor = torch.zeros(3000, dtype=torch.bool)
    tensor[::97] = True
    encoding = choose_encoding(tensor, coder="rans")
    assert encoding.gaps == "rans"
    payload = encode(tensor, encoding).copy()
    assert torch.equal(decode(encoding, torch.from_numpy(payload)), tensor)
    for count in (3001, 2**40, 2**64 - 1):
        payload[:8] = np.array([count], "<u8").view(np.uint8)
        with pytest.raises(FileFormatError, match=f"has {count} gaps between 3000 entries"):
            decode(encoding, torch.from_numpy(payload))


def test_wrong_lengths_are_refused():
    for tensor in (torch.randn(9), torch.randint(0, 4, (999,)), torch.zeros(999)):
        encoding = choose_encoding(tensor)
        payload = torch.from_numpy(encode(tensor, encoding).copy())
        for wrong in (payload[:-1], torch.cat([payload, payload[:1]]), payload[:0]):
            with pytest.raises(FileFormatError, match="bytes"):
                decode(encoding, wrong)


def test_bools_are_zero_or_one():
    encoding = choose_encoding(torch.ones(3, dtype=torch.bool))
    assert encoding.whole
    with pytest.raises(FileFormatError, match="neither 0 nor 1"):
        decode(encoding, torch.tensor([0, 1, 2], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), "meta device"),
        (torch.zeros(3, dtype=torch.complex128), "complex128"),
        (torch.zeros(3, 3).to_sparse(), "dense tensor"),
    ],
)
def test_what_cannot_be_stored(tensor, message):
    with pytest.raises(OptionError, match=message):
        plain_bytes(tensor)
