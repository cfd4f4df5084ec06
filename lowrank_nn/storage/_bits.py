"""Integers in as few bits as they need, one after the other, least significant bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Values = NDArray[Any]

CHUNK = 1 << 16  # a multiple of 8: every chunk but the last ends on a byte; bounds the memory of the bit matrix


def packed_length(count: int, bits: int) -> int:
    """Return the bytes of ``count`` values of ``bits`` bits each: ceil(count * bits / 8)."""
    return -(-count * bits // 8)


def width_and_offset(values: Values) -> tuple[int, int]:
    """Return the bits that each value minus the smallest one needs, and the smallest one; (0, 0) for no values."""
    if values.size == 0:
        return (0, 0)
    low, high = int(values.min()), int(values.max())
    return ((high - low).bit_length(), low)


def pack_bits(values: Values, bits: int, offset: int) -> Bytes:
    """Pack a flat array of integers: value i, minus ``offset``, takes bits i * bits to (i + 1) * bits - 1.

    Args:
        values: Flat array of any integer dtype.
        bits: Width that every value minus ``offset`` fits in, 0 to 64.
        offset: Subtracted from every value.
    """
    packed = np.empty(packed_length(values.size, bits), np.uint8)
    if bits == 0:
        return packed
    for start in range(0, values.size, CHUNK):
        wide = values[start : start + CHUNK].astype("<u8") - np.uint64(offset % 2**64)
        matrix = np.unpackbits(wide.view(np.uint8).reshape(-1, 8), axis=1, count=bits, bitorder="little")
        chunk = np.packbits(matrix, bitorder="little")
        packed[start * bits // 8 :][: chunk.size] = chunk
    return packed


def unpack_bits(packed: Bytes, count: int, bits: int, offset: int, dtype: np.dtype[Any]) -> Values:
    """Undo :func:`pack_bits`.

    Args:
        packed: Flat array of ``packed_length(count, bits)`` bytes.
        count: Number of values.
        bits: Width of each.
        offset: Added to each.
        dtype: Integer dtype of the result.
    """
    values = np.empty(count, dtype)
    shift = np.uint64(offset % 2**64)
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        chunk = packed[start * bits // 8 :][: packed_length(length, bits)]
        matrix = np.unpackbits(chunk, count=length * bits, bitorder="little").reshape(length, bits)
        wide = np.zeros((length, 8), np.uint8)
        wide[:, : packed_length(bits, 1)] = np.packbits(matrix, axis=1, bitorder="little")
        values[start : start + length] = (wide.view("<u8")[:, 0] + shift).astype(dtype)
    return values
