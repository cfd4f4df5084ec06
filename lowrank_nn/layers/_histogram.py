"""Counts of values in bins that widen as they must, so that a stream of tensors is taken in with bounded memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

BINS = 2048
CHUNK = 1 << 22  # entries binned at a time: bounds the memory of the indices
SMALLEST_EXPONENT = -1000


class Histogram:
    """Counts of values in at most 2048 bins whose width is a power of two and doubles when the values outgrow it.

    Bin j holds the values in [j, j + 1) * width. Two neighbours merge into one without splitting any count, so the
    result is exact and depends neither on the order of the values nor on how they came in batches. Exact zeros are
    counted apart: they are exact on every grid.

    Attributes:
        exponent: log2 of the bin width.
        first: Index j of the first bin.
        counts: Count per bin, int64, on the CPU.
        zeros: Count of values that are exactly 0.
    """

    def __init__(self) -> None:
        self.exponent: int = SMALLEST_EXPONENT
        self.first = 0
        self.counts = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.zeros = 0
        self._low = self._high = 0.0

    def add(self, x: Tensor, low: float, high: float) -> None:
        """Count the entries of ``x``, all of which lie in [low, high]."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._widen()
        # Exact in float32 too, as the width is a power of two; unless it is out of float32's range.
        wide = torch.float64 if self.exponent < -100 else torch.promote_types(x.dtype, torch.float32)
        flat = x.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            chunk = flat[start : start + CHUNK]
            kept = chunk[chunk != 0].to(wide)
            self.zeros += chunk.numel() - kept.numel()
            index = torch.floor(kept * math.ldexp(1.0, -self.exponent)).to(torch.int64) - self.first
            self.counts += torch.bincount(index, minlength=self.counts.numel()).cpu()

    def edges(self) -> Floats:
        """Return the borders of the bins, one more than there are bins."""
        count = self.counts.numel()
        edges: Floats = np.arange(self.first, self.first + count + 1, dtype=np.float64)
        return edges * math.ldexp(1.0, self.exponent)

    def _bounds(self, exponent: int) -> tuple[int, int]:
        return math.floor(math.ldexp(self._low, -exponent)), math.floor(math.ldexp(self._high, -exponent))

    def _widen(self) -> None:
        span = self._high - self._low
        exponent = max(self.exponent, math.frexp(span)[1] - BINS.bit_length() if span else SMALLEST_EXPONENT)
        first, last = self._bounds(exponent)
        while last - first >= BINS:
            exponent += 1
            first, last = self._bounds(exponent)
        counts = torch.zeros(last - first + 1, dtype=torch.int64, device="cpu")
        old = torch.arange(self.first, self.first + self.counts.numel(), device="cpu") >> min(
            exponent - self.exponent, 63
        )
        counts.index_add_(0, old - first, self.counts)
        self.exponent, self.first, self.counts = exponent, first, counts
