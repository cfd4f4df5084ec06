"""Entropy coding of bytes: asymmetric numeral systems (rANS) with fixed shares, many lanes at once.

A lane holds a state x in [2^16, 2^32). A symbol of share f / 2^P, whose shares begin at b, is pushed by
x -> (x // f) 2^P + x mod f + b, after the lower 16 bits of x went to the stream where x would else overflow. Pulling
undoes this in the reverse order, so encoding runs backwards. Symbol i belongs to lane i mod L: every step handles one
symbol of all lanes in a few array operations, and the lanes share one stream of 16-bit words.

The state that a lane begins with is free to choose: its lower 16 bits hold the last symbols of the block, packed. That
saves half of what lanes cost, so there can be twice as many, and half as many steps.

References:
    Duda, "Asymmetric numeral systems", arXiv:1311.2540 (2013).
    Giesen, "Interleaved entropy coders", arXiv:1402.3392 (2014).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._bits import Bytes, pack_bits, unpack_bits
from lowrank_nn.storage._frequencies import (
    PRECISIONS,
    Frequencies,
    choose_frequencies,
    coded_bits,
    count_symbols,
    read_table,
    write_table,
)
from lowrank_nn.storage._lanes import check_lanes, choose_lanes

States: TypeAlias = NDArray[np.uint32]
Words: TypeAlias = NDArray[np.uint16]

LOW = 1 << 16  # the least that a state may be
LANE_BYTES = 256  # coded bytes per lane, of which a lane wastes one or two
FRONT = 6  # precision, largest symbol, lanes


def coded_size(counts: Frequencies) -> int:
    """Return about how many bytes :func:`encode` makes of symbols that occur ``counts`` times."""
    _, frequencies = choose_frequencies(counts)
    count, bits = int(counts.sum()), coded_bits(counts, frequencies)
    lanes = choose_lanes(count, bits, LANE_BYTES)
    in_stream = bits * (1 - _tail(count, lanes, counts.size) / count)
    return FRONT + write_table(frequencies).size + 3 * lanes + int(in_stream / 8)


def encode(symbols: Bytes) -> Bytes:
    """Return the coded block: precision, largest symbol, lanes, table, states, stream. No symbols make no bytes."""
    if symbols.size == 0:
        return np.empty(0, np.uint8)
    counts = count_symbols(symbols)
    precision, frequencies = choose_frequencies(counts)
    lanes = choose_lanes(symbols.size, coded_bits(counts, frequencies), LANE_BYTES)
    body = symbols.size - _tail(symbols.size, lanes, counts.size)
    states = _hide(symbols[body:], lanes, counts.size)
    stream = _push_all(symbols[:body], states, precision, frequencies)
    front = np.array([precision, counts.size - 1], np.uint8)
    width = np.array([lanes], "<u4").view(np.uint8)
    return np.concatenate([front, width, write_table(frequencies), states.view(np.uint8), stream.view(np.uint8)])


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
    if data.size < FRONT or data[0] not in PRECISIONS:
        raise FileFormatError("has a damaged coded block")
    precision, alphabet, lanes = int(data[0]), int(data[1]) + 1, int.from_bytes(data[2:FRONT].tobytes(), "little")
    frequencies, used = read_table(data[FRONT:], alphabet, precision)
    states_at = FRONT + used
    stream_at = states_at + 4 * lanes
    check_lanes(lanes, count, stream_at, data.size)
    states = data[states_at:stream_at].copy().view("<u4")
    stream = data[stream_at : data.size - (data.size - stream_at) % 2].view("<u2")
    symbols = np.empty(count, np.uint8)
    body = count - _tail(count, lanes, alphabet)
    words = _pull_all(symbols[:body], states, stream, frequencies, precision)
    symbols[body:] = _reveal(states, count - body, alphabet)
    return symbols, stream_at + 2 * words


def _width(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _tail(count: int, lanes: int, alphabet: int) -> int:
    """Return how many symbols the first states hold."""
    return min(count, 16 * lanes // _width(alphabet))


def _hide(tail: Bytes, lanes: int, alphabet: int) -> States:
    """Return the states to begin with, which hold the last symbols in their lower halves."""
    packed = np.zeros(2 * lanes, np.uint8)
    bits = pack_bits(tail, _width(alphabet), 0)
    packed[: bits.size] = bits
    return packed.view("<u2").astype("<u4") + LOW


def _reveal(states: States, count: int, alphabet: int) -> Bytes:
    """Undo :func:`_hide`."""
    packed = states.astype("<u2").view(np.uint8)
    symbols = unpack_bits(packed, count, _width(alphabet), 0, np.dtype(np.uint8))
    if (states >> 16 != 1).any() or (symbols >= alphabet).any():
        raise FileFormatError("has a damaged coded block")
    return symbols


def _push_all(symbols: Bytes, states: States, precision: int, frequencies: Frequencies) -> Words:
    """Return the stream, with which the states, changed in place, hold the symbols."""
    begins = (np.cumsum(frequencies) - frequencies).astype("<u4")
    shares = frequencies.astype("<u4")
    # From here on a state has no room for the symbol. A symbol of share 1 changes no state: no limit is needed.
    limits = np.minimum(frequencies << (32 - precision), 2**32 - 1).astype("<u4")
    words = [np.empty(0, "<u2")]
    for start in reversed(range(0, symbols.size, states.size)):
        step = symbols[start : start + states.size]
        active = states[: step.size]
        full = (active >= limits[step]).nonzero()[0]
        overflow = active[full]
        words.append(overflow.astype("<u2"))
        active[full] = overflow >> 16
        quotient, remainder = np.divmod(active, shares[step])
        active[:] = (quotient << precision) + remainder + begins[step]
    return np.concatenate(words[::-1])


def _pull_all(symbols: Bytes, states: States, stream: Words, frequencies: Frequencies, precision: int) -> int:
    """Fill ``symbols``, changing the states, and return how many words of the stream that took."""
    table = np.repeat(np.arange(frequencies.size, dtype=np.uint8), frequencies)
    begins = np.cumsum(frequencies) - frequencies
    shares = frequencies[table].astype("<u4")
    inside = (np.arange(table.size) - begins[table]).astype("<u4")
    taken = 0
    for start in range(0, symbols.size, states.size):
        step = symbols[start : start + states.size]
        active = states[: step.size]
        slots = active & (table.size - 1)
        table.take(slots, out=step, mode="clip")  # "raise" would take a copy
        active >>= precision
        active *= shares[slots]
        active += inside[slots]
        empty = (active < LOW).nonzero()[0]
        words = stream[taken : taken + empty.size]
        if words.size < empty.size:
            raise FileFormatError("has a coded block that ends early")
        active[empty] = active[empty] << 16 | words
        taken += empty.size
    return taken
