"""A file, read and checked as far as that takes no model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._container import Contents, digest, read_file
from lowrank_nn.storage._structure import Structure, read_structure


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """A file whose header and structure are sound.

    Attributes:
        structure: What it says about the model.
        payloads: The bytes of each tensor, by state-dict key, as flat uint8 views of one buffer.
        file_bytes: Its size.
    """

    structure: Structure
    payloads: dict[str, Tensor]
    file_bytes: int

    def damaged(self) -> list[str]:
        """Return the keys of the tensors whose bytes do not match their checksums."""
        return [
            key
            for key, stored in self.structure.tensors.items()
            if stored.checksum is not None and digest(self.payloads[key].numpy()) != stored.checksum
        ]

    def same(self, key: str, other: str) -> bool:
        """Whether two tensors are stored alike, byte for byte."""
        encodings = [self.structure.tensors[k].encoding for k in (key, other)]
        return key == other or (encodings[0] == encodings[1] and torch.equal(self.payloads[key], self.payloads[other]))


def open_file(path: str | os.PathLike[str], caller: str) -> OpenFile:
    """Read a file that ``save`` wrote.

    Args:
        path: The file.
        caller: The function that messages name.

    Raises:
        FileFormatError: The file is not one that ``save`` wrote, is of a newer format, or is damaged (payloads with a
            checksum of their own aside).
        OSError: The file cannot be read.
    """
    try:
        contents = read_file(Path(path))
        structure = read_structure(contents.structure, contents.stored_as)
        return OpenFile(structure, _payloads(structure, contents), contents.file_bytes)
    except FileFormatError as error:
        raise FileFormatError(f"{caller}: {str(path)!r}: {error.message}") from error


def _payloads(structure: Structure, contents: Contents) -> dict[str, Tensor]:
    payloads = {}
    end = 0
    for key, stored in structure.tensors.items():
        if stored.checksum is not None:
            payloads[key] = contents.listed[key]
        else:
            start, end = end, end + stored.nbytes
            payloads[key] = contents.gathered[start:end]
    if end != contents.gathered.numel():
        raise FileFormatError(f"the small tensors take {end} bytes, but {contents.gathered.numel()} are stored.")
    return payloads
