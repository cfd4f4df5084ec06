"""What a file says about a model: its compressed layers, its shared tensors and how each tensor is stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.layers import LAYERS, CompressedLayer, Packing
from lowrank_nn.storage._coders import CODERS
from lowrank_nn.storage._container import Entry, entry_bytes, is_shape
from lowrank_nn.storage._encoding import DTYPES, Encoding, is_integer, number_dtype, unstorable
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


def describe_layers(model: nn.Module) -> tuple[LayerEntry, ...]:
    """List the compressed layers of ``model``, parents first.

    Raises:
        OptionError: A layer is not registered, its config is not JSON or not that of its tensors, or a module is
            parametrized.
    """
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        paths.setdefault(id(module), []).append(path)
    entries, problems = [], []
    for key, module in modules.items():
        path, *aliases = paths[key]
        if parametrize.is_parametrized(module):
            problems.append(
                f"{path!r} has parametrized tensors. Call torch.nn.utils.parametrize.remove_parametrizations first."
            )
        elif isinstance(module, CompressedLayer):
            problem = _unwritable(module)
            if problem is None:
                entries.append(LayerEntry(path, type(module).__name__, module.config(), tuple(aliases)))
            else:
                problems.append(f"{path!r} {problem}")
    if problems:
        raise OptionError("save: the model cannot be written:\n" + "\n".join(f"  - {p}" for p in problems))
    return tuple(entries)


def state_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the state dict, each once, and for every further key of one the first key.

    Raises:
        OptionError: The state holds something that a file cannot.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    problems = []
    for key, value in model.state_dict(keep_vars=True).items():
        problem = unstorable(value) if isinstance(value, Tensor) else f"is a {type(value).__name__}, not a tensor."
        if key.endswith("_extra_state"):
            problem = "is extra state of a module, which a file cannot hold. Make it a buffer."
        if problem is not None:
            problems.append(f"{key!r} {problem}")
            continue
        earlier = first.setdefault(_identity(value), key)
        if earlier == key:
            tensors[key] = value
        else:
            tied[key] = earlier
    if problems:
        raise OptionError("save: the model cannot be written:\n" + "\n".join(f"  - {p}" for p in problems))
    return tensors, tied


def packings(model: nn.Module) -> dict[str, Packing]:
    """Return what the compressed layers of ``model`` say about their tensors, by key; masks are named by their keys."""
    found: dict[str, Packing] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedLayer):
            prefix = f"{path}." if path else ""
            for name, packing in module.packing().items():
                mask = None if packing.mask is None else prefix + packing.mask
                found[prefix + name] = Packing(packing.bits, mask)
                if mask is not None:
                    found.setdefault(mask, Packing(bits=1))
    return found


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


def _unwritable(layer: CompressedLayer) -> str | None:
    name = type(layer).__name__
    if LAYERS.get(name) is not type(layer):
        return f"is a {name}, which is not registered. Decorate the class with lowrank_nn.layers.register_layer."
    try:
        json.dumps(layer.config(), allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"({name}) has a config that is not JSON ({error}). config() must return plain numbers and strings."
    return _unlike_its_class(layer)


def _unlike_its_class(layer: CompressedLayer) -> str | None:
    """Return in what the layer differs from one of its class and config, which is what ``load`` builds."""
    name = type(layer).__name__
    if any(parametrize.is_parametrized(module) for module in layer.modules()):
        return None  # which is listed
    try:
        with torch.random.fork_rng(devices=[]):
            twin = type(layer).empty(device="meta", dtype=None, **layer.config())
    except Exception as error:
        # A constructor may raise anything on a config that it was not written for.
        return f"({name}) cannot be built from its config(): {error}"
    inside = tuple(f"{path}." for path, m in layer.named_modules() if path and isinstance(m, CompressedLayer))
    held, built = (
        {key: tuple(t.shape) for key, t in m.state_dict().items() if not key.startswith(inside)} for m in (layer, twin)
    )
    differing = sorted(key for key in held.keys() | built.keys() if held.get(key) != built.get(key))
    if not differing:
        return None
    return (
        f"({name}) was changed: {', '.join(differing)} are not those that its class makes from its config, so it could "
        "not be loaded. Undo hooks that compute weights (torch.nn.utils.prune.remove, remove_weight_norm); derive a "
        "class for other changes."
    )


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)
    place = (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
    return (*place, tensor.is_conj(), tensor.is_neg())  # which are bits of a view, not of what is in memory


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
    if isinstance(entry, str):
        if stored_as is None:
            raise ValueError("a tensor has a checksum and no entry")
        return _counted(Encoding(*stored_as, 0), entry_bytes(*stored_as), entry)
    _refuse_unknown(_typed(entry, dict))
    dtype, shape, bits = _typed(entry["dtype"], str), entry["shape"], None
    if dtype not in DTYPES or not is_shape(shape):
        raise ValueError(f"dtype {dtype!r}, shape {shape!r}"[:200])
    if "bits" in entry:
        bits = (_typed(entry["bits"], int), _typed(entry["offset"], int))
        if not 0 <= bits[0] <= 8 * DTYPES[dtype].itemsize or not (is_integer(DTYPES[dtype]) or "coder" in entry):
            raise ValueError(f"{bits[0]} bits for {dtype}")
        limits = np.iinfo(number_dtype(DTYPES[dtype]))
        if not limits.min <= bits[1] <= limits.max:
            raise ValueError(f"offset {bits[1]} for {dtype}"[:200])
    bitmap = _typed(entry.get("bitmap", False), bool)
    mask, gaps, coder = (entry.get(name) for name in ("mask", "gaps", "coder"))
    encoding = Encoding(dtype, tuple(shape), 0, bits, bitmap, mask, gaps, coder)
    if bitmap + (mask is not None) + (gaps is not None) > 1 or (bits is None and coder is not None):
        raise ValueError("a tensor has too many encodings")
    if stored_as is not None:
        return _counted(encoding, entry_bytes(*stored_as), _typed(entry["checksum"], str))
    nbytes = _typed(entry["bytes"], int)
    if nbytes < 0:
        raise ValueError(f"{nbytes} bytes")
    return _counted(encoding, nbytes, None)


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
