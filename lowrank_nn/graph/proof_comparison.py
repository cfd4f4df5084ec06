"""Whether two runs of a network give the same tensors, compared one by one so that few are held at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_nn.graph.surgery import Cuts, cut_tensor

OUTPUTS, GRADIENTS, BUFFERS = "the outputs", "the gradients", "the buffers"
KINDS = (OUTPUTS, GRADIENTS, BUFFERS)

TOLERANCE = 1e-4  # relative to the largest entry of the same tensor
_ROUNDING = 1e4  # units of rounding, relative to the largest entry of all tensors of the kind


class Comparison:
    """What a smaller network gives, compared with what a masked one does.

    Args:
        cuts: What the smaller one does not have of gradients and buffers.
    """

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts
        self._left: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        self._measured: dict[str, list[_Measured]] = {kind: [] for kind in KINDS}

    def keep(self, kind: str, name: str, tensor: Tensor) -> None:
        """Keep what the smaller network gives, until it is compared."""
        self._left[kind][name] = tensor

    def compare(self, kind: str, name: str, expected: Tensor) -> None:
        """Compare it with what the masked network gives, and let go of it."""
        dims = {} if kind == OUTPUTS else self._cuts.get(name, {})
        self._measured[kind].append(_measured(cut_tensor(expected, dims), self._left[kind].pop(name, None)))

    def problem(self) -> str:
        """Return what differs, in words: the first kind of several; empty if nothing does."""
        return next((kind for kind in KINDS if self._left[kind] or not _agree(self._measured[kind])), "")

    def undefined(self) -> bool:
        """Whether the masked network gives no number somewhere, and the smaller one does."""
        return any(math.isnan(tensor.error) for measured in self._measured.values() for tensor in measured)


class _Measured(NamedTuple):
    """How far one tensor is from the expected one.

    Attributes:
        size: Largest finite absolute value that is expected; 0 for integers and for no values.
        error: Largest absolute difference; infinite where the two cannot be compared, NaN where no number is expected.
        rounding: Relative rounding error of the dtype.
    """

    size: float
    error: float
    rounding: float


def _measured(expected: Tensor, got: Tensor | None) -> _Measured:
    if got is None or expected.shape != got.shape or expected.dtype != got.dtype:
        return _Measured(_size(expected), torch.inf, 0.0)
    if not (expected.is_floating_point() or expected.is_complex()):
        return _Measured(0.0, 0.0 if torch.equal(expected, got) else torch.inf, 0.0)
    finite, there = torch.isfinite(expected), torch.isfinite(got)
    if torch.equal(finite, there):
        error = _size(torch.where(finite, got - expected, 0))
    else:
        error = torch.nan if (there & ~finite).any() else torch.inf
    return _Measured(_size(expected), error, torch.finfo(expected.dtype).eps)


def _agree(measured: list[_Measured]) -> bool:
    """Whether tensors of one kind are the same up to rounding."""
    largest = max((tensor.size for tensor in measured), default=0.0)
    return all(t.error <= TOLERANCE * t.size + _ROUNDING * t.rounding * largest for t in measured)


def _size(tensor: Tensor) -> float:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return float(torch.where(torch.isfinite(tensor), tensor, 0).abs().max())
