"""A file, read and checked as far as that takes no model."""

from __future__ import annotations

import os
from pathlib import Path

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._container import Contents, digest, read_file
from lowrank_nn.storage._structure import Structure, read_structure


def open_file(path: str | os.PathLike[str], caller: str) -> tuple[Contents, Structure]:
    """Return what the file holds, and what it says about that.

    Args:
        path: The file.
        caller: The function that messages name.

    Raises:
        FileFormatError: The file is not one that ``save`` wrote, is damaged (payloads aside), or is of a newer format.
        OSError: The file cannot be read.
    """
    try:
        contents = read_file(Path(path))
        return contents, read_structure(contents.structure, contents.stored_as)
    except FileFormatError as error:
        raise FileFormatError(f"{caller}: {str(path)!r}: {error.message}") from error


def find_damage(structure: Structure, contents: Contents) -> list[str]:
    """Return the keys of the tensors whose bytes do not match their checksums."""
    return [
        key for key, stored in structure.tensors.items() if digest(contents.payloads[key].numpy()) != stored.checksum
    ]
