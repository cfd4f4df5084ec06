"""What the layers have in common whose weight is a sum of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric, kronecker, kronecker_sum, weighted_tensor_train
from lowrank_nn.decompose.weighted_svd import balanced
from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers._kronecker_ranks import KroneckerProblem, Shape, checked_shape, kronecker_folding
from lowrank_nn.layers._lowrank import LowRankLayer
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule, check_rank
from lowrank_nn.layers._refine import refine_, stored_error
from lowrank_nn.layers._source import Source, read_layer

_ITERATIONS = 60


class KroneckerLayer(LowRankLayer):
    """Base of the layers whose weight is a sum of Kronecker products, W = sum_r A_r (x) B_r.

    ``inner`` applies all B_r to each slice of the input's channels, ``outer`` the A_r across slices. None of the two
    has the layer's output channels, so the bias is the layer's own.

    Attributes:
        rank: Number R of products.
        shape: (O1, I1), the shape of A.
        inner: The stage with the factors B.
        outer: The stage with the factors A.
    """

    main_options = ("rank", "shape")
    planned_by_default = False
    rearranges = True

    rank: int
    shape: tuple[int, int]
    inner: nn.Module
    outer: nn.Module

    def _set_up(self, weight_shape: tuple[int, ...], groups: int, rank: int, shape: Shape | None) -> None:
        """Check the options and note the sizes: ``_rest`` is (O2, I2)."""
        name = type(self).__name__
        out, inn, taps = weight_shape[0] // groups, weight_shape[1], math.prod(weight_shape[2:])
        self.shape = checked_shape(name, shape, out, inn, taps)
        self._rest = (out // self.shape[0], inn // self.shape[1])
        self._full_rank = min(math.prod(self.shape), math.prod(self._rest) * taps)
        self.rank = check_rank(name, rank, self._full_rank)
        self._weight_shape, self._groups = weight_shape, groups

    @classmethod
    def from_pretrained_layer(
        cls, layer: nn.Module, *, rank: int | RankRule, shape: Shape | None = None, metric: Metric | None = None
    ) -> Self:
        """Build the layer whose weight is nearest to that of ``layer`` in Frobenius norm (Van Loan, Pitsianis 1993).

        Args:
            layer: A trained dense layer of the class replaced; not changed.
            rank: The number of products per group, or a rule that chooses it.
            shape: (O1, I1), the shape of A; that at which A and B are about equally large if left out.
            metric: What is to be small of the weight's change; its Frobenius norm if left out. Under a metric no
                closed form is known; the search ends no worse than the fit without.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            RankError: ``rank`` is out of range, or the rule finds none.
            OptionError: ``shape`` does not divide the channels.
        """
        source = read_layer(layer, cls)
        rank = cls.resolve_rank(rank, source, shape=shape)
        return cls.fitted(source, metric, rank=rank, shape=shape)

    @classmethod
    def rank_problem(cls, source: Source, *, shape: Shape | None = None, **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""
        return KroneckerProblem(cls, source, shape)

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None, *, iterations: int = _ITERATIONS) -> None:
        """Set the factors to the nearest sum of Kronecker products, group by group.

        Under a metric the better of that and of the sum that is nearest under a Kronecker product of metrics, in closed
        form too, is refined by second-order steps.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference; None for its Frobenius norm.
            iterations: Largest number of steps under a metric.
        """
        blocks = weight.reshape(self._groups, -1, *weight.shape[1:])
        factors = [kronecker(block, self.rank, self.shape) for block in blocks]
        A, B = torch.stack([A for A, _ in factors]), torch.stack([B for _, B in factors])
        self._set(A, B)
        if metric is None or weight.is_meta or self.rank == self._full_rank:
            return
        plain = stored_error(self, weight, metric)
        self._set(*self._nearest_under_product(weight, metric))
        if not stored_error(self, weight, metric) < plain:
            self._set(A, B)
        refine_(self, weight, metric, iterations=iterations)

    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Refine the present factors by second-order steps; at full rank nothing is lost under any metric.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference.
        """
        if self.rank == self._full_rank:
            self.approximate_(weight)
        else:
            super().refit_(weight, metric)

    def _nearest_under_product(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        """Return the best factors under the product metric nearest to ``metric``: a train of the two cores A and B."""
        folding = kronecker_folding(weight.shape, self._groups, self.shape)
        trains = [
            weighted_tensor_train(tensor, roots, (self.rank,))
            for tensor, (roots, _) in zip(folding.fold(weight), folding.roots(metric), strict=True)
        ]
        left, right = balanced(torch.cat([A for A, _ in trains]), torch.stack([B.flatten(1) for _, B in trains]))
        groups_and_rank = (self._groups, self.rank)
        return left.mT.reshape(*groups_and_rank, *self.shape), right.reshape(*groups_and_rank, *self._rest, -1)

    def _set(self, A: Tensor, B: Tensor) -> None:
        """Take over factors ``(groups, R, O1, I1)`` and ``(groups, R, O2, I2, K)``."""
        outer, inner = self.outer.weight, self.inner.weight
        assert isinstance(outer, Tensor)
        assert isinstance(inner, Tensor)
        outer.copy_(A.transpose(1, 2).reshape(outer.shape))
        inner.copy_(B.reshape(inner.shape))

    def dense_weight(self) -> Tensor:
        """Return the sum of the products, in the dense layer's shape."""
        outer, inner = self.outer.weight, self.inner.weight
        assert isinstance(outer, Tensor)
        assert isinstance(inner, Tensor)
        A = outer.reshape(self._groups, self.shape[0], self.rank, self.shape[1]).transpose(1, 2)
        B = inner.reshape(self._groups, self.rank, *self._rest, -1)
        return kronecker_sum(A, B).reshape(self._weight_shape)

    def resize_to_stages_(self) -> None:
        """Refuse: the layer's channels are pairs of a channel of A and one of B.

        Raises:
            UnsupportedLayerError: Always.
        """
        raise UnsupportedLayerError(
            f"{type(self).__name__}: channels cannot be removed from it, since each is a pair of one of A and one of "
            "B. Leave the layer out (but_not=...), or remove channels before it is put in place."
        )

    def stages(self) -> Iterator[nn.Module]:
        """Yield ``inner`` and ``outer``."""
        yield self.inner
        yield self.outer
