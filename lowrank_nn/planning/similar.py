"""Units that compute nearly the same: one of them can go when its readers read the other instead. Needs no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_nn.graph.groups import ChannelGroup
from lowrank_nn.planning.unit_signals import unit_slices


def unit_rows(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """Return all that each unit is computed from, weights, biases and norms, (units, m); float64 on the CPU."""
    computing = [member for member in group.members if member.role != "in"]
    return torch.cat([unit_slices(tensors[member.name], member).cpu() for member in computing], dim=1)


def unit_columns(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """Return all weights that read each unit, (units, n); float64 on the CPU."""
    reading = [unit_slices(tensors[member.name], member).cpu() for member in group.members if member.role == "in"]
    return torch.cat(reading, dim=1) if reading else torch.zeros(group.size, 0, dtype=torch.float64, device="cpu")


def similarity_scores(rows: Tensor, columns: Tensor) -> Tensor:
    r"""Return the importance of units that are merged into their likes one after the other.

    .. math:: s_{uv} = \| a_v \|^2 \, \| w_u - w_v \|^2

    is what is lost, up to a factor, when unit v is removed and unit u takes over its columns: a_u + a_v in place of
    a_u. The pair with the least goes first; the importance of a unit is s when its turn comes, but no less than that of
    those gone before. One unit always stays: it gets more than any other.

    Args:
        rows: w, all that a unit is computed from, (units, m).
        columns: a, all weights that read it, (units, n).

    References:
        Srinivas and Babu 2015, "Data-free Parameter Pruning for Deep Neural Networks".
    """
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances.fill_diagonal_(torch.inf)
    columns = columns.clone()
    scores = torch.full_like(rows[:, 0], torch.inf)
    least = scores.new_zeros(())
    for _ in range(len(rows) - 1):
        costs = columns.square().sum(1) * distances  # into unit (row), of unit (column)
        costs[distances.isinf()] = torch.inf
        into, gone = divmod(int(costs.argmin()), len(rows))
        least = torch.maximum(costs[into, gone], torch.nextafter(least, scores.new_tensor(torch.inf)))
        scores[gone] = least
        columns[into] += columns[gone]
        distances[gone] = distances[:, gone] = torch.inf
    scores[scores.isinf()] = 2 * least + 1
    return scores


def nearest_kept(rows: Tensor, gone: Tensor) -> Tensor:
    """Return, for each unit that goes, the one among those that stay whose rows are nearest.

    Args:
        rows: All that a unit is computed from, (units, m).
        gone: Which units go, bool (units,); not all of them.
    """
    kept = (~gone).nonzero()[:, 0]
    return kept[torch.cdist(rows[gone], rows[kept], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)]
