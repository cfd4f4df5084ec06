"""Integers in as few bits as they need, one after the other, least significant bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Values = NDArray[Any]

CHUNK = 1 << 18  # a multiple of 8: every chunk but the last ends on a byte; bounds the memory beside the result


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
        chunk = _shifted(values[start : start + CHUNK], -offset, _word(bits))
        part = packed[start * bits // 8 :][: packed_length(chunk.size, bits)]
        part[:] = _pack_groups(np.resize(chunk, (-(-chunk.size // 8), 8)), bits)[: part.size]
        if chunk.size * bits % 8:
            part[-1] &= (1 << chunk.size * bits % 8) - 1  # what fills up the last group is no value
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
    if bits == 0:
        return np.full(count, offset, dtype)
    values = np.empty(count, dtype)
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        part = packed[start * bits // 8 :][: packed_length(length, bits)]
        groups = np.zeros((-(-length // 8), bits), np.uint8)
        groups.reshape(-1)[: part.size] = part
        values[start : start + length] = _shifted(_unpack_groups(groups, bits)[:length], offset, dtype)
    return values


def _word(bits: int) -> np.dtype[Any]:
    """Return the narrowest unsigned dtype of at least ``bits`` bits."""
    return np.dtype(next(f"<u{size}" for size in (1, 2, 4, 8) if bits <= 8 * size))


def _shifted(values: Values, offset: int, dtype: np.dtype[Any]) -> Values:
    """Return values + offset in ``dtype``, which holds every result."""
    # As unsigned numbers of the wider of the two dtypes, where additions wrap.
    wide = np.dtype(f"<u{max(values.dtype.itemsize, dtype.itemsize)}")
    total = values.astype(wide) + wide.type(offset % 2 ** (8 * wide.itemsize))
    shifted: Values = total.astype(dtype)
    return shifted


def _pack_groups(groups: Values, bits: int) -> Bytes:
    """Pack rows of eight values: ``bits`` bytes each, of which every byte takes parts of one value or more."""
    columns = np.ascontiguousarray(groups.T)
    rows = np.empty((len(groups), bits), np.uint8)
    for k in range(bits):
        byte = np.zeros(len(groups), np.uint8)
        for i in range(8 * k // bits, (8 * k + 7) // bits + 1):
            byte |= _moved(columns[i], i * bits - 8 * k).astype(np.uint8)
        rows[:, k] = byte
    return rows.reshape(-1)


def _unpack_groups(groups: Bytes, bits: int) -> Values:
    """Undo :func:`_pack_groups`."""
    dtype = _word(bits)
    columns = np.ascontiguousarray(groups.T).astype(dtype)
    rows = np.empty((len(groups), 8), dtype)
    for i in range(8):
        value = np.zeros(len(groups), dtype)
        for k in range(i * bits // 8, (i * bits + bits - 1) // 8 + 1):
            value |= _moved(columns[k], 8 * k - i * bits)
        rows[:, i] = value & dtype.type(2**bits - 1)
    return rows.reshape(-1)


def _moved(values: Values, left: int) -> Values:
    amount = values.dtype.type(abs(left))
    moved: Values = values << amount if left >= 0 else values >> amount
    return moved
