"""The bytes of one tensor: written as its encoding says, and read back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._bits import Bytes, Values, pack_bits, packed_length, unpack_bits
from lowrank_nn.storage._coders import CODERS
from lowrank_nn.storage._encoding import DTYPES, SYMBOL_BITS, Encoding, marked_by, number_dtype, numbers_of
from lowrank_nn.storage._gaps import from_gaps, to_gaps

GAP_COUNT = 8  # bytes of the number of gaps, which comes before them


def encode(tensor: Tensor, encoding: Encoding, mask: Tensor | None = None) -> Bytes:
    """Return the bytes of ``tensor``; without a copy where it is stored whole and lies in CPU memory in order."""
    numbers = numbers_of(tensor)
    parts: list[Bytes] = []
    if mask is not None:
        numbers = numbers[marked_by(mask, encoding.shape)]
    elif encoding.bitmap or encoding.gaps is not None:
        marked = numbers != 0
        parts += _place_parts(marked, encoding)
        numbers = numbers[marked]
    parts += _value_parts(numbers, encoding)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def decode(encoding: Encoding, payload: Tensor, mask: Tensor | None = None) -> Tensor:
    """Undo :func:`encode`.

    Args:
        encoding: How the tensor is stored; ``kept`` is counted in the mask, bitmap or gaps, not trusted.
        payload: The stored bytes, a flat uint8 tensor on the CPU. The result may share its memory.
        mask: The decoded tensor that ``encoding.mask`` names.

    Returns:
        The tensor on the CPU. Entries that were not stored are zero.

    Raises:
        FileFormatError: The number of bytes is not the one that the encoding needs, a coded block is damaged, or a
            bool is neither 0 nor 1.
    """
    dtype = DTYPES[encoding.dtype]
    if encoding.whole:
        _check_length(payload.numel(), encoding.plain_bytes)
        tensor = _typed(payload, dtype)
    else:
        numbers = _read_numbers(encoding, payload.numpy(), mask)
        tensor = torch.from_numpy(numbers.view(np.uint8)).view(dtype)
    if dtype is torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise FileFormatError("holds bools that are neither 0 nor 1")
    return tensor.reshape(encoding.shape)


def symbols_of(numbers: Values, bits: tuple[int, int]) -> Bytes:
    """Return the upper 8 bits of the numbers of ``bits`` (width, offset): what is coded of them."""
    width, offset = bits
    unsigned = _less(numbers, offset)
    symbols: Bytes = (unsigned >> unsigned.dtype.type(max(width - SYMBOL_BITS, 0))).astype(np.uint8)
    return symbols


def _less(numbers: Values, offset: int) -> Values:
    """Return the numbers less ``offset``, none of which is negative then."""
    unsigned = numbers.view(f"<u{numbers.itemsize}")
    shifted: Values = unsigned - unsigned.dtype.type(offset % 2 ** (8 * numbers.itemsize))
    return shifted


def _place_parts(marked: NDArray[np.bool_], encoding: Encoding) -> list[Bytes]:
    if encoding.gaps is None:
        return [np.packbits(marked, bitorder="little")]
    gaps = to_gaps(marked)
    return [np.array([gaps.size], "<u8").view(np.uint8), CODERS[encoding.gaps].encode(gaps)]


def _value_parts(numbers: Values, encoding: Encoding) -> list[Bytes]:
    if encoding.bits is None:
        return [numbers.view(np.uint8)]
    if encoding.coder is None:
        return [pack_bits(numbers, *encoding.bits)]
    low = _less(numbers, encoding.bits[1]) & ((1 << encoding.plain_bits) - 1)
    block = CODERS[encoding.coder].encode(symbols_of(numbers, encoding.bits))
    return [block, pack_bits(low, encoding.plain_bits, 0)]


def _read_numbers(encoding: Encoding, payload: Bytes, mask: Tensor | None) -> Values:
    marked = None if mask is None else marked_by(mask, encoding.shape)
    if encoding.bitmap:
        marked, payload = _read_bitmap(payload, encoding.numel)
    elif encoding.gaps is not None:
        marked, payload = _read_gaps(payload, encoding.numel, encoding.gaps)
    if marked is None:
        return _read_values(encoding, payload, encoding.numel)
    numbers = np.zeros(encoding.numel, number_dtype(DTYPES[encoding.dtype]))
    numbers[marked] = _read_values(encoding, payload, int(np.count_nonzero(marked)))
    return numbers


def _read_bitmap(payload: Bytes, size: int) -> tuple[NDArray[np.bool_], Bytes]:
    length = packed_length(size, 1)
    if payload.size < length:
        raise FileFormatError(f"takes at least {length} bytes, but {payload.size} are stored")
    return np.unpackbits(payload[:length], count=size, bitorder="little").view(np.bool_), payload[length:]


def _read_gaps(payload: Bytes, size: int, coder: str) -> tuple[NDArray[np.bool_], Bytes]:
    count = int.from_bytes(payload[:GAP_COUNT].tobytes(), "little")
    if payload.size < GAP_COUNT or count > size:  # every gap leads at least one entry on
        raise FileFormatError(f"has {count} gaps between {size} entries")
    gaps, used = CODERS[coder].decode(payload[GAP_COUNT:], count)
    return from_gaps(gaps, size), payload[GAP_COUNT + used :]


def _read_values(encoding: Encoding, payload: Bytes, count: int) -> Values:
    dtype = number_dtype(DTYPES[encoding.dtype])
    if encoding.bits is None:
        _check_length(payload.size, count * dtype.itemsize)
        return payload.copy().view(dtype)
    width, offset = encoding.bits
    if encoding.coder is None:
        _check_length(payload.size, packed_length(count, width))
        return unpack_bits(payload, count, width, offset, dtype)
    symbols, used = CODERS[encoding.coder].decode(payload, count)
    low = encoding.plain_bits
    _check_length(payload.size - used, packed_length(count, low))
    numbers = unpack_bits(payload[used:], count, low, offset, dtype)
    unsigned = numbers.view(f"<u{dtype.itemsize}")
    unsigned += symbols.astype(unsigned.dtype) << unsigned.dtype.type(low)
    return numbers


def _typed(payload: Tensor, dtype: torch.dtype) -> Tensor:
    # A view needs bytes that start at a multiple of the item size.
    aligned = payload if payload.storage_offset() % dtype.itemsize == 0 else payload.clone()
    return aligned.view(dtype)


def _check_length(stored: int, needed: int) -> None:
    if stored != needed:
        raise FileFormatError(f"takes {needed} bytes, but {stored} are stored")
