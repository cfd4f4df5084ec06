"""Entropy coding of bytes: canonical Huffman codes, many lanes at once.

What Deep Compression used. No symbol takes less than a bit, so blocks are never smaller than those of ``_rans``, and on
what is mostly zero an eighth larger. Symbol i belongs to lane i mod L; every lane has a stream of its own, and every
step reads one symbol of all lanes with a few array operations and a table of all code words.

References:
    Huffman, "A method for the construction of minimum-redundancy codes", Proc. IRE 40 (1952).
    Larmore, Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM 37 (1990).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._bits import Bytes, pack_bits, packed_length, unpack_bits
from lowrank_nn.storage._frequencies import Frequencies, count_symbols
from lowrank_nn.storage._lanes import check_lanes, choose_lanes

Lengths: TypeAlias = NDArray[np.uint8]

LONGEST = 12  # bits of a code word; the table of all then has 4096 places
LENGTH_BITS = 4  # of a length in the file
WORD = 32  # bits by which streams are written and read
LANE_BYTES = 512  # coded bytes per lane, which takes 6 beside them
FRONT = 5  # largest symbol, lanes


def coded_size(counts: Frequencies) -> int:
    """Return about how many bytes :func:`encode` makes of symbols that occur ``counts`` times."""
    bits = int((counts * code_lengths(counts)).sum())
    lanes = choose_lanes(int(counts.sum()), bits, LANE_BYTES)
    return FRONT + packed_length(counts.size, LENGTH_BITS) + 6 * lanes + bits // 8


def encode(symbols: Bytes) -> Bytes:
    """Return the coded block: largest symbol, lanes, code lengths, words per lane, words."""
    if symbols.size == 0:
        return np.empty(0, np.uint8)
    counts = count_symbols(symbols)
    lengths = code_lengths(counts)
    lanes = choose_lanes(symbols.size, int((counts * lengths).sum()), LANE_BYTES)
    sizes, words = _write_lanes(symbols, lanes, lengths)
    front = np.array([counts.size - 1], np.uint8)
    numbers = np.concatenate([np.array([lanes], "<u4"), sizes.astype("<u4")]).view(np.uint8)
    table = pack_bits(lengths, LENGTH_BITS, 0)
    return np.concatenate([front, numbers[:4], table, numbers[4:], words.view(np.uint8)])


def decode(data: Bytes, count: int) -> tuple[Bytes, int]:
    """Undo :func:`encode`.

    Args:
        data: Bytes that begin with a coded block.
        count: Number of symbols; the caller has made sure that there may be so many.

    Returns:
        The symbols, and the bytes that the block took.

    Raises:
        FileFormatError: The block is damaged. No more than ``MAX_STEPS`` steps are run before that is found.
    """
    if count == 0:
        return np.empty(0, np.uint8), 0
    if data.size < FRONT:
        raise FileFormatError("has a damaged coded block")
    alphabet, lanes = int(data[0]) + 1, int.from_bytes(data[1:FRONT].tobytes(), "little")
    sizes_at = FRONT + packed_length(alphabet, LENGTH_BITS)
    words_at = sizes_at + 4 * lanes
    check_lanes(lanes, count, words_at, data.size)
    lengths = unpack_bits(data[FRONT:sizes_at], alphabet, LENGTH_BITS, 0, np.dtype(np.uint8))
    sizes = data[sizes_at:words_at].copy().view("<u4").astype(np.int64)
    end = words_at + 4 * int(sizes.sum())
    if end > data.size:
        raise FileFormatError("has a coded block that ends early")
    return _read_lanes(data[words_at:end].view("<u4"), sizes, count, lengths), end


def code_lengths(counts: Frequencies) -> Lengths:
    """Return the bits of each symbol's code word: the best ones of at most ``LONGEST`` bits (package-merge)."""
    lengths = np.zeros(counts.size, np.uint8)
    coins = sorted((int(counts[symbol]), [symbol]) for symbol in np.flatnonzero(counts).tolist())
    if len(coins) == 1:
        lengths[coins[0][1]] = 1
        return lengths
    packages: list[tuple[int, list[int]]] = []
    for _ in range(LONGEST):
        row = sorted(coins + packages, key=lambda item: item[0])
        packages = [(a + b, left + right) for (a, left), (b, right) in zip(row[::2], row[1::2], strict=False)]
    for _, symbols in packages[: len(coins) - 1]:
        np.add.at(lengths, symbols, 1)
    return lengths


def _canonical(lengths: Lengths) -> tuple[Bytes, NDArray[np.uint32]]:
    """Return the symbol at each of the 2^LONGEST places of the code table, and the code word of each symbol.

    Shorter words come first, among them smaller symbols. Words are read from their first bit, the lowest one here.

    Raises:
        FileFormatError: The lengths are those of no prefix code.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    spans = 1 << (LONGEST - lengths[order].astype(np.int64))
    total = int(spans.sum())
    if lengths.max() > LONGEST or total > 1 << LONGEST or (total < 1 << LONGEST and order.size != 1):
        raise FileFormatError("has a damaged table of code lengths")
    places = np.arange(1 << LONGEST)
    mirrored = np.zeros_like(places)
    for bit in range(LONGEST):
        mirrored |= (places >> bit & 1) << (LONGEST - 1 - bit)
    table = np.repeat(order, spans).astype(np.uint8)
    table = np.resize(table, places.size)[mirrored]  # of a single symbol, whatever the bit is
    words = np.zeros(lengths.size, np.uint32)
    words[order] = mirrored[np.cumsum(spans) - spans]
    return table, words


def _write_lanes(symbols: Bytes, lanes: int, lengths: Lengths) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Return the number of words of each lane, and the words."""
    _, codes = _canonical(lengths)
    codes64, widths = codes.astype("<u8"), lengths.astype("<u8")
    steps = range(0, symbols.size, lanes)
    bits = np.zeros(lanes, "<u8")
    for start in steps:
        step = symbols[start : start + lanes]
        bits[: step.size] += widths[step]
    sizes = (-(-bits.astype(np.int64) // WORD)).astype(np.int64)
    words = np.zeros(int(sizes.sum()), "<u4")
    at = np.cumsum(sizes) - sizes
    pending, held = np.zeros(lanes, "<u8"), np.zeros(lanes, "<u8")
    for start in steps:
        step = symbols[start : start + lanes]
        pending[: step.size] |= codes64[step] << held[: step.size]
        held[: step.size] += widths[step]
        full = (held >= WORD).nonzero()[0]
        words[at[full]] = pending[full].astype("<u4")
        at[full] += 1
        pending[full] >>= np.uint64(WORD)
        held[full] -= np.uint64(WORD)
    rest = held.nonzero()[0]
    words[at[rest]] = pending[rest].astype("<u4")
    return sizes, words


def _read_lanes(words: NDArray[np.uint32], sizes: NDArray[np.int64], count: int, lengths: Lengths) -> Bytes:
    table, _ = _canonical(lengths)
    widths = lengths[table].astype("<u8")
    symbols = np.empty(count, np.uint8)
    ends = np.cumsum(sizes)
    at = ends - sizes
    pending, held = np.zeros(sizes.size, "<u8"), np.zeros(sizes.size, "<u8")
    for start in range(0, count, sizes.size):
        step = symbols[start : start + sizes.size]
        low = ((held < LONGEST) & (at < ends)).nonzero()[0]
        pending[low] |= words[at[low]].astype("<u8") << held[low]
        held[low] += np.uint64(WORD)
        at[low] += 1
        places = pending[: step.size] & np.uint64(table.size - 1)
        table.take(places.view("<i8"), out=step, mode="clip")  # "raise" would take a copy
        taken = widths[places.view("<i8")]
        if (taken > held[: step.size]).any():
            raise FileFormatError("has a coded block that ends early")
        pending[: step.size] >>= taken
        held[: step.size] -= taken
    if (at < ends).any() or (held >= WORD).any() or pending.any():
        raise FileFormatError("has a damaged coded block")
    return symbols
