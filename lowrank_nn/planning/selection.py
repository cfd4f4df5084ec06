"""Which channels a layer can do without, judged by its inputs on data: LASSO, greedy and OBS selection.

All of it works on second moments, so that no image is needed after the pass that collected them
(:func:`lowrank_nn.planning.collect_metrics`). The importances that come out are in the unit of the metrics, the
expected squared change of the network's output, and can be compared between channel groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_nn.decompose import Metric, square_root
from lowrank_nn.planning.lasso_path import lasso_path

EPSILON = 1e-10


@dataclasses.dataclass(frozen=True)
class Reader:
    """A layer that reads the units of a channel group.

    Attributes:
        weight: Its weight, unfolded as (groups, o, p), float64.
        covariance: C, the second moments of its input patches, (groups, p, p); or its diagonal, (groups, p).
        curvature: H, (groups, o, o); None for the identity.
        features: For each unit, the positions along p that go with it, (units, f).
    """

    weight: Tensor
    covariance: Tensor
    curvature: Tensor | None
    features: Tensor

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, positions: Tensor) -> Reader:
        """Return the reader for a weight in the layer's own shape.

        Args:
            weight: (out_channels, in_channels / groups, ...).
            metric: What a change of it does.
            positions: For each unit, its positions along dim 1 of the weight, (units, n).
        """
        taps = weight[0, 0].numel()
        offsets = torch.arange(taps, device=positions.device)
        features = (positions[..., None] * taps + offsets).flatten(1)
        unfolded = metric.unfold(weight)
        return cls(unfolded, metric.covariance, metric.curvature, features.to(unfolded.device))

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal of the covariance is known."""
        return self.covariance.dim() == 2

    def weighted(self) -> Tensor:
        """Return H W."""
        return self.weight if self.curvature is None else self.curvature @ self.weight

    def gram(self) -> Tensor:
        r"""Return the inner products of what the units contribute to the layer's output.

        .. math:: A_{uv} = \sum_g E \, \langle W_u x_u, H W_v x_v \rangle = \sum_g \operatorname{tr}(W_u^T H W_v C_{vu})

        with x_u the inputs that belong to unit u; shape (units, units).
        """
        if self.is_diagonal:
            own = ((self.weight * self.weighted()).sum(1) * self.covariance).sum(0)
            return torch.diag(own[self.features].sum(1))
        products = (self.weight.mT @ self.weighted() * self.covariance).sum(0)
        count, size = self.features.shape
        order = self.features.flatten()
        return products[order[:, None], order].reshape(count, size, count, size).sum((1, 3))


def gram(readers: Sequence[Reader]) -> Tensor:
    """Return the sum of the readers' inner products, (units, units)."""
    return torch.stack([reader.gram() for reader in readers]).sum(0)


def lasso_scores(readers: Sequence[Reader]) -> Tensor:
    r"""Return the importance of units by LASSO regression: how strong a penalty it takes to shut them off.

    .. math:: \min_\beta \; \tfrac{1}{2} E \Big\| \sum_u (1 - \beta_u) W_u x_u \Big\|_H^2 + \lambda \| \beta \|_1

    A unit's importance is the largest lambda with which its factor is not zero, found on the whole path of solutions.
    At lambda = 0 all factors are one; of several units that make up for each other, one stays.

    Args:
        readers: The layers that read the units.

    References:
        He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks".
    """
    products = gram(readers)
    size = products.diagonal().mean()
    if not bool(size > 0):
        return torch.zeros_like(products[0])  # nothing that the units contribute reaches the output
    # Contributions that are linearly dependent have no unique factors; a little of the diagonal settles them. Sums in
    # float32 leave eigenvalues below zero.
    below_zero = torch.linalg.eigvalsh(products)[0].clamp(max=0)
    products.diagonal().add_(EPSILON * size - 2 * below_zero)
    return lasso_path(products, products.sum(1))


def greedy_scores(readers: Sequence[Reader]) -> Tensor:
    r"""Return the importance of units by greedy removal: always the one with which least is lost.

    .. math:: e(T) = E \Big\| \sum_{u \in T} W_u x_u \Big\|_H^2

    for the set T of units removed. A unit's importance is what it adds to e when its turn comes, but no less than that
    of the units removed ahead of it.

    Args:
        readers: The layers that read the units.

    References:
        Luo et al. 2017, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression".
    """
    products = gram(readers)
    with_removed = torch.zeros_like(products[0])  # sum over T of A_tu

    def costs() -> Tensor:
        return products.diagonal() + 2 * with_removed

    def remove(unit: int) -> None:
        with_removed.add_(products[unit])

    return _one_by_one(len(products), costs, remove, products)


def obs_scores(readers: Sequence[Reader]) -> Tensor:
    r"""Return the importance of units by removal with the best update of all that remains, one after the other.

    .. math:: e_u = \sum_g \operatorname{tr}\big( H W_u (P_{uu})^{-1} W_u^T \big), \quad P = C^{-1}

    is what the removal of unit u costs when the other weights are set by least squares, :math:`W \leftarrow W -
    W_u P_{uu}^{-1} P_{u:}`; then P loses the unit too. The unit with the least goes. Readers of which only the diagonal
    of C is known are not updated. Takes about U p^2 f operations for U units of f features in p.

    Args:
        readers: The layers that read the units.

    References:
        Hassibi and Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon"; Frantar and
        Alistarh 2022, "Optimal Brain Compression" (one layer, exact updates).
    """
    eliminations = [_Elimination(reader) for reader in readers if not reader.is_diagonal]
    fixed = [reader.gram().diagonal() for reader in readers if reader.is_diagonal]

    def costs() -> Tensor:
        return torch.stack([*fixed, *(elimination.costs() for elimination in eliminations)]).sum(0)

    def remove(unit: int) -> None:
        for elimination in eliminations:
            elimination.remove(unit)

    return _one_by_one(len(readers[0].features), costs, remove, readers[0].weight)


def _inverse(matrices: Tensor) -> Tensor:
    """Return inverses; sums of products in float32 leave eigenvalues a little below zero where inputs are alike."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if not failed.any():
        return torch.cholesky_inverse(factor)
    root = square_root(matrices).inverse
    return root @ root


class _Elimination:
    """One reader while its units go: D = W^T H W of the updated weights, and the inverse P of what is left of C."""

    def __init__(self, reader: Reader) -> None:
        self._products = reader.weight.mT @ reader.weighted()
        self._inverse = _inverse(reader.covariance)
        self._features = reader.features
        self._count = len(reader.features)
        self._units = torch.arange(self._count, device=reader.features.device)  # what the rows of features are of
        self._gone = torch.zeros_like(self._units, dtype=torch.bool)

    def costs(self) -> Tensor:
        """Return tr(D_uu P_uu^-1) of each unit; of those gone already, anything."""
        rows, columns = self._features[:, :, None], self._features[:, None, :]
        blocks = self._inverse[:, rows, columns]  # (g, u, f, f)
        blocks[:, self._gone] = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        costs = (torch.linalg.inv(blocks).mT * self._products[:, rows, columns]).sum((0, 2, 3))
        every: Tensor = costs.new_zeros(self._count).index_copy_(0, self._units, costs)
        return every

    def remove(self, unit: int) -> None:
        """Take a unit out and set the rest right: W <- W - W_u K, P <- P - P_:u K with K = P_uu^-1 P_u:."""
        place = int((self._units == unit).nonzero())
        own = self._features[place]
        rows = self._inverse[:, own]
        update = torch.linalg.solve(rows[:, :, own], rows)  # K, (g, f, p)
        half = self._products[:, :, own] - update.mT @ self._products[:, own][:, :, own] / 2
        self._products.baddbmm_(half, update, alpha=-1).baddbmm_(update.mT, half.mT, alpha=-1)
        self._inverse.baddbmm_(rows.mT, update, alpha=-1)
        self._inverse[:, own] = 0  # exactly
        self._inverse[:, :, own] = 0
        self._gone[place] = True
        if int(self._gone.sum()) > len(self._gone) // 5:
            self._drop_gone()

    def _drop_gone(self) -> None:
        """Leave those gone out of the matrices, so that the work shrinks with them."""
        left = ~self._gone
        stays = torch.ones(self._inverse.shape[1], dtype=torch.bool, device=left.device)
        stays[self._features[self._gone].flatten()] = False
        self._features = (stays.cumsum(0) - 1)[self._features[left]]
        self._products, self._inverse = (m[:, stays][:, :, stays] for m in (self._products, self._inverse))
        self._units, self._gone = self._units[left], self._gone[left]


def _one_by_one(units: int, costs: Callable[[], Tensor], remove: Callable[[int], None], like: Tensor) -> Tensor:
    """Remove the cheapest unit until none is left; return what each cost, made to grow in the order of removal."""
    scores = torch.zeros(units, dtype=like.dtype, device=like.device)
    left = torch.ones(units, dtype=torch.bool, device=like.device)
    least = like.new_zeros(())
    above = torch.full_like(least, torch.inf)
    for _ in range(units):
        now = torch.where(left, costs(), torch.inf)
        unit = int(now.argmin())
        least = torch.maximum(now[unit], torch.nextafter(least, above))
        scores[unit], left[unit] = least, False
        remove(unit)
    return scores
