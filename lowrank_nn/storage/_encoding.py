"""How one tensor becomes bytes: whole, as few bits per integer, without its zeros, or without what a mask drops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.layers import Packing
from lowrank_nn.storage._bits import pack_bits, packed_length, unpack_bits, width_and_offset

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that a file can hold, by their names in the safetensors format."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_COST = 64  # about what the header grows by where a tensor is not stored whole: saving less is no saving


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How one tensor is stored.

    Attributes:
        dtype: Dtype of the tensor, by its name in the safetensors format.
        shape: Shape of the tensor.
        kept: Number of entries whose values are stored.
        bits: Width and offset of the stored values; None: they are stored as they are in memory.
        bitmap: Whether a bitmap of the entries that are not zero comes before the values, which are theirs alone.
        mask: Key of the bool tensor that marks the entries whose values are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    kept: int
    bits: tuple[int, int] | None = None
    bitmap: bool = False
    mask: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the bytes are those of the tensor in memory."""
        return self.bits is None and not self.bitmap and self.mask is None

    @property
    def numel(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes stored."""
        front = packed_length(self.numel, 1) if self.bitmap else 0
        if self.bits is not None:
            return front + packed_length(self.kept, self.bits[0])
        return front + self.kept * DTYPES[self.dtype].itemsize

    @property
    def stored_as(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape under which a plain safetensors reader sees the bytes."""
        if self.whole:
            return (self.dtype, self.shape)
        if self.bits is None and not self.bitmap:
            return (self.dtype, (self.kept,))
        return ("U8", (self.nbytes,))


def choose_encoding(
    tensor: Tensor, packing: Packing | None = None, mask: Tensor | None = None, mask_key: str | None = None
) -> Encoding:
    """Return the encoding of ``tensor`` that takes the fewest bytes, or the one its layer declares; all are exact.

    Args:
        tensor: The tensor to store, on any device.
        packing: What its layer says about it. The bits it names are used wherever the values fit in them, so that
            the layer knows its size without looking at the values.
        mask: Bool tensor that marks the entries that matter, broadcastable to the shape of ``tensor``.
        mask_key: Name under which ``mask`` is stored.
    """
    name, shape = NAMES[tensor.dtype], tuple(tensor.shape)
    numbers = _numbers(tensor)
    if mask is not None:
        numbers = numbers[_marked(mask, shape)]
    base = Encoding(name, shape, numbers.size, mask=mask_key if mask is not None else None)
    declared = packing.bits if packing is not None else None
    if declared is not None and _is_integer(tensor.dtype):
        width, offset = width_and_offset(numbers)
        if width <= declared:
            narrow = declared < tensor.dtype.itemsize * 8
            return dataclasses.replace(base, bits=(declared, offset)) if narrow else base
    candidates = [base, *_integer_encoding(base, numbers)]
    if mask is None:
        nonzero = numbers[numbers != 0] if _is_integer(tensor.dtype) else numbers[: np.count_nonzero(numbers)]
        sparse = dataclasses.replace(base, kept=nonzero.size, bitmap=True)
        candidates += [sparse, *_integer_encoding(sparse, nonzero)]
    return min(candidates, key=lambda c: c.nbytes + (0 if c is base else HEADER_COST))


def encode(tensor: Tensor, encoding: Encoding, mask: Tensor | None = None) -> NDArray[np.uint8]:
    """Return the bytes of ``tensor``; without a copy where it is stored whole and lies in CPU memory in order."""
    numbers = _numbers(tensor)
    parts: list[NDArray[np.uint8]] = []
    if mask is not None:
        numbers = numbers[_marked(mask, encoding.shape)]
    if encoding.bitmap:
        marked = numbers != 0
        parts.append(np.packbits(marked, bitorder="little"))
        numbers = numbers[marked]
    parts.append(pack_bits(numbers, *encoding.bits) if encoding.bits is not None else numbers.view(np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def decode(encoding: Encoding, payload: Tensor, mask: Tensor | None = None) -> Tensor:
    """Undo :func:`encode`.

    Args:
        encoding: How the tensor is stored; ``kept`` is read from the mask or bitmap, not trusted.
        payload: The stored bytes, a flat uint8 tensor on the CPU. The result may share its memory.
        mask: The decoded tensor that ``encoding.mask`` names.

    Returns:
        The tensor on the CPU. Entries that were not stored are zero.

    Raises:
        FileFormatError: The number of bytes is not the one that the encoding needs, or a bool is neither 0 nor 1.
    """
    dtype = DTYPES[encoding.dtype]
    if encoding.whole:
        _check_length(encoding, payload)
        tensor = _typed(payload, dtype)
    else:
        tensor = _decode_packed(encoding, payload, mask)
    if dtype is torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise FileFormatError("holds bools that are neither 0 nor 1")
    return tensor.reshape(encoding.shape)


def tensor_bytes(tensor: Tensor, packing: Packing | None = None, mask: Tensor | None = None) -> int:
    """Return the bytes that ``save`` writes for the values of one tensor, its share of the header left out.

    Args:
        tensor: The tensor, on any device but meta.
        packing: What its layer says about it (``layer.packing()``).
        mask: The bool tensor that ``packing.mask`` names.

    Raises:
        OptionError: The tensor has a dtype that a file cannot hold, or no values (meta device).
    """
    problem = unstorable(tensor)
    if problem is not None:
        raise OptionError(f"tensor_bytes: the tensor {problem}")
    return choose_encoding(tensor, packing, mask, "mask" if mask is not None else None).nbytes


def unstorable(tensor: Tensor) -> str | None:
    """Return why a file cannot hold ``tensor``, to be put after its name, or None."""
    if is_lazy(tensor):
        return "has no values yet. Run the model once first."
    if tensor.is_meta:
        return "is on the meta device and has no values. Move the model to a real device and fill it first."
    if tensor.layout is not torch.strided or type(tensor.detach()) is not Tensor:
        return f"is not an ordinary dense tensor ({type(tensor).__name__}, {tensor.layout}). Convert it first."
    if tensor.dtype not in NAMES:
        return f"has dtype {tensor.dtype}, expected one of {', '.join(str(d) for d in NAMES)}. Convert it first."
    return None


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """Return the entries in order as integers: themselves, or of a float the bits (so that -0.0 is not a zero)."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(_number_dtype(tensor.dtype))


def _number_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    signed = _is_integer(dtype) and dtype.is_signed
    return np.dtype(f"<{'i' if signed else 'u'}{dtype.itemsize}")


def _marked(mask: Tensor, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    marked: NDArray[np.bool_] = mask.detach().cpu().expand(shape).reshape(-1).numpy()
    return marked


def _integer_encoding(base: Encoding, numbers: NDArray[Any]) -> list[Encoding]:
    dtype = DTYPES[base.dtype]
    if not _is_integer(dtype):
        return []
    width, offset = width_and_offset(numbers)
    return [dataclasses.replace(base, bits=(width, offset))] if width < dtype.itemsize * 8 else []


def _typed(payload: Tensor, dtype: torch.dtype) -> Tensor:
    # A view needs bytes that start at a multiple of the item size.
    aligned = payload if payload.storage_offset() % dtype.itemsize == 0 else payload.clone()
    return aligned.view(dtype)


def _check_length(encoding: Encoding, payload: Tensor) -> None:
    if payload.numel() != encoding.nbytes:
        raise FileFormatError(f"takes {encoding.nbytes} bytes, but {payload.numel()} are stored")


def _decode_packed(encoding: Encoding, payload: Tensor, mask: Tensor | None) -> Tensor:
    dtype = DTYPES[encoding.dtype]
    numbers = np.zeros(encoding.numel, _number_dtype(dtype))
    marked: NDArray[np.bool_] | slice = slice(None)
    front = packed_length(encoding.numel, 1) if encoding.bitmap else 0
    if encoding.bitmap:
        if payload.numel() < front:
            raise FileFormatError(f"takes at least {front} bytes, but {payload.numel()} are stored")
        bitmap = np.unpackbits(payload[:front].numpy(), count=encoding.numel, bitorder="little")
        marked = bitmap.astype(np.bool_)
    elif mask is not None:
        marked = _marked(mask, encoding.shape)
    kept = numbers[marked].size
    _check_length(dataclasses.replace(encoding, kept=kept), payload)
    values = payload[front:]
    if encoding.bits is not None:
        numbers[marked] = unpack_bits(values.numpy(), kept, *encoding.bits, numbers.dtype)
    else:
        numbers[marked] = values.clone().numpy().view(numbers.dtype)
    return torch.from_numpy(numbers.view(np.uint8)).view(dtype)
