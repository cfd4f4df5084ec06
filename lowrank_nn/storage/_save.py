"""Writing a compressed model to one file, and counting its bytes without writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lowrank_nn.errors import OptionError
from lowrank_nn.layers import Packing
from lowrank_nn.storage._bits import Bytes
from lowrank_nn.storage._choose import choose_encoding
from lowrank_nn.storage._collect import describe_layers, packings, state_tensors
from lowrank_nn.storage._container import RESERVED, digest, make_file, write_file
from lowrank_nn.storage._encoding import DTYPES, Encoding, unstorable
from lowrank_nn.storage._folds import identity_paths
from lowrank_nn.storage._payload import encode
from lowrank_nn.storage._resized import describe_resized
from lowrank_nn.storage._structure import StoredTensor, Structure

Coding = Literal["auto", "max", "huffman", "none"]
LISTED_BYTES = 1 << 14  # an entry of its own takes about 100 bytes of header: one half to one per cent at most
CODER_OF: dict[str, str | None] = {"auto": "rans", "max": "rans", "huffman": "huffman", "none": None}


def save(model: nn.Module, path: str | os.PathLike[str], *, coding: Coding = "auto") -> int:
    """Write ``model`` to one file: its structure as JSON, its tensors as safetensors. No pickle is involved.

    Every tensor of the state dict comes back bit for bit, each in the smallest of several exact encodings: whole,
    integers in as few bits as they need, without its zeros, and, where the layer says so
    (``CompressedLayer.packing``), only the entries that a mask keeps. What is left of integers, masks and the places
    of zeros is entropy coded (rANS) where that saves 2 % of a tensor at least. Tensors that are shared are written
    once. The file appears whole or not at all. Its format is described in ``docs/file_format.md``.

    Args:
        model: Any module, with or without compressed layers in it; itself one perhaps. Not changed.
        path: The file to write; one that exists is replaced.
        coding: ``"auto"`` codes integers and places; ``"max"`` codes the upper bytes of floats too, which saves some
            15 % of float32 and 30 % of bfloat16, and takes ten times as long to load; ``"huffman"`` is ``"auto"``
            with Huffman codes, as Deep Compression had, which never take less; ``"none"`` does not code: every
            tensor takes the bytes that its layer's ``cost()`` counts.

    Returns:
        The bytes written.

    Raises:
        OptionError: ``coding`` is none of these; ``model`` is no module; it cannot be written (meta tensors,
            parametrized modules, layers that are not registered, extra state), listing every reason; or the folder does
            not exist.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"save: expected an nn.Module, got {model!r}: save(model, path).")
    return write_file(Path(path), _drafted(model, coding))


def packed_size(model: nn.Module, *, coding: Coding = "auto") -> int:
    """Return the bytes that :func:`save` would write, header included, without writing them.

    Args:
        model: Any module; not changed.
        coding: As in :func:`save`.

    Raises:
        OptionError: ``coding`` is not one of them, or the model cannot be written.
    """
    return sum(part.nbytes for part in _drafted(model, coding))


def stored_bytes(model: nn.Module, *, coding: Coding = "auto") -> dict[str, int]:
    """Return the bytes that :func:`save` writes for the values of each tensor, by state-dict key.

    A tensor with several keys counts under the first alone. The sum is :func:`packed_size` less the header.

    Args:
        model: Any module; not changed.
        coding: As in :func:`save`.

    Raises:
        OptionError: ``coding`` is not one of them, or the model cannot be written.
    """
    tensors, tied = state_tensors(model)
    return {key: payload.nbytes for key, (_, payload) in _encoded(model, tensors, tied, coding).items()}


def tensor_bytes(
    tensor: Tensor, packing: Packing | None = None, mask: Tensor | None = None, *, coding: Coding = "auto"
) -> int:
    """Return the bytes that :func:`save` writes for the values of one tensor, its share of the header left out.

    Args:
        tensor: The tensor, on any device but meta.
        packing: What its layer says about it (``layer.packing()``).
        mask: The bool tensor that ``packing.mask`` names.
        coding: As in :func:`save`.

    Raises:
        OptionError: The tensor has a dtype that a file cannot hold, or no values (meta device); or ``coding`` is not
            one of them.
    """
    problem = unstorable(tensor)
    if problem is not None:
        raise OptionError(f"tensor_bytes: the tensor {problem}")
    mask_key = "mask" if mask is not None else None
    encoding = choose_encoding(tensor, packing, mask, mask_key, _coder(coding), coding == "max")
    return encode(tensor, encoding, mask).nbytes


def _drafted(model: nn.Module, coding: Coding) -> list[Bytes]:
    """Return the parts of the file, in order."""
    layers = describe_layers(model)
    tensors, tied = state_tensors(model)
    encoded = _encoded(model, tensors, tied, coding)
    stored, listed, gathered = {}, {}, []
    for key, (encoding, payload) in encoded.items():
        large = payload.nbytes >= LISTED_BYTES and key not in RESERVED
        stored[key] = StoredTensor(encoding, payload.nbytes, digest(payload) if large else None)
        if large:
            listed[key] = (encoding.stored_as(payload.nbytes), payload)
        else:
            gathered.append(payload)
    # Wide items first, so that every entry starts at a multiple of its item size.
    order = sorted(listed, key=lambda key: (-DTYPES[listed[key][0][0]].itemsize, key))
    structure = Structure(layers, tied, stored, identity_paths(model), describe_resized(model))
    return make_file(structure.to_json(), {key: listed[key] for key in order}, gathered)


def _encoded(
    model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], coding: Coding
) -> dict[str, tuple[Encoding, Bytes]]:
    coder = _coder(coding)
    hints = packings(model)
    encoded = {}
    for key, tensor in tensors.items():
        hint = hints.get(key, Packing())
        mask_key = tied.get(hint.mask, hint.mask) if hint.mask is not None else None
        mask = tensors.get(mask_key) if mask_key is not None else None
        encoding = choose_encoding(tensor, hint, mask, mask_key, coder, coding == "max")
        encoded[key] = (encoding, encode(tensor, encoding, mask))
    return encoded


def _coder(coding: Coding) -> str | None:
    if coding not in CODER_OF:
        raise OptionError(f"coding={coding!r} is not one of {', '.join(map(repr, CODER_OF))}.")
    return CODER_OF[coding]
