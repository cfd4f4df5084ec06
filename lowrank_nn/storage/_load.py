"""Reading a file back into a fresh model, after everything in it has been checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.graph import release_fast_path
from lowrank_nn.storage._fit import find_misfits
from lowrank_nn.storage._open import OpenFile, open_file
from lowrank_nn.storage._payload import decode
from lowrank_nn.storage._rebuild import CPU, rebuild_layers


def load(
    path: str | os.PathLike[str], fresh_model: nn.Module, *, device: torch.device | str | None = None
) -> nn.Module:
    """Rebuild on ``fresh_model`` the compressed model that :func:`save` wrote, and return it.

    ``fresh_model`` is an ordinary instance of the architecture that was compressed, with any weights. It is used and
    changed: the compressed layers of the file replace its dense ones, batch norms that were folded go, then all weights
    are loaded. The whole file is checked before that (structure, shapes, checksums): a :class:`FileFormatError` leaves
    ``fresh_model`` as it was. Where the model as a whole is one compressed layer, what is returned is another object.

    What the file does not say stays as it is in ``fresh_model``: train / eval flags, hooks, non-persistent buffers,
    which tensors are shared, memory formats, and ``requires_grad`` (the tensors of a rebuilt layer take the flags of
    the weight and bias they replace). A rebuilt layer has the floating-point dtypes that it was saved with; all
    other tensors must have those of the file already. Nothing in the file is executed or imported: classes are
    looked up in ``lowrank_nn.layers.LAYERS``. No random number is drawn.

    Args:
        path: The file.
        fresh_model: A fresh instance of the architecture; may be on the meta device.
        device: Where the model goes; by default each layer stays where ``fresh_model`` has it, and what is on the
            meta device goes to the CPU.

    Returns:
        The rebuilt model.

    Raises:
        FileFormatError: The file is damaged or does not fit ``fresh_model``; lists everything that is wrong.
        OptionError: ``fresh_model`` is no module.
        OSError: The file cannot be read.
    """
    if not isinstance(fresh_model, nn.Module):
        raise OptionError(f"load: expected an instance of the architecture, got {fresh_model!r}: load(path, MyNet()).")
    file = open_file(path, "load")
    problems = [f"{key!r} does not match its checksum: the file is damaged." for key in file.damaged()]
    problems += find_misfits(file, fresh_model)
    tensors: dict[str, Tensor] = {}
    if not problems:
        tensors, problems = _decode_all(file)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise FileFormatError(
            f"load: {str(path)!r} is damaged or does not fit {type(fresh_model).__name__}. Pass the architecture that "
            f"was compressed, and a whole file:\n{listed}"
        )
    model, _, _ = rebuild_layers(fresh_model, file.structure, fill=True)
    _load_state(model, tensors)
    release_fast_path(model)
    return model if device is None else model.to(device)


def _decode_all(file: OpenFile) -> tuple[dict[str, Tensor], list[str]]:
    structure = file.structure
    decoded: dict[str, Tensor] = {}
    problems = []
    masks_first = sorted(structure.tensors, key=lambda key: structure.tensors[key].encoding.mask is not None)
    for key in masks_first:
        encoding = structure.tensors[key].encoding
        if encoding.mask is not None and encoding.mask not in decoded:
            continue  # the mask is damaged, which is listed
        mask = None if encoding.mask is None else decoded[encoding.mask]
        try:
            decoded[key] = decode(encoding, file.payloads[key], mask)
        except FileFormatError as error:
            problems.append(f"{key!r} {error.message}.")
    if problems:
        return {}, problems
    return {key: decoded[first] for key, first in structure.keys().items()}, []


@torch.no_grad()
def _load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    fresh: dict[int, Tensor] = {}
    for key, table, name in _slots(model):
        tensor, stored = table[name], tensors.get(key)
        if tensor is None or stored is None or (tensor.dtype == stored.dtype and _can_be_filled(tensor)):
            continue
        if id(tensor) not in fresh:
            fresh[id(tensor)] = _empty_like(tensor, stored.dtype)
        table[name] = fresh[id(tensor)]
    state = model.state_dict()  # carries the versions of the modules
    state.update(tensors)
    model.load_state_dict(state)


def _slots(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield where the modules hold parameters and buffers: the key, the table, and the name in it."""
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            yield from ((f"{path}.{name}" if path else name, table, name) for name in table)


def _can_be_filled(tensor: Tensor) -> bool:
    """Whether the tensor has memory, and every entry its own: those of expanded ones are copies of each other."""
    return not tensor.is_meta and all(
        step or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty_like(tensor, dtype=dtype, device=CPU if tensor.is_meta else tensor.device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
