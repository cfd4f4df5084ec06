"""Writing a compressed model to one file, and counting its bytes without writing."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_nn.layers import Packing
from lowrank_nn.storage._container import digest, make_header, write_file
from lowrank_nn.storage._encoding import DTYPES, Encoding, choose_encoding, encode
from lowrank_nn.storage._structure import LayerEntry, StoredTensor, Structure, describe_layers, packings, state_tensors


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A model, described but not yet turned into bytes; the encodings are in file order."""

    layers: tuple[LayerEntry, ...]
    tied: dict[str, str]
    tensors: dict[str, Tensor]
    encodings: dict[str, Encoding]

    def mask_of(self, key: str) -> Tensor | None:
        mask = self.encodings[key].mask
        return None if mask is None else self.tensors[mask]

    def payload(self, key: str) -> NDArray[np.uint8]:
        return encode(self.tensors[key], self.encodings[key], self.mask_of(key))

    def header(self, digests: dict[str, str]) -> bytes:
        stored = {key: StoredTensor(encoding, digests[key]) for key, encoding in self.encodings.items()}
        structure = Structure(self.layers, self.tied, stored)
        return make_header(structure.to_json(), {key: e.stored_as for key, e in self.encodings.items()})


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write ``model`` to one file: its structure as JSON, its tensors as safetensors. No pickle is involved.

    Every tensor of the state dict comes back bit for bit, each in the smallest of several exact encodings: whole,
    integers in as few bits as they need, without its zeros, and, where the layer says so
    (``CompressedLayer.packing``), only the entries that a mask keeps. Tensors that are shared are written once. The
    file appears whole or not at all. Its format is described in ``docs/file_format.md``.

    Args:
        model: Any module, with or without compressed layers in it; itself one perhaps. Not changed.
        path: The file to write; one that exists is replaced.

    Returns:
        The bytes written.

    Raises:
        OptionError: The model cannot be written (meta tensors, parametrized modules, layers that are not registered,
            extra state), listing every reason; or the folder does not exist.
    """
    draft = _draft(model)
    payloads = {key: draft.payload(key) for key in draft.encodings}
    header = draft.header({key: digest(payload) for key, payload in payloads.items()})
    return write_file(Path(path), header, list(payloads.values()))


def packed_size(model: nn.Module) -> int:
    """Return the bytes that :func:`save` would write, header included, without writing them.

    Args:
        model: Any module; not changed.

    Raises:
        OptionError: The model cannot be written.
    """
    draft = _draft(model)
    header = draft.header({key: digest(draft.payload(key)) for key in draft.encodings})
    return len(header) + sum(encoding.nbytes for encoding in draft.encodings.values())


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes that :func:`save` writes for the values of each tensor, by state-dict key.

    A tensor with several keys counts under the first alone. The sum is :func:`packed_size` less the header.

    Args:
        model: Any module; not changed.

    Raises:
        OptionError: The model cannot be written.
    """
    draft = _draft(model)
    return {key: draft.encodings[key].nbytes for key in draft.tensors}


def _draft(model: nn.Module) -> _Draft:
    layers = describe_layers(model)
    tensors, tied = state_tensors(model)
    hints = packings(model)
    encodings: dict[str, Encoding] = {}
    for key, tensor in tensors.items():
        hint = hints.get(key, Packing())
        mask_key = tied.get(hint.mask, hint.mask) if hint.mask is not None else None
        mask = tensors.get(mask_key) if mask_key is not None else None
        encodings[key] = choose_encoding(tensor, hint, mask, mask_key)
    # Wide items first, so that every entry starts at a multiple of its item size.
    order = sorted(encodings, key=lambda key: (-DTYPES[encodings[key].stored_as[0]].itemsize, key))
    return _Draft(layers, tied, tensors, {key: encodings[key] for key in order})
