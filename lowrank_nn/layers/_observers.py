"""Which range of values a quantized activation shall cover, decided from a stream of tensors."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.layers._histogram import Floats, Histogram

ObserverName = Literal["minmax", "percentile", "mse", "entropy"]

PERCENTILE = 99.99
ROUNDS = 20
SHARES: Floats = np.linspace(0.02, 1.0, 99)


def value_range(x: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest entry of a layer's input; (inf, -inf) where it is empty.

    Raises:
        CalibrationError: ``x`` is not a floating-point tensor, or holds NaN or infinite values.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise CalibrationError(f"calibration: expected floating-point tensors, got {what}.")
    if x.numel() == 0:
        return math.inf, -math.inf
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError(
            "calibration: there are NaN or infinite values. Look for the damaged sample, or the layer before "
            "that overflows."
        )
    return low, high


class Observer(abc.ABC):
    """Watches tensors and chooses the range that their quantized form covers."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def observe(self, x: Tensor) -> None:
        """Take the entries of ``x`` into account; memory does not grow with their number.

        Args:
            x: Values, of any shape, floating-point dtype and device.

        Raises:
            CalibrationError: ``x`` is not a floating-point tensor, or holds NaN or infinite values.
        """
        low, high = value_range(x)
        if low > high:
            return
        x = x.detach()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._count(x)

    def range(self) -> tuple[float, float]:
        """Return the chosen (min, max); it includes 0.

        Raises:
            CalibrationError: Nothing was observed.
        """
        if self.low > self.high:
            raise CalibrationError("calibration: no values were seen. Pass at least one tensor that is not empty.")
        low, high = self._choose()
        return (min(low, 0.0), max(high, 0.0))

    @abc.abstractmethod
    def _count(self, x: Tensor) -> None:
        """Take in what this kind of observer needs beyond the extremes."""

    @abc.abstractmethod
    def _choose(self) -> tuple[float, float]:
        """Return the range; at least one value was seen."""


class MinMaxObserver(Observer):
    """The range of all values seen: nothing is clipped."""

    def _count(self, x: Tensor) -> None:
        """Nothing: the extremes are enough."""

    def _choose(self) -> tuple[float, float]:
        return (self.low, self.high)


class _HistogramObserver(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.histogram = Histogram()

    def _count(self, x: Tensor) -> None:
        self.histogram.add(x, self.low, self.high)


class PercentileObserver(_HistogramObserver):
    """The range between two percentiles, ``percentile`` and 100 - ``percentile``; what lies beyond is clipped.

    Exact to the width of a histogram bin, at most 1/1023 of the range of all values.

    Args:
        percentile: Upper percentile, above 50 and at most 100.
    """

    def __init__(self, percentile: float = PERCENTILE) -> None:
        super().__init__()
        if not 50 < percentile <= 100:
            raise OptionError(f"percentile: must be above 50 and at most 100, got {percentile}.")
        self.percentile = percentile

    def _choose(self) -> tuple[float, float]:
        low, high = (self._quantile(share) for share in (1 - self.percentile / 100, self.percentile / 100))
        return (max(low, self.low), min(high, self.high))

    def _quantile(self, share: float) -> float:
        edges, counts = self.histogram.edges(), self.histogram.counts.numpy()
        # The zeros stand between the bins below 0 and those from 0 on, as a bin without width.
        at = -self.histogram.first
        edges, counts = np.insert(edges, at, 0.0), np.insert(counts, at, self.histogram.zeros)
        passed = np.concatenate([[0], np.cumsum(counts)])
        return float(np.interp(share * passed[-1], passed, edges))


class _SearchingObserver(_HistogramObserver):
    """The range that minimises an error of the histogram.

    Each end is tried at 99 shares of the largest value on its side: first both together, then each by itself, in turn,
    until neither moves.

    Args:
        bits: Bits of the quantized values.
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.levels = 2**bits - 1

    def _choose(self) -> tuple[float, float]:
        edges, counts = self.histogram.edges(), self.histogram.counts.numpy()
        kept = counts > 0
        if not kept.any():  # zeros alone
            return (self.low, self.high)
        centers: Floats = ((edges[:-1] + edges[1:]) / 2)[kept].clip(self.low, self.high)
        weights: Floats = counts[kept].astype(np.float64)
        lows, highs = SHARES * min(self.low, 0.0), SHARES * max(self.high, 0.0)
        best = int(np.argmin(self._errors(lows, highs, centers, weights)))
        low, high = best, best
        for _ in range(ROUNDS):
            previous = (low, high)
            low = int(np.argmin(self._errors(lows, highs[high], centers, weights)))
            high = int(np.argmin(self._errors(lows[low], highs, centers, weights)))
            if (low, high) == previous:
                break
        return (float(lows[low]), float(highs[high]))

    def _errors(self, lows: Floats, highs: Floats, centers: Floats, weights: Floats) -> Floats:
        """Return the error of each pair of ends, which broadcast against each other."""
        low, high = (ends[:, None] for ends in np.broadcast_arrays(lows, highs))
        step = np.maximum(high - low, np.finfo(np.float64).tiny) / self.levels
        zero = np.round(-low / step)
        codes = np.clip(np.round(centers / step) + zero, 0, self.levels)
        inside = (low <= centers) & (centers <= high)
        return self._error((codes - zero) * step - centers, codes.astype(np.int64), inside, weights)

    @abc.abstractmethod
    def _error(self, changes: Floats, codes: NDArray[np.int64], inside: NDArray[np.bool_], weights: Floats) -> Floats:
        """Return the error of each range.

        Args:
            changes: What quantization adds to the values of each bin, shape (ranges, bins).
            codes: The integers that stand for them, likewise.
            inside: Whether the bins lie in the range, likewise.
            weights: Count of each bin, shape (bins,); all above 0.
        """


class MSEObserver(_SearchingObserver):
    """The range that minimises the mean squared error of quantization: clipping error against rounding error.

    Args:
        bits: Bits of the quantized values.
    """

    def _error(self, changes: Floats, codes: NDArray[np.int64], inside: NDArray[np.bool_], weights: Floats) -> Floats:
        errors: Floats = np.square(changes) @ weights
        return errors


class EntropyObserver(_SearchingObserver):
    r"""The range that minimises the relative entropy of the quantized values to the clipped ones.

    .. math:: D(P \| Q) = \sum_j p_j \log (p_j / q_j)

    over the bins that hold something: P counts what is clipped in the outermost bins of the range, Q spreads what a
    level of the grid stands for evenly over its bins, without what is clipped.

    Args:
        bits: Bits of the quantized values.

    References:
        Migacz 2017, "8-bit Inference with TensorRT".
    """

    def _error(self, changes: Floats, codes: NDArray[np.int64], inside: NDArray[np.bool_], weights: Floats) -> Floats:
        rows = np.arange(len(codes))
        index = codes + (self.levels + 1) * rows[:, None]
        seen = inside * weights
        held, bins = (np.bincount(index.ravel(), part.ravel().astype(np.float64))[index] for part in (seen, inside))
        first, last = inside.argmax(1), inside.shape[1] - 1 - inside[:, ::-1].argmax(1)
        clipped = seen.copy()
        clipped[rows, first] += np.cumsum(weights)[first] - weights[first]
        clipped[rows, last] += np.cumsum(weights[::-1])[::-1][last] - weights[last]
        known = np.maximum(seen.sum(1, keepdims=True), 1e-300)
        p, q = clipped / weights.sum(), held / np.maximum(bins, 1) / known
        terms = np.where(inside, p * np.log(np.where(inside, p / np.where(inside, q, 1), 1)), 0.0)
        divergence: Floats = np.where(inside.any(1), terms.sum(1), np.inf)
        return divergence


OBSERVERS: dict[ObserverName, Callable[[int], Observer]] = {
    "minmax": lambda bits: MinMaxObserver(),
    "percentile": lambda bits: PercentileObserver(),
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}
"""Observers by the name that options give them, as functions of the bits of the quantized values."""


def make_observer(name: ObserverName, bits: int) -> Observer:
    """Return a new observer.

    Args:
        name: ``"minmax"``, ``"percentile"`` (99.99 % at either end), ``"mse"`` or ``"entropy"``.
        bits: Bits of the quantized values.

    Raises:
        OptionError: There is no such observer.
    """
    if name not in OBSERVERS:
        raise OptionError(f"observer: must be one of {', '.join(map(repr, OBSERVERS))}, got {name!r}.")
    return OBSERVERS[name](bits)
