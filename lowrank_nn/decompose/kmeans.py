r"""k-means of numbers: the global optimum by dynamic programming, and Lloyd's algorithm on sorted values.

Clusters of numbers are intervals, so all that is to be found are the places to cut the sorted values, and prefix sums
give the error of any interval at once. The weighted error of the interval (i, j] is

.. math:: \sum_{i < t \le j} w_t x_t^2 - (\sum w_t x_t)^2 / \sum w_t
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.errors import OptionError

Init = Literal["optimal", "linear", "density", "random"]
Floats = NDArray[np.float64]
Cuts = NDArray[np.int64]

POINTS = 2048
"""Places to cut that the dynamic program chooses from; with more distinct values a start for Lloyd's algorithm."""

_SWEEPS = 500
_NO_WEIGHT = 1e-12  # of the largest weight: what prefix sums in float64 cannot tell from nothing


@torch.no_grad()
def kmeans_1d(
    values: Tensor, k: int, *, weights: Tensor | None = None, init: Init = "optimal", seed: int = 0
) -> Tensor:
    r"""Return k centroids that make :math:`\sum_i w_i \min_j (x_i - c_j)^2` small.

    ``"optimal"`` finds the global minimum, by dynamic programming, of up to ``POINTS`` distinct values; of more, the
    program cuts between groups of neighbours (equally wide and equally full ones), and Lloyd's algorithm goes on from
    there. The others are starts of Lloyd's algorithm, which ends in the local minimum next to them: ``"linear"``,
    evenly spaced from the smallest value to the largest; ``"density"``, evenly spaced quantiles; ``"random"``, values
    drawn at random. Of k distinct values or fewer all are centroids.

    Args:
        values: The numbers x, any shape and floating dtype.
        k: Number of centroids, from 1.
        weights: Weight w of each number, not negative, of the shape of ``values``; ones if left out, or if all zero.
        init: Where the search starts.
        seed: Seed of ``"random"``; the global random state is left alone.

    Returns:
        Centroids in ascending order, shape ``(k,)``, on the device of ``values`` and of their dtype, float32 at
        least. The last one is repeated where there are fewer distinct values; a centroid that no value is nearest to
        stays where it started.

    Raises:
        OptionError: ``k`` is below 1, ``init`` is not one of these, there are no values, or weights have another
            shape or negative or infinite entries.

    References:
        Wang, Song, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming", The R Journal
        3 (2011); Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982); Han, Mao, Dally, "Deep
        Compression", ICLR 2016 (the starts); Choi, El-Khamy, Lee, "Towards the limit of network quantization", ICLR
        2017 (the weights).
    """
    if k < 1 or init not in get_args(Init):
        allowed = ", ".join(map(repr, get_args(Init)))
        raise OptionError(f"kmeans_1d: expected k from 1 and init one of {allowed}, got k={k!r}, init={init!r}.")
    points = _gather(values, weights)
    x = points.x
    if x.size <= k:
        found = np.concatenate([x, np.full(k - x.size, x[-1])])
    elif init == "optimal":
        cuts = _candidate_cuts(points)
        chosen = cuts[optimal_cuts(points.sums[:, cuts], k)]
        found = _lloyd(points, _means(points, chosen, np.zeros(k)))
    else:
        found = _lloyd(points, _start(points, k, init, seed))
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.from_numpy(found).to(device=values.device, dtype=wide)


def nearest_centroid(values: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the centroid nearest to each value, int64; half-way between two the lower one.

    Args:
        values: Any shape.
        centroids: In ascending order, shape ``(k,)``.
    """
    wide = torch.promote_types(torch.promote_types(values.dtype, centroids.dtype), torch.float32)
    borders = (centroids[1:].to(wide) + centroids[:-1].to(wide)) / 2
    return torch.bucketize(values.to(wide).contiguous(), borders)


class _Points(NamedTuple):
    """Distinct values in ascending order, their weights, and prefix sums of w, w x and w x^2 (x from their mean)."""

    x: Floats
    w: Floats
    sums: Floats


def _gather(values: Tensor, weights: Tensor | None) -> _Points:
    if values.numel() == 0:
        raise OptionError("kmeans_1d: there are no values to cluster.")
    flat: Floats = values.detach().double().cpu().numpy().reshape(-1)
    heaviness = np.ones(flat.size) if weights is None else _checked_weights(weights, values)
    if heaviness.max() > 0:
        heavy = heaviness > _NO_WEIGHT * heaviness.max()
        flat, heaviness = flat[heavy], heaviness[heavy]
    else:
        heaviness = np.ones(flat.size)
    x, place = np.unique(flat, return_inverse=True)
    w: Floats = np.bincount(place.reshape(-1), weights=heaviness).astype(np.float64)
    centred = x - np.average(x, weights=w)
    sums = np.zeros((3, x.size + 1))
    np.cumsum([w, w * centred, w * centred**2], axis=1, out=sums[:, 1:])
    return _Points(x, w, sums)


def _checked_weights(weights: Tensor, values: Tensor) -> Floats:
    if weights.shape != values.shape:
        raise OptionError(
            f"kmeans_1d: weights must have the shape of the values, {tuple(values.shape)}, got {tuple(weights.shape)}."
        )
    checked: Floats = weights.detach().double().cpu().numpy().reshape(-1)
    if not np.isfinite(checked).all() or (checked < 0).any():
        raise OptionError("kmeans_1d: weights must be finite and not negative. Look for NaN in what they come from.")
    return checked


def _candidate_cuts(points: _Points) -> Cuts:
    """Return places to cut, at most POINTS + 1: all, or those between groups equally wide or equally full."""
    x, n = points.x, points.x.size
    if n <= POINTS:
        return np.arange(n + 1)
    half = POINTS // 2
    wide = np.searchsorted(x, np.linspace(x[0], x[-1], half + 1)[1:-1])
    full = np.searchsorted(points.sums[0], np.linspace(0, points.sums[0, -1], half + 1)[1:-1])
    return np.unique(np.concatenate([[0, n], wide, full]))


def optimal_cuts(sums: Floats, k: int) -> Cuts:
    """Return where to cut a sorted sequence into k intervals of least total error: k + 1 places, the ends included.

    Row q of the program holds the least error of the first j points in q intervals. Its best last cut moves right with
    j, so the places for half of the j bound those for the rest: O(k m log m) for m points.

    Args:
        sums: Prefix sums of w, w x and w x^2 at the m + 1 places to cut, shape ``(3, m + 1)``.
        k: Number of intervals, at most m.
    """
    m = sums.shape[1] - 1
    best = np.full(m + 1, np.inf)
    best[1:] = _error(sums, np.zeros(m, np.int64), np.arange(1, m + 1))
    last = np.zeros((k, m + 1), np.int64)
    for q in range(2, k + 1):
        best, last[q - 1] = _next_row(best, sums, q)
    cuts = np.empty(k + 1, np.int64)
    cuts[k] = m
    for q in range(k, 0, -1):
        cuts[q - 1] = last[q - 1, cuts[q]]
    return cuts


def _error(sums: Floats, i: Cuts, j: Cuts) -> Floats:
    weight, first, second = sums[:, j] - sums[:, i]
    error: Floats = second - first * first / weight
    return error


def _next_row(before: Floats, sums: Floats, q: int) -> tuple[Floats, Cuts]:
    """Return the least errors of the first j points in q intervals, and the last cut of each."""
    m = before.size - 1
    best, last = np.full(m + 1, np.inf), np.full(m + 1, q - 1)
    stride = 1 << m.bit_length()
    while stride > 1:
        stride //= 2
        j = np.arange(stride, m + 1, 2 * stride)
        right = j + stride
        low = last[j - stride]
        high = np.where(right <= m, last[np.minimum(right, m)], m - 1)
        fits = j >= q
        j, low, high = j[fits], low[fits], np.minimum(high[fits], j[fits] - 1)
        if j.size:
            best[j], last[j] = _least(before, sums, j, low, np.maximum(high, low))
    return best, last


def _least(before: Floats, sums: Floats, j: Cuts, low: Cuts, high: Cuts) -> tuple[Floats, Cuts]:
    """Return, for each j, the least of before[i] + error(i, j) over i from low to high, and the first such i."""
    lengths = high - low + 1
    starts = np.cumsum(lengths) - lengths
    i = np.arange(lengths.sum()) - np.repeat(starts - low, lengths)
    totals = before[i] + _error(sums, i, np.repeat(j, lengths))
    least = np.minimum.reduceat(totals, starts)
    hits = np.flatnonzero(totals == np.repeat(least, lengths))
    return least, i[hits[np.searchsorted(hits, starts)]]


def _start(points: _Points, k: int, init: Init, seed: int) -> Floats:
    x = points.x
    if init == "linear":
        return np.linspace(x[0], x[-1], k)
    if init == "density":
        shares = (np.arange(k) + 0.5) / k * points.sums[0, -1]
        quantiles: Floats = x[np.searchsorted(points.sums[0, 1:], shares)]
        return quantiles
    return np.sort(np.random.default_rng(seed).choice(x, k, replace=False))


def _lloyd(points: _Points, centroids: Floats) -> Floats:
    """Move centroids to the means of the values nearest to them until nothing changes: O(k log n) a sweep."""
    cuts = np.empty(0, np.int64)
    offset = np.average(points.x, weights=points.w)
    for _ in range(_SWEEPS):
        borders = np.searchsorted(points.x, (centroids[1:] + centroids[:-1]) / 2, side="right")
        moved = np.concatenate([[0], borders, [points.x.size]])
        if np.array_equal(moved, cuts):
            break
        cuts = moved
        weight, first = np.diff(points.sums[:2, cuts], axis=1)
        filled = weight > 0
        centroids = np.where(filled, first / np.where(filled, weight, 1) + offset, centroids)
    return _means(points, cuts, centroids)


def _means(points: _Points, cuts: Cuts, empty: Floats) -> Floats:
    """Return the mean of each interval, without the rounding of prefix sums; of an empty one what ``empty`` has."""
    means = empty.copy()
    filled = np.flatnonzero(np.diff(cuts))
    starts = cuts[filled]
    means[filled] = np.add.reduceat(points.w * points.x, starts) / np.add.reduceat(points.w, starts)
    return means
