"""Where the entries of a sparse tensor are, as the distances from one to the next (relative indices).

A symbol below 255 says how many entries are left out before the next one that is kept; 255 says that 255 are left out
and the distance goes on. After the last entry that is kept nothing follows. (Han et al. fill in a zero weight where a
distance is too long for its bits; here the place is skipped, and no weight is stored.)

References:
    Han, Mao, Dally, "Deep Compression", ICLR 2016.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._bits import Bytes

LONG = 255
CHUNK = 1 << 20  # entries handled at a time, as positions take eight bytes


def to_gaps(marked: NDArray[np.bool_]) -> Bytes:
    """Return the symbols that say where the flat array ``marked`` is true."""
    parts = [np.empty(0, np.uint8)]
    last = -1
    for start in range(0, marked.size, CHUNK):
        positions = np.flatnonzero(marked[start : start + CHUNK]) + start
        if positions.size == 0:
            continue
        long, short = np.divmod(np.diff(positions, prepend=last) - 1, LONG)
        last = int(positions[-1])
        ends = np.cumsum(long + 1)
        symbols = np.full(int(ends[-1]), LONG, np.uint8)
        symbols[ends - 1] = short
        parts.append(symbols)
    return np.concatenate(parts)


def from_gaps(symbols: Bytes, size: int) -> NDArray[np.bool_]:
    """Undo :func:`to_gaps`.

    Args:
        symbols: The distances.
        size: Length of the array.

    Raises:
        FileFormatError: The distances lead beyond the array.
    """
    marked = np.zeros(size, np.bool_)
    at = 0
    for start in range(0, symbols.size, CHUNK):
        part = symbols[start : start + CHUNK]
        ends = np.cumsum(part.astype(np.int64) + (part < LONG)) + at
        at = int(ends[-1])
        if at > size:
            raise FileFormatError(f"has gaps that lead to entry {at}, of {size}")
        marked[ends[part < LONG] - 1] = True
    return marked
