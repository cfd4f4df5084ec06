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
from lowrank_nn.storage._container import digest, make_header, write_file
from lowrank_nn.storage._encoding import DTYPES, Encoding, unstorable
from lowrank_nn.storage._payload import encode
from lowrank_nn.storage._structure import StoredTensor, Structure, describe_layers, packings, state_tensors

Coding = Literal["auto", "none"]
CODER_OF: dict[str, str | None] = {"auto": "rans", "none": None}


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
        coding: ``"auto"`` codes; ``"none"`` does not: every tensor then takes exactly the bytes that its layer's
            ``cost()`` counts, and loading takes no decoding.

    Returns:
        The bytes written.

    Raises:
        OptionError: ``coding`` is neither; the model cannot be written (meta tensors, parametrized modules, layers
            that are not registered, extra state), listing every reason; or the folder does not exist.
    """
    header, payloads = _drafted(model, coding)
    return write_file(Path(path), header, list(payloads.values()))


def packed_size(model: nn.Module, *, coding: Coding = "auto") -> int:
    """Return the bytes that :func:`save` would write, header included, without writing them.

    Args:
        model: Any module; not changed.
        coding: As in :func:`save`.

    Raises:
        OptionError: ``coding`` is not one of them, or the model cannot be written.
    """
    header, payloads = _drafted(model, coding)
    return len(header) + sum(payload.nbytes for payload in payloads.values())


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
    encoding = choose_encoding(tensor, packing, mask, "mask" if mask is not None else None, _coder(coding))
    return encode(tensor, encoding, mask).nbytes


def _drafted(model: nn.Module, coding: Coding) -> tuple[bytes, dict[str, Bytes]]:
    """Return the header, and the payloads in file order."""
    layers = describe_layers(model)
    tensors, tied = state_tensors(model)
    encoded = _encoded(model, tensors, tied, coding)
    stored_as = {key: encoding.stored_as(payload.nbytes) for key, (encoding, payload) in encoded.items()}
    # Wide items first, so that every entry starts at a multiple of its item size.
    order = sorted(encoded, key=lambda key: (-DTYPES[stored_as[key][0]].itemsize, key))
    payloads = {key: encoded[key][1] for key in order}
    stored = {key: StoredTensor(encoding, digest(payload)) for key, (encoding, payload) in encoded.items()}
    header = make_header(Structure(layers, tied, stored).to_json(), {key: stored_as[key] for key in order})
    return header, payloads


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
        encoding = choose_encoding(tensor, hint, mask, mask_key, coder)
        encoded[key] = (encoding, encode(tensor, encoding, mask))
    return encoded


def _coder(coding: Coding) -> str | None:
    if coding not in CODER_OF:
        raise OptionError(f"coding={coding!r} is not one of {', '.join(map(repr, CODER_OF))}.")
    return CODER_OF[coding]
