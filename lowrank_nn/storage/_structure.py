"""What a file says about a model: its compressed layers, shared tensors and how each is stored, as JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage._coders import CODERS
from lowrank_nn.storage._container import Entry, entry_bytes, is_shape
from lowrank_nn.storage._encoding import DTYPES, Encoding, is_integer, number_dtype
from lowrank_nn.storage._resized import Attributes, read_attributes

_FIELDS = frozenset({"dtype", "shape", "bytes", "bits", "offset", "bitmap", "mask", "gaps", "coder", "checksum"})


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """One compressed layer.

    Attributes:
        path: Its dotted path, "" for the model itself.
        name: Its class, as registered in ``LAYERS``.
        config: The arguments of its constructor.
        aliases: Further paths where the model holds the same layer.
    """

    path: str
    name: str
    config: dict[str, Any]
    aliases: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON-able values."""
        entry = {"path": self.path, "class": self.name, "config": self.config}
        return entry | ({"aliases": list(self.aliases)} if self.aliases else {})


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """How one tensor is stored.

    Attributes:
        encoding: How its bytes are to be read.
        nbytes: How many they are.
        checksum: Their checksum; None for one that was gathered with others, under one checksum.
    """

    encoding: Encoding
    nbytes: int
    checksum: str | None

    def to_json(self) -> str | dict[str, Any]:
        """Return what a reader needs beside the header, which has an entry for each tensor with a checksum."""
        encoding = self.encoding
        if encoding.whole and self.checksum is not None:
            return self.checksum
        entry: dict[str, Any] = {"dtype": encoding.dtype, "shape": list(encoding.shape)}
        if self.checksum is None:
            entry["bytes"] = self.nbytes
        if encoding.bits is not None:
            entry["bits"], entry["offset"] = encoding.bits
        if encoding.bitmap:
            entry["bitmap"] = True
        named = {"mask": encoding.mask, "gaps": encoding.gaps, "coder": encoding.coder, "checksum": self.checksum}
        return entry | {name: value for name, value in named.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Structure:
    """All that a file says about a model.

    Attributes:
        layers: Its compressed layers, parents before the layers inside them.
        tied: For each state-dict key that shares its tensor with an earlier one, that earlier key.
        tensors: How each tensor is stored, by state-dict key.
        identities: Paths of its identities, where batch norms may have been folded away.
        resized: By path of a layer that lost channels, the attributes that tell its size.
    """

    layers: tuple[LayerEntry, ...]
    tied: dict[str, str]
    tensors: dict[str, StoredTensor]
    identities: tuple[str, ...] = ()
    resized: dict[str, Attributes] = dataclasses.field(default_factory=dict)

    def keys(self) -> dict[str, str]:
        """Return for every state-dict key the one under which its tensor is stored."""
        return {key: key for key in self.tensors} | self.tied

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the tensor of every state-dict key."""
        return {key: self.tensors[first].encoding.shape for key, first in self.keys().items()}

    def to_json(self) -> dict[str, Any]:
        """Return the structure as JSON-able values."""
        identities = {"identities": list(self.identities)} if self.identities else {}
        return {
            "layers": [layer.to_json() for layer in self.layers],
            **identities,
            **({"resized": self.resized} if self.resized else {}),
            "tied": self.tied,
            "tensors": {key: tensor.to_json() for key, tensor in self.tensors.items()},
        }


def read_structure(value: Any, stored_as: Mapping[str, Entry]) -> Structure:
    """Read back :meth:`Structure.to_json`.

    Args:
        value: The parsed JSON.
        stored_as: Dtype and shape of the entries that the header lists.

    Raises:
        FileFormatError: It is not of that form, or does not fit the entries.
    """
    try:
        layers = tuple(_read_layer(entry) for entry in _typed(value["layers"], list))
        identities = tuple(_typed(path, str) for path in _typed(value.get("identities", []), list))
        resized = {_typed(k, str): read_attributes(v) for k, v in _typed(value.get("resized", {}), dict).items()}
        tied = {_typed(k, str): _typed(v, str) for k, v in _typed(value["tied"], dict).items()}
        tensors = _typed(value["tensors"], dict)
        if not stored_as.keys() <= tensors.keys() >= set(tied.values()) or tied.keys() & tensors:
            raise ValueError("its tensors are not those that are stored")
        read = {key: _read_tensor(entry, stored_as.get(key)) for key, entry in tensors.items()}
        for tensor in read.values():
            _check_mask(tensor.encoding, read)
    except FileFormatError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the structure in the header is malformed ({error}).") from error
    return Structure(layers, tied, read, identities, resized)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}"[:200])
    return value


def _read_layer(entry: Any) -> LayerEntry:
    config = {_typed(name, str): _tuples(value) for name, value in _typed(entry["config"], dict).items()}
    aliases = tuple(_typed(alias, str) for alias in _typed(entry.get("aliases", []), list))
    return LayerEntry(_typed(entry["path"], str), _typed(entry["class"], str), config, aliases)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check_mask(encoding: Encoding, tensors: Mapping[str, StoredTensor]) -> None:
    if encoding.mask is None:
        return
    mask = tensors[encoding.mask].encoding
    sizes = list(zip(reversed(mask.shape), reversed(encoding.shape), strict=False))
    fits = len(mask.shape) <= len(encoding.shape) and all(m in (1, n) for m, n in sizes)
    if mask.dtype != "BOOL" or mask.mask is not None or not fits:
        raise ValueError(f"{encoding.mask!r} is no mask of shape {encoding.shape}")


def _read_tensor(entry: Any, stored_as: Entry | None) -> StoredTensor:
    """Read what is said of one tensor: its checksum, where the header has all else, or how it is encoded."""
    if isinstance(entry, str):
        if stored_as is None:
            raise ValueError("a tensor has a checksum and no entry")
        return _counted(Encoding(*stored_as, 0), entry_bytes(*stored_as), entry)
    encoding = _read_encoding(_typed(entry, dict))
    if stored_as is not None:
        return _counted(encoding, entry_bytes(*stored_as), _typed(entry["checksum"], str))
    nbytes = _typed(entry["bytes"], int)
    if nbytes < 0:
        raise ValueError(f"{nbytes} bytes")
    return _counted(encoding, nbytes, None)


def _read_encoding(entry: dict[str, Any]) -> Encoding:
    _refuse_unknown(entry)
    dtype, shape = _typed(entry["dtype"], str), entry["shape"]
    if dtype not in DTYPES or not is_shape(shape):
        raise ValueError(f"dtype {dtype!r}, shape {shape!r}"[:200])
    bits = _read_bits(entry, DTYPES[dtype]) if "bits" in entry else None
    bitmap = _typed(entry.get("bitmap", False), bool)
    mask, gaps, coder = (entry.get(name) for name in ("mask", "gaps", "coder"))
    if bitmap + (mask is not None) + (gaps is not None) > 1 or (bits is None and coder is not None):
        raise ValueError("a tensor has too many encodings")
    return Encoding(dtype, tuple(shape), 0, bits, bitmap, mask, gaps, coder)


def _read_bits(entry: dict[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Return the bits of each number and what is added to it; floats have them only where they are coded."""
    bits, offset = _typed(entry["bits"], int), _typed(entry["offset"], int)
    if not 0 <= bits <= 8 * dtype.itemsize or not (is_integer(dtype) or "coder" in entry):
        raise ValueError(f"{bits} bits for {dtype}")
    limits = np.iinfo(number_dtype(dtype))
    if not limits.min <= offset <= limits.max:
        raise ValueError(f"offset {offset} for {dtype}"[:200])
    return bits, offset


def _counted(encoding: Encoding, nbytes: int, checksum: str | None) -> StoredTensor:
    # A tensor without mask, bitmap or gaps stores every entry; of the others these tell how many.
    every = encoding.mask is None and not encoding.bitmap and encoding.gaps is None
    return StoredTensor(dataclasses.replace(encoding, kept=encoding.numel if every else 0), nbytes, checksum)


def _refuse_unknown(entry: dict[str, Any]) -> None:
    unknown = sorted(entry.keys() - _FIELDS)
    unknown += [entry[name] for name in ("gaps", "coder") if entry.get(name) not in (None, *CODERS)]
    if unknown:
        raise FileFormatError(
            f"it stores a tensor in a way that this version does not know ({', '.join(map(repr, unknown))[:200]}). "
            "Update lowrank_nn to read it."
        )
