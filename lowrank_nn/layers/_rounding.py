"""Which grid a weight is rounded to, and how, where a metric says what its changes do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_nn.decompose import Metric, round_jointly
from lowrank_nn.layers._affine import Grid, dequantize, quantize

SHARES = tuple(0.44 + 0.07 * step for step in range(9))
CHUNK = 1 << 24  # entries rounded at a time: bounds the memory

GridOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns the scale, (O,) or 0-dimensional, and the zero point of the grid that covers a weight (O, ...)."""


class Rounded(NamedTuple):
    """A weight on a grid: ``scale * steps``, the integers that stand for it being ``steps + zero_point``.

    Attributes:
        steps: Integers as floating-point numbers, in the weight's shape.
        scale: Length of a step, of each channel, (O,), or of all, 0-dimensional.
        zero_point: The integer that stands for 0, 0-dimensional.
    """

    steps: Tensor
    scale: Tensor
    zero_point: Tensor

    def weight(self) -> Tensor:
        """Return the weight that this stands for, in the dtype of the scale."""
        return dequantize(self.steps, _per_row(self.scale, self.steps), torch.zeros_like(self.zero_point))


def round_on_data(weight: Tensor, metric: Metric, grid: Grid, grid_of: GridOf, kept: Tensor | None) -> Rounded:
    """Round a weight so that the metric's error is small, and never above that of the nearest numbers.

    Grids that cover nine shares of the weight's range, from 0.44 to 1, are tried: few bits are better spent on short
    steps than on the largest weights. On each, integers are found by :func:`lowrank_nn.decompose.round_jointly`. Every
    channel takes the best grid, or all take one where there is one scale for all.

    Args:
        weight: The dense weight.
        metric: What its changes do.
        grid: The integers there are.
        grid_of: Chooses the grid that covers a weight. Only weights are returned from which it finds their grid again.
        kept: Marks the entries that may be other than 0; None for all.
    """
    covered = weight if kept is None else torch.where(kept, weight, 0)
    nearest = best = _nearest(covered, grid, grid_of)
    least = _errors(best, weight, metric)
    for tried in _on_shares(weight, covered, metric, grid, grid_of, kept):
        errors = torch.where(_found_again(tried, grid, grid_of), _errors(tried, weight, metric), torch.inf)
        better = errors < least
        least = torch.where(better, errors, least)
        best = Rounded(
            torch.where(_per_row(better, weight), tried.steps, best.steps),
            torch.where(better, tried.scale, best.scale),
            torch.where(better.any(), tried.zero_point, best.zero_point),
        )
    # Channels were judged one by one; the curvature couples them.
    if metric.curvature is None or metric.error(best.weight() - weight) < metric.error(nearest.weight() - weight):
        return best
    return nearest


def _nearest(weight: Tensor, grid: Grid, grid_of: GridOf) -> Rounded:
    scale, zero_point = grid_of(weight)
    codes = quantize(weight, _per_row(scale, weight), zero_point, grid, torch.int32)
    return Rounded((codes - zero_point).double(), scale, zero_point)


def _on_shares(
    weight: Tensor, covered: Tensor, metric: Metric, grid: Grid, grid_of: GridOf, kept: Tensor | None
) -> Iterator[Rounded]:
    """Yield the weight rounded to the grids of all shares; several at a time are rounded in one sweep."""
    rows = metric.unfold(weight)
    marks = None if kept is None else kept.to(rows.device).reshape(rows.shape)
    together = max(1, CHUNK // weight.numel())
    for start in range(0, len(SHARES), together):
        grids = [grid_of(share * covered) for share in SHARES[start : start + together]]
        scales = torch.stack([scale.to(rows).expand(len(weight)) for scale, _ in grids])
        zeros = torch.stack([zero_point.to(rows) for _, zero_point in grids]).repeat_interleave(rows.shape[1])
        points = rows / scales.reshape(-1, *rows.shape[:2], 1)
        steps = round_jointly(
            points.transpose(0, 1).flatten(1, 2),
            metric.covariance,
            grid.low - zeros,
            grid.high - zeros,
            None if marks is None else marks.repeat(1, len(grids), 1),
        )
        found = steps.reshape(len(rows), len(grids), *rows.shape[1:]).transpose(0, 1).to(weight.device)
        yield from (Rounded(found[i].reshape(weight.shape), *grids[i]) for i in range(len(grids)))


def _errors(rounded: Rounded, weight: Tensor, metric: Metric) -> Tensor:
    """Return the error of each channel, or of all together where they share a scale, curvature left aside."""
    change = metric.unfold(rounded.weight() - weight)
    errors = (metric.times_covariance(change) * change).sum(2).flatten().to(weight.device)
    return errors if rounded.scale.dim() else errors.sum()


def _found_again(rounded: Rounded, grid: Grid, grid_of: GridOf) -> Tensor:
    """Return of which channels the steps are found again in the weight alone, as training from there on does."""
    same = _nearest(rounded.weight(), grid, grid_of).steps == rounded.steps
    return same.flatten(1).all(1) if rounded.scale.dim() else same.all()


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per channel, or one for all, in a shape that broadcasts to ``like``."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
