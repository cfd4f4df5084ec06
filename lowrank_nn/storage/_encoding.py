"""How the bytes of one tensor are to be read: whole, as few bits per integer, without its zeros, coded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from lowrank_nn.storage._bits import Values, packed_length

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
SYMBOL_BITS = 8  # a coded symbol is a byte; of wider values the upper byte is coded


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
        gaps: Name of the coder of the distances between the entries that are not zero, which come before the values,
            which are theirs alone; None: there are no distances.
        coder: Name of the coder of the values (of the upper 8 bits of wider ones); None: they are not coded.
    """

    dtype: str
    shape: tuple[int, ...]
    kept: int
    bits: tuple[int, int] | None = None
    bitmap: bool = False
    mask: str | None = None
    gaps: str | None = None
    coder: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the bytes are those of the tensor in memory."""
        return self.bits is None and not self.bitmap and self.mask is None and self.gaps is None

    @property
    def coded(self) -> bool:
        """Whether the values decide how many bytes are stored."""
        return self.gaps is not None or self.coder is not None

    @property
    def numel(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def plain_bits(self) -> int:
        """Bits that each stored value takes outside coded blocks."""
        if self.bits is None:
            return 8 * DTYPES[self.dtype].itemsize
        return self.bits[0] if self.coder is None else max(self.bits[0] - SYMBOL_BITS, 0)

    @property
    def plain_bytes(self) -> int:
        """Number of bytes stored outside coded blocks."""
        bitmap = packed_length(self.numel, 1) if self.bitmap else 0
        return bitmap + packed_length(self.kept, self.plain_bits)

    def stored_as(self, nbytes: int) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape under which a plain safetensors reader sees ``nbytes`` stored bytes."""
        if self.whole:
            return (self.dtype, self.shape)
        if self.bits is None and not self.bitmap and self.gaps is None:
            return (self.dtype, (self.kept,))
        return ("U8", (nbytes,))


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


def is_integer(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype can take fewer bits than their dtype: integers and bools."""
    return not dtype.is_floating_point and not dtype.is_complex


def numbers_of(tensor: Tensor) -> Values:
    """Return the entries in order as integers: themselves, or of a float the bits (so that -0.0 is not a zero)."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(number_dtype(tensor.dtype))


def number_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the dtype of :func:`numbers_of`."""
    signed = is_integer(dtype) and dtype.is_signed
    return np.dtype(f"<{'i' if signed else 'u'}{dtype.itemsize}")


def marked_by(mask: Tensor, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which entries of a tensor of that shape ``mask`` keeps, flat."""
    marked: NDArray[np.bool_] = mask.detach().cpu().expand(shape).reshape(-1).numpy()
    return marked
