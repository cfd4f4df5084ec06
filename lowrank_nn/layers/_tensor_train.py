"""What the layers have in common whose weight is a tensor train."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowrank_nn.decompose import Metric, reachable_ranks, tensor_train, tt_limits, weighted_tensor_train
from lowrank_nn.errors import RankError
from lowrank_nn.layers._folding import Folding
from lowrank_nn.layers._lowrank import LowRankLayer
from lowrank_nn.layers._ranks import RankRule, check_rank
from lowrank_nn.layers._refine import refine_, stored_error

_ITERATIONS = 60


class TensorTrainLayer(LowRankLayer):
    """Base of the layers whose weight, folded into a tensor, is a train of cores.

    Attributes:
        rank: Ranks of the bonds between the cores.
    """

    rank: tuple[int, ...]
    planned_by_default: ClassVar[bool] = False

    @abc.abstractmethod
    def folding(self) -> Folding:
        """Return how the weight is folded."""

    @abc.abstractmethod
    def _set_cores(self, cores: Sequence[Tensor]) -> None:
        """Take cores (groups, r_{k-1}, n_k, r_k), in the order of the folding."""

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None, *, iterations: int = _ITERATIONS) -> None:
        """Set the cores so that the dense weight comes near ``weight``: TT-SVD, then sweeps.

        Under a metric no closed form is known. The better of that train and of the one that is near under the product
        metric of the modes is refined by second-order steps.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference; None for its Frobenius norm.
            iterations: Largest number of steps under a metric.
        """
        folding = self.folding()
        trains = [tensor_train(tensor, self.rank) for tensor in folding.merged(weight)]
        self._set_trains(trains)
        if metric is None or weight.is_meta or self._holds_everything():
            return
        plain = stored_error(self, weight, metric)
        tensors, roots = folding.fold(weight), folding.roots(metric)
        self._set_trains(
            [weighted_tensor_train(tensor, root, self.rank) for tensor, (root, _) in zip(tensors, roots, strict=True)]
        )
        if not stored_error(self, weight, metric) < plain:
            self._set_trains(trains)
        refine_(self, weight, metric, iterations=iterations)

    @torch.no_grad()
    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Fit the present cores anew; at full ranks nothing is lost under any metric.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference.
        """
        if self._holds_everything():
            self.approximate_(weight)
        else:
            super().refit_(weight, metric)

    def _holds_everything(self) -> bool:
        return self.rank == tt_limits(self.folding().shape)

    def _set_trains(self, trains: Sequence[Sequence[Tensor]]) -> None:
        self._set_cores([torch.stack(cores) for cores in zip(*trains, strict=True)])


def check_ranks(owner: str, rank: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks of a train over modes of this shape, lowered to those that its neighbours can fill.

    Args:
        owner: Name of the class, for messages.
        rank: One rank for each bond, or one number that no bond exceeds.
        shape: Sizes of the modes.

    Raises:
        RankError: ``rank`` is neither, or out of range.
    """
    limits = tt_limits(shape)
    if isinstance(rank, (int, np.integer, RankRule)):
        largest = check_rank(owner, rank, max(limits))
        return reachable_ranks(shape, [min(largest, limit) for limit in limits])
    if isinstance(rank, str) or not isinstance(rank, Sequence) or len(rank) != len(limits):
        raise RankError(
            f"{owner}: rank must be an integer or {len(limits)} of them, one for each bond between the cores, got "
            f"{rank!r}. Rank rules work in from_pretrained_layer."
        )
    checked = [check_rank(owner, r, limit, f"rank[{k}]") for k, (r, limit) in enumerate(zip(rank, limits, strict=True))]
    return reachable_ranks(shape, checked)
