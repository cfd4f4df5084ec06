"""The file itself: a safetensors file whose header carries the structure as JSON, under one checksum."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.storage._encoding import DTYPES

FORMAT = "lowrank_nn"
VERSION = 1
LENGTH_BYTES = 8
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself

Entry = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        structure: The JSON structure.
        payloads: The bytes of each entry, as flat uint8 views of one buffer.
        stored_as: Dtype and shape of each entry in the safetensors header.
        header_bytes: Bytes before the first payload.
    """

    structure: Any
    payloads: dict[str, Tensor]
    stored_as: dict[str, Entry]
    header_bytes: int


def digest(data: NDArray[np.uint8]) -> str:
    """Return the checksum of a payload: BLAKE2b, 8 bytes, as hex."""
    return hashlib.blake2b(data.data, digest_size=8).hexdigest()


def make_header(structure: Any, entries: Mapping[str, Entry]) -> bytes:
    """Return the file up to its payloads.

    Args:
        structure: The JSON structure.
        entries: Dtype and shape of every payload, in the order in which they follow.
    """
    metadata = {"format": FORMAT, "version": str(VERSION), "structure": pack_json(structure)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, (dtype, shape) in entries.items():
        start, end = end, end + _entry_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    metadata["checksum"] = _checksum(header)
    text = _dump(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def write_file(path: Path, header: bytes, payloads: list[NDArray[np.uint8]]) -> int:
    """Write all or nothing: to a temporary file in the same folder, which then takes the name ``path``.

    Returns:
        The bytes written.

    Raises:
        OptionError: The folder does not exist, or ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OptionError(f"save: there is no folder {str(target.parent)!r}. Create it first.")
    if target.is_dir():
        raise OptionError(f"save: {str(path)!r} is a folder. Pass the name of a file.")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            size = file.write(header)
            for payload in payloads:
                size += file.write(payload.data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return size


def read_file(path: Path) -> Contents:
    """Read and check everything that needs no model: lengths, offsets, and the checksum of the header.

    Raises:
        FileFormatError: The file is not one that ``save`` wrote, or is damaged.
    """
    with path.open("rb") as file:
        buffer = bytearray(os.fstat(file.fileno()).st_size)
        length = file.readinto(buffer)
    if length != len(buffer) or length < LENGTH_BYTES:
        raise FileFormatError(f"the file is {length} bytes long, too short to be one that save wrote.")
    end = LENGTH_BYTES + int.from_bytes(buffer[:LENGTH_BYTES], "little")
    if end > min(length, MAX_HEADER):
        raise FileFormatError(
            f"the file is truncated or was not written by save: it announces a header of {end - LENGTH_BYTES} bytes "
            f"and is {length} bytes long."
        )
    header = _parse(bytes(buffer[LENGTH_BYTES:end]), "header")
    structure = _open_metadata(header)
    data = torch.frombuffer(buffer, dtype=torch.uint8)[end:]
    payloads, stored_as = _split(header, data)
    return Contents(structure, payloads, stored_as, end)


def pack_json(value: Any) -> str:
    """Return ``value`` as JSON, deflated, in base64: deep networks repeat the same words hundreds of times."""
    return base64.b64encode(zlib.compress(_dump(value).encode(), 9)).decode()


def unpack_json(text: str) -> Any:
    """Read back :func:`pack_json`; what inflates to more than a header may hold is refused before it does.

    Raises:
        FileFormatError: ``text`` is not of that form.
    """
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(base64.b64decode(text, validate=True), MAX_HEADER)
    except (ValueError, zlib.error) as error:
        raise FileFormatError(f"the structure cannot be inflated ({error}): the file is damaged.") from error
    if not inflater.eof or inflater.unused_data:
        raise FileFormatError("the structure is cut short, too long, or followed by something else.")
    return _parse(inflated, "structure")


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _checksum(header: Any) -> str:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parse(text: bytes, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the {what} is not valid JSON ({error}): not written by save, or damaged.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _open_metadata(header: Any) -> Any:
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FileFormatError(
            "the file holds no structure of this library. Plain safetensors files are read with "
            "safetensors.torch.load_file."
        )
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(header):
        raise FileFormatError("the header does not match its checksum: the file is damaged.")
    if metadata.get("version") != str(VERSION):
        raise FileFormatError(
            f"the file has format version {metadata.get('version')}, expected {VERSION}. Update lowrank_nn to read it."
        )
    structure = metadata.get("structure")
    if not isinstance(structure, str):
        raise FileFormatError("the structure is missing.")
    return unpack_json(structure)


def _split(header: dict[str, Any], data: Tensor) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    payloads: dict[str, Tensor] = {}
    stored_as: dict[str, Entry] = {}
    end = 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        stored_as[key] = _read_entry(key, entry)
        start, end = end, end + _entry_bytes(*stored_as[key])
        if entry.get("data_offsets") != [start, end]:
            raise FileFormatError(f"{key!r} lies at {entry.get('data_offsets')}, expected {[start, end]}.")
        payloads[key] = data[start:end]
    if end != data.numel():
        raise FileFormatError(
            f"the tensors take {end} bytes, but {data.numel()} follow the header: the file is truncated or damaged."
        )
    return payloads, stored_as


def _read_entry(key: str, entry: Any) -> Entry:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or dtype not in DTYPES or shape is None or not is_shape(shape):
        raise FileFormatError(f"{key!r} has dtype {dtype!r} and shape {shape!r}, which is no tensor's.")
    return (dtype, tuple(shape))


def is_shape(value: Any) -> bool:
    """Whether ``value``, read from JSON, is a list of sizes."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _entry_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = DTYPES[dtype].itemsize
    for n in shape:
        count *= n
    return count
