"""Which encoding of a tensor takes the fewest bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lowrank_nn.layers import Packing
from lowrank_nn.storage._bits import Values, packed_length, width_and_offset
from lowrank_nn.storage._coders import CODERS
from lowrank_nn.storage._encoding import DTYPES, NAMES, Encoding, is_integer, marked_by, numbers_of
from lowrank_nn.storage._frequencies import count_symbols
from lowrank_nn.storage._gaps import to_gaps
from lowrank_nn.storage._payload import GAP_COUNT, symbols_of

HEADER_COST = 64  # about what the header grows by where a tensor is not stored whole: saving less is no saving
WORTH = 0.98  # what coding must at least take off to be worth the time of decoding
MIN_ZEROS = 1 / 8  # share of zeros below which gaps cannot save that: not worth looking


def choose_encoding(
    tensor: Tensor,
    packing: Packing | None = None,
    mask: Tensor | None = None,
    mask_key: str | None = None,
    coder: str | None = None,
    floats: bool = False,
) -> Encoding:
    """Return the encoding of ``tensor`` that takes the fewest bytes; all are exact.

    Args:
        tensor: The tensor to store, on any device.
        packing: What its layer says about it. The bits it names are used wherever the values fit in them, so that
            the layer knows its size without looking at the values; only coding can make it smaller.
        mask: Bool tensor that marks the entries that matter, broadcastable to the shape of ``tensor``.
        mask_key: Name under which ``mask`` is stored.
        coder: Coder that may be used, where it saves 2 % at least; None for no coding.
        floats: Whether the upper bytes of floats may be coded too.
    """
    numbers = numbers_of(tensor)
    if mask is not None:
        numbers = numbers[marked_by(mask, tuple(tensor.shape))]
    base = Encoding(NAMES[tensor.dtype], tuple(tensor.shape), numbers.size, mask=mask_key if mask is not None else None)
    nonzero = None if mask is not None else _nonzero(numbers, floats or is_integer(tensor.dtype))
    best = _declared(base, numbers, packing)
    if best is None:
        best = min(_plain(base, numbers, nonzero), key=_cost)
    coded = {} if coder is None else dict(_coded(base, numbers, nonzero, coder, floats))
    if not coded:
        return best
    smallest = min(coded, key=lambda encoding: coded[encoding])
    return smallest if coded[smallest] + HEADER_COST <= WORTH * _cost(best) else best


def _cost(encoding: Encoding) -> int:
    return encoding.plain_bytes + (0 if encoding.whole else HEADER_COST)


def _declared(base: Encoding, numbers: Values, packing: Packing | None) -> Encoding | None:
    """Return the encoding that a layer counts on, or None where it counts on none or the values do not fit."""
    if packing is None or packing.bits is None or not is_integer(DTYPES[base.dtype]):
        return None
    width, offset = width_and_offset(numbers)
    if width > packing.bits:
        return None
    return dataclasses.replace(base, bits=(packing.bits, offset)) if packing.bits < base.plain_bits else base


def _plain(base: Encoding, numbers: Values, nonzero: Values | None) -> Iterator[Encoding]:
    yield base
    yield from _in_bits(base, numbers)
    if nonzero is not None:
        sparse = dataclasses.replace(base, kept=nonzero.size, bitmap=True)
        yield sparse
        yield from _in_bits(sparse, nonzero)


def _coded(
    base: Encoding, numbers: Values, nonzero: Values | None, coder: str, floats: bool
) -> Iterator[tuple[Encoding, int]]:
    """Yield encodings with a coded part, and about how many bytes they take."""
    yield from _coded_values(base, numbers, coder, floats)
    if nonzero is None or (base.dtype != "BOOL" and numbers.size - nonzero.size < MIN_ZEROS * numbers.size):
        return
    gaps = to_gaps(numbers != 0)
    front = GAP_COUNT + _coded_size(gaps, coder)
    sparse = dataclasses.replace(base, kept=nonzero.size, gaps=coder)
    for encoding in (sparse, *_in_bits(sparse, nonzero)):
        yield encoding, front + encoding.plain_bytes
    for encoding, size in _coded_values(sparse, nonzero, coder, floats):
        yield encoding, front + size


def _in_bits(base: Encoding, numbers: Values) -> list[Encoding]:
    if not is_integer(DTYPES[base.dtype]):
        return []
    width, offset = width_and_offset(numbers)
    return [dataclasses.replace(base, bits=(width, offset))] if width < base.plain_bits else []


def _coded_values(base: Encoding, numbers: Values, coder: str, floats: bool) -> list[tuple[Encoding, int]]:
    dtype = DTYPES[base.dtype]
    if dtype.is_floating_point and floats:
        bits = (base.plain_bits, 0)
    elif is_integer(dtype) and dtype is not torch.bool:  # what gaps say of bools is all there is to say
        bits = width_and_offset(numbers)
    else:
        return []
    if bits[0] == 0:
        return []
    encoding = dataclasses.replace(base, bits=bits, coder=coder)
    size = _coded_size(symbols_of(numbers, bits), coder)
    return [(encoding, size + packed_length(encoding.kept, encoding.plain_bits))]


def _coded_size(symbols: Values, coder: str) -> int:
    return CODERS[coder].coded_size(count_symbols(symbols)) if symbols.size else 0


def _nonzero(numbers: Values, values_matter: bool) -> Values:
    """Return the entries that are not zero, or, without a copy, as many others."""
    return numbers[numbers != 0] if values_matter else numbers[: np.count_nonzero(numbers)]
