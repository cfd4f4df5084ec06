"""How many lanes the entropy coders share a block out to, and how many a file may ask for."""

from __future__ import annotations

from lowrank_nn.errors import FileFormatError

MANY_LANES = 1 << 14  # more lanes are no faster: the arrays leave the cache
MAX_STEPS = 4096  # symbols per lane; bounds the time of decoding: 4096 rounds, and some nanoseconds per symbol


def choose_lanes(count: int, bits: float, lane_bytes: int) -> int:
    """Return how many lanes ``count`` symbols of ``bits`` bits in all are shared out to, ``lane_bytes`` to each."""
    return min(count, max(1, -(-count // MAX_STEPS), min(int(bits / 8 / lane_bytes), MANY_LANES)))


def check_lanes(lanes: int, count: int, begin: int, size: int) -> None:
    """Make sure that a block may have so many lanes.

    Args:
        lanes: What the block says.
        count: Number of symbols.
        begin: Where the coded symbols would begin, behind what the block says of each lane.
        size: Bytes that there are.

    Raises:
        FileFormatError: A lane would have none or too many of the symbols, or the block ends before they begin.
    """
    if not 1 <= lanes <= count <= lanes * MAX_STEPS or begin > size:
        raise FileFormatError(f"cannot hold {count} symbols in {lanes} lanes and {size} bytes")
