"""Shares of symbols as whole numbers that add up to a power of two, and how a file writes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._bits import Bytes

Frequencies = NDArray[np.int64]

SYMBOLS = 256
PRECISIONS = range(8, 15)  # from 8, so that each of 256 symbols can have its share; to 14, so that tables stay in cache
MAX_TABLE = 43 * SYMBOLS  # bits: 29 for a change of length from 0 to 14 or back, 1 to end it, 13 for the number
CHUNK = 1 << 20  # symbols counted at a time, as bincount widens them to eight bytes


def count_symbols(symbols: Bytes) -> Frequencies:
    """Return how often each symbol occurs, up to the largest one."""
    counts = np.zeros(SYMBOLS, np.int64)
    for start in range(0, symbols.size, CHUNK):
        counts += np.bincount(symbols[start : start + CHUNK], minlength=SYMBOLS)
    return np.trim_zeros(counts, "b")


def choose_frequencies(counts: Frequencies) -> tuple[int, Frequencies]:
    """Return the precision P and the frequencies, of sum 2^P, with which table and symbols together take least.

    Args:
        counts: How often each symbol occurs; not all zero.
    """
    fitting = [p for p in PRECISIONS if np.count_nonzero(counts) <= 1 << p]
    scaled = [(p, scale_counts(counts, p)) for p in fitting]
    return min(scaled, key=lambda pair: coded_bits(counts, pair[1]) + len(_table_bits(pair[1])))


def scale_counts(counts: Frequencies, precision: int) -> Frequencies:
    """Return whole numbers of sum 2^``precision`` near the shares of ``counts``, at least 1 where a count is not 0."""
    exact = counts * ((1 << precision) / counts.sum())
    scaled = np.where(counts > 0, np.maximum(exact.astype(np.int64), 1), 0)
    missing = (1 << precision) - int(scaled.sum())
    if missing > 0:
        scaled[np.argsort(scaled - exact, kind="stable")[:missing]] += 1
    while missing < 0:  # rare symbols were rounded up to 1: the others give, where it costs least first
        rich = np.flatnonzero(scaled > 1)
        givers = rich[np.argsort(exact[rich] / scaled[rich], kind="stable")[:-missing]]
        scaled[givers] -= 1
        missing += givers.size
    return scaled


def coded_bits(counts: Frequencies, frequencies: Frequencies) -> float:
    """Return the bits that the symbols take at best: each -log2 of its share."""
    present = counts > 0
    shares = frequencies[present] / frequencies.sum()
    return float(-(counts[present] * np.log2(shares)).sum())


def write_table(frequencies: Frequencies) -> Bytes:
    """Write the frequencies, of neighbours often alike, in a few bits each.

    Of each the length in bits, as a change d from the one before (2d - 1 zeros for d > 0, -2d else, then a 1), then
    the number without its leading 1, least significant bit first.
    """
    return np.packbits(np.array(_table_bits(frequencies), np.uint8), bitorder="little")


def read_table(data: Bytes, size: int, precision: int) -> tuple[Frequencies, int]:
    """Undo :func:`write_table`.

    Args:
        data: Bytes that begin with the table.
        size: Number of frequencies.
        precision: Their sum is 2^``precision``.

    Returns:
        The frequencies, and the bytes that they took.

    Raises:
        FileFormatError: The table ends early, or is none of that sum.
    """
    bits = np.unpackbits(data[: MAX_TABLE // 8], bitorder="little").tobytes()
    frequencies = np.zeros(size, np.int64)
    position = length = 0
    for symbol in range(size):
        end = bits.find(1, position)
        change = end - position
        length += (change + 1) // 2 if change % 2 else -(change // 2)
        position = end + max(length, 1)
        if end < 0 or not 0 <= length <= precision + 1 or position > len(bits):
            raise FileFormatError("has a damaged table of frequencies")
        if length > 0:
            digits = bits[end + 1 : position]
            frequencies[symbol] = (1 << length - 1) + sum(bit << i for i, bit in enumerate(digits))
    if int(frequencies.sum()) != 1 << precision:
        raise FileFormatError(f"has frequencies of sum {int(frequencies.sum())}, expected {1 << precision}")
    return frequencies, -(-position // 8)


def _table_bits(frequencies: Frequencies) -> list[int]:
    bits: list[int] = []
    before = 0
    for frequency in frequencies.tolist():
        length = frequency.bit_length()
        change, before = length - before, length
        bits += [0] * (2 * change - 1 if change > 0 else -2 * change) + [1]
        bits += [frequency >> i & 1 for i in range(length - 1)]
    return bits
