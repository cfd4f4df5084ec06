"""The file itself: a safetensors file, one entry of which says what the others are and holds all that is small."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.storage._bits import Bytes
from lowrank_nn.storage._encoding import DTYPES
from lowrank_nn.storage._json import MAX_JSON, deflate, dump, inflate, parse

FORMAT = "lowrank_nn"
VERSION = 1
INDEX = "__lowrank_nn__"  # the last entry: checksum, length of the structure, the structure deflated, small payloads
METADATA = "__metadata__"  # what safetensors files hold beside tensors
RESERVED = frozenset({INDEX, METADATA})
"""Names that no tensor's entry can have; the tensor is gathered with the small ones."""
LENGTH_BYTES = 8
CHECKSUM_BYTES = 16
FRONT = CHECKSUM_BYTES + 4
MAX_ENTRIES = 2**62

Entry = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        structure: The JSON structure.
        listed: The bytes of each entry but the index, as flat uint8 views of one buffer.
        stored_as: Dtype and shape of each of these entries in the safetensors header.
        gathered: The payloads that have no entry of their own, one after the other.
        file_bytes: Size of the file.
    """

    structure: Any
    listed: dict[str, Tensor]
    stored_as: dict[str, Entry]
    gathered: Tensor
    file_bytes: int


def digest(data: Bytes) -> str:
    """Return the checksum of a payload: CRC-32, as hex; of hundreds of MB a cryptographic one takes seconds."""
    return f"{zlib.crc32(data.data):08x}"


def make_file(structure: Any, listed: Mapping[str, tuple[Entry, Bytes]], gathered: Sequence[Bytes]) -> list[Bytes]:
    """Return the parts of a file, in order.

    Args:
        structure: The JSON structure.
        listed: Dtype, shape and bytes of every payload that gets an entry of its own; wide items first, so that each
            starts at a multiple of its item size.
        gathered: The other payloads.
    """
    deflated = deflate(structure)
    index = [np.frombuffer(len(deflated).to_bytes(4, "little") + deflated, np.uint8), *gathered]
    index_entry = ("U8", (CHECKSUM_BYTES + sum(part.size for part in index),))
    header = _header({key: entry for key, (entry, _) in listed.items()} | {INDEX: index_entry})
    checksum = np.frombuffer(_checksum([header, *index]), np.uint8)
    return [header, *(payload for _, payload in listed.values()), checksum, *index]


def write_file(path: Path, parts: Sequence[Bytes]) -> int:
    """Write all or nothing: to a temporary file in the same folder, which then takes the name ``path``.

    Returns:
        The bytes written.

    Raises:
        OptionError: The folder does not exist, or ``path`` is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OptionError(f"save: there is no folder {str(target.parent)!r}. Create it first.")
    if target.is_dir():
        raise OptionError(f"save: {str(path)!r} is a folder. Pass the name of a file.")
    if target.exists() and not target.is_file():
        raise OptionError(
            f"save: {str(path)!r} is a device or a pipe, which a file would replace. Pass the name of a file; "
            "lowrank_nn.storage.packed_size(model) counts the bytes without writing them."
        )
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            size = sum(file.write(part.data) for part in parts)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return size


def read_file(path: Path) -> Contents:
    """Read and check everything that needs no model: lengths, offsets, and the checksum of header and index.

    Raises:
        FileFormatError: The file is not one that ``save`` wrote, or is damaged.
    """
    with path.open("rb") as file:
        buffer = np.empty(os.fstat(file.fileno()).st_size, np.uint8)  # not bytearray, which fills itself with zeros
        length = file.readinto(buffer.data)
    if length != buffer.size or length < LENGTH_BYTES:
        raise FileFormatError(f"the file is {length} bytes long, too short to be one that save wrote.")
    end = LENGTH_BYTES + int.from_bytes(buffer[:LENGTH_BYTES].tobytes(), "little")
    if end > min(length, MAX_JSON):
        raise FileFormatError(
            f"the file is truncated or was not written by save: it announces a header of {end - LENGTH_BYTES} bytes "
            f"and is {length} bytes long."
        )
    entries = _open_header(_parse_header(buffer[LENGTH_BYTES:end].tobytes()))
    listed, stored_as = _split(entries, torch.from_numpy(buffer[end:]))
    index = listed.pop(INDEX).numpy()
    del stored_as[INDEX]
    if index.size < FRONT or index[:CHECKSUM_BYTES].tobytes() != _checksum([buffer[:end], index[CHECKSUM_BYTES:]]):
        raise FileFormatError("the header and the small tensors do not match their checksum: the file is damaged.")
    middle = FRONT + int.from_bytes(index[CHECKSUM_BYTES:FRONT].tobytes(), "little")
    if middle > index.size:
        raise FileFormatError("the structure is cut short.")
    structure = inflate(index[FRONT:middle].tobytes(), "structure")
    return Contents(structure, listed, stored_as, torch.from_numpy(index[middle:]), length)


def entry_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an entry of this dtype and shape."""
    count = DTYPES[dtype].itemsize
    for n in shape:
        count *= n
    return count


def is_shape(value: Any) -> bool:
    """Whether ``value``, read from JSON, is a list of sizes, of no more entries than an address has room for."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    entries = 1
    for n in value:
        if type(n) is not int or not 0 <= n < MAX_ENTRIES:
            return False
        entries *= max(n, 1)
    return entries < MAX_ENTRIES


def _header(entries: Mapping[str, Entry]) -> Bytes:
    header: dict[str, Any] = {METADATA: {"format": FORMAT, "version": str(VERSION)}}
    end = 0
    for key, (dtype, shape) in entries.items():
        start, end = end, end + entry_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = dump(header)
    text += b" " * (-len(text) % LENGTH_BYTES)
    return np.frombuffer(len(text).to_bytes(LENGTH_BYTES, "little") + text, np.uint8)


def _checksum(parts: Sequence[Bytes]) -> bytes:
    checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for part in parts:
        checksum.update(part.data)
    return checksum.digest()


def _parse_header(text: bytes) -> Any:
    # Lists of lists would take 24 times the memory of their text. Of tensors, one character in 16 opens something and
    # one in 5 is a quote; what is far from that is not even parsed.
    if text.count(b"{") + text.count(b"[") > 16 + len(text) // 12 or text.count(b'"') > 64 + len(text) // 4:
        raise FileFormatError("the header lists no tensors: not written by save, or damaged.")
    return parse(text, "header")


def _open_header(header: Any) -> dict[str, Any]:
    """Return the entries of a header of this format and version."""
    metadata = header.pop(METADATA, None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FileFormatError(
            "the file holds no structure of this library. Plain safetensors files are read with "
            "safetensors.torch.load_file."
        )
    if metadata.get("version") != str(VERSION):
        raise FileFormatError(
            f"the file has format version {metadata.get('version')!r}, expected '{VERSION}'. Update lowrank_nn to read "
            "it."
        )
    if [*header][-1:] != [INDEX]:
        raise FileFormatError(f"the entry {INDEX!r} is missing or not the last one.")
    entries: dict[str, Any] = header
    return entries


def _split(entries: dict[str, Any], data: Tensor) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    payloads: dict[str, Tensor] = {}
    stored_as: dict[str, Entry] = {}
    end = 0
    for key, entry in entries.items():
        stored_as[key] = _read_entry(key, entry)
        start, end = end, end + entry_bytes(*stored_as[key])
        if entry.get("data_offsets") != [start, end]:
            raise FileFormatError(f"{key!r} lies at {entry.get('data_offsets')!s:.99}, expected {[start, end]}.")
        payloads[key] = data[start:end]
    if end != data.numel():
        raise FileFormatError(
            f"the tensors take {end} bytes, but {data.numel()} follow the header: the file is truncated or damaged."
        )
    return payloads, stored_as


def _read_entry(key: str, entry: Any) -> Entry:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or dtype not in DTYPES or shape is None or not is_shape(shape):
        raise FileFormatError(f"{key!r} has dtype {dtype!r} and shape {shape!r}, which is no tensor's."[:500])
    return (dtype, tuple(shape))
