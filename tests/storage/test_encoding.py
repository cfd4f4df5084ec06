import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.layers import Packing
from lowrank_nn.storage import tensor_bytes
from lowrank_nn.storage._encoding import DTYPES, HEADER_COST, choose_encoding, decode, encode
from tests.storage.models import bits_of


def round_trip(tensor, **arguments):
    encoding = choose_encoding(tensor, **arguments)
    payload = encode(tensor, encoding, arguments.get("mask"))
    assert payload.nbytes == encoding.nbytes
    buffer = torch.frombuffer(bytearray(payload.tobytes() or b" "), dtype=torch.uint8)[: payload.nbytes]
    return encoding, decode(encoding, buffer, arguments.get("mask"))


def of_bytes(data, dtype, shape):
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return ((raw & 1).bool() if dtype is torch.bool else raw.view(dtype)).reshape(shape)


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    shape=st.sampled_from([(), (1,), (17,), (3, 5), (2, 3, 3, 4), (700,)]),
    fill=st.sampled_from(["noise", "zeros", "mostly zeros", "low bytes"]),
    seed=st.integers(0, 1000),
)
def test_every_dtype_comes_back_bit_for_bit(dtype, shape, fill, seed):
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    size = (count, dtype.itemsize)
    raw = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    if fill != "noise":
        raw[:, 1 if fill == "low bytes" else 0 :] = 0
    if fill == "mostly zeros":
        raw[::9] = 3
    tensor = of_bytes(raw.numpy().tobytes(), dtype, shape)
    encoding, back = round_trip(tensor)
    assert (back.dtype, back.shape) == (dtype, torch.Size(shape))
    assert bits_of(back) == bits_of(tensor)
    assert encoding.nbytes <= count * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_empty_tensors(dtype):
    _, back = round_trip(torch.empty((0, 3), dtype=dtype))
    assert back.dtype is dtype
    assert back.shape == (0, 3)


def test_negative_zero_and_nan_payloads_survive():
    tensor = torch.zeros(4000)
    tensor[1], tensor[2] = -0.0, float("nan")
    tensor.view(torch.int32)[3] = 0x7FC00123
    encoding, back = round_trip(tensor)
    assert encoding.bitmap
    assert bits_of(back) == bits_of(tensor)
    assert encoding.nbytes == 4000 // 8 + 3 * 4


@pytest.mark.parametrize("bits", range(1, 8))
def test_integers_take_their_bits(bits):
    tensor = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (33, 31), dtype=torch.int8)
    assert tensor_bytes(tensor) == -(-33 * 31 * bits // 8)
    assert tensor_bytes(tensor, Packing(bits=bits)) == tensor_bytes(tensor)


def test_declared_bits_hold_even_where_fewer_would_do():
    tensor = torch.zeros(16, 16, dtype=torch.int8)
    assert tensor_bytes(tensor, Packing(bits=4)) == 128
    assert tensor_bytes(tensor, Packing(bits=8)) == 256
    assert tensor_bytes(torch.tensor([-128, 127] * 100, dtype=torch.int8), Packing(bits=4)) == 200


def test_bools_take_a_bit():
    assert tensor_bytes(torch.rand(1001) < 0.5) == 126


def test_zeros_are_left_out_where_that_saves():
    tensor = torch.randn(1000)
    assert tensor_bytes(tensor) == 4000
    tensor[::10] = 0
    assert tensor_bytes(tensor) == 125 + 900 * 4
    sparse = torch.zeros(1000, dtype=torch.int8)
    sparse[::100] = torch.tensor([-4, 3] * 5, dtype=torch.int8)
    assert tensor_bytes(sparse) == 125 + 4  # ten values of three bits


def test_small_savings_are_not_worth_a_header():
    assert tensor_bytes(torch.tensor(0)) == 8
    assert tensor_bytes(torch.zeros(16)) == 64
    assert tensor_bytes(torch.zeros(1000)) == 125
    assert HEADER_COST == 64


@pytest.mark.parametrize("mask_shape", [(12, 5, 3, 3), (12, 1, 1, 1), (5, 1, 3), (1,)])
def test_masked_entries_are_dropped(mask_shape):
    tensor, mask = torch.randn(12, 5, 3, 3), torch.rand(mask_shape) < 0.5
    packing = Packing(mask="mask")
    encoding, back = round_trip(tensor, packing=packing, mask=mask, mask_key="mask")
    kept = int(mask.expand_as(tensor).sum())
    assert encoding.nbytes == kept * 4 == tensor_bytes(tensor, packing, mask)
    assert torch.equal(back, torch.where(mask, tensor, 0))


def test_masked_integers_are_packed_too():
    tensor, mask = torch.randint(-4, 4, (64, 64), dtype=torch.int8), torch.rand(64, 64) < 0.3
    encoding, back = round_trip(tensor, packing=Packing(bits=3, mask="m"), mask=mask, mask_key="m")
    assert encoding.nbytes == -(-int(mask.sum()) * 3 // 8)
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
    _, back = round_trip(tensor)
    assert torch.equal(back, tensor)


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
        tensor_bytes(tensor)
