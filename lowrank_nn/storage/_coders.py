"""The entropy coders that a file may name."""

from __future__ import annotations

from typing import Protocol

from lowrank_nn.storage import _huffman, _rans
from lowrank_nn.storage._bits import Bytes
from lowrank_nn.storage._frequencies import Frequencies


class Coder(Protocol):
    """What a coder can do; a module with these functions is one."""

    def coded_size(self, counts: Frequencies) -> int:
        """Return about how many bytes the block of symbols takes that occur ``counts`` times."""

    def encode(self, symbols: Bytes) -> Bytes:
        """Return the symbols as a block that says where it ends."""

    def decode(self, data: Bytes, count: int) -> tuple[Bytes, int]:
        """Return the ``count`` symbols of the block that ``data`` begins with, and the bytes it takes.

        Raises:
            FileFormatError: The block is damaged.
        """


CODERS: dict[str, Coder] = {"rans": _rans, "huffman": _huffman}
