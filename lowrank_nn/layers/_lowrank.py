"""What the layers with ranks share: rank rules, limits, and the bias that sits on their last stage."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.accelerator import full_precision
from lowrank_nn.decompose import Metric
from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers._base import CompressedLayer
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule
from lowrank_nn.layers._refine import refine_
from lowrank_nn.layers._source import Source, read_layer

Rank = int | tuple[int | None, ...]


class LowRankLayer(CompressedLayer):
    """Base of the layers whose weight is a product of factors of small rank.

    Attributes:
        rank: The rank, a plain int, or a tuple where the format has several.
        formats: Options that select the variants of this class that a planner compares.
        planned_by_default: Whether the planner considers the class where the user names no formats; where False it
            has to be named, as in ``LowRank(formats=[...])``.
    """

    rank: Rank
    main_options: ClassVar[tuple[str, ...]] = ("rank",)
    formats: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    planned_by_default: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def rank_problem(cls, source: Source, **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""

    @abc.abstractmethod
    def approximate_(self, weight: Tensor, metric: Metric | None = None) -> None:
        """Set the factors so that the dense weight comes near ``weight``.

        Args:
            weight: Of shape ``weight_shape``.
            metric: What is to be small of the difference; None for its Frobenius norm.
        """

    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Fit the present factors anew, to a somewhat different weight under a somewhat different metric.

        Never ends above the error, under ``metric``, of leaving the factors as they are.

        Args:
            weight: Of shape ``weight_shape``.
            metric: What is to be small of the difference.
        """
        refine_(self, weight, metric)

    @classmethod
    @full_precision()
    def fitted(
        cls, source: Source, metric: Metric | None, *, fit: Mapping[str, Any] | None = None, **config: Any
    ) -> Self:
        """Build the layer of this ``config`` from a trained one, fitted to its weight under a metric.

        A bias takes up the change of the mean output; where there is none, that change counts as error.

        Args:
            source: The trained layer.
            metric: What is to be small of the weight's change; None for its Frobenius norm.
            fit: Options of ``approximate_``.
            **config: Options of the constructor.
        """
        new = source.empty(cls, **config)
        new.approximate_(source.weight, source.seen_by(metric), **(fit or {}))
        return source.finish(new, metric)

    @classmethod
    def rank_argument(cls, ranks: tuple[int, ...], limits: tuple[int, ...]) -> Rank:
        """Return the ranks of the modes in the form that the constructor takes."""
        return ranks[0] if len(ranks) == 1 else ranks

    @classmethod
    @full_precision()
    def resolve_rank(cls, rank: Any, source: Source, **options: Any) -> Any:
        """Return ``rank`` itself, or what it chooses where it is a rule.

        Raises:
            RankError: The rule finds no rank for this weight.
        """
        if not isinstance(rank, RankRule):
            return rank
        problem = cls.rank_problem(source, **options)
        return cls.rank_argument(rank.choose(problem), problem.limits)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Half of the largest rank in each mode."""
        limits = cls.rank_problem(read_layer(layer, cls)).limits
        return {"rank": cls.rank_argument(tuple(-(-limit // 2) for limit in limits), limits)}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """The largest rank in each mode."""
        limits = cls.rank_problem(read_layer(layer, cls)).limits
        return {"rank": limits[0] if len(limits) == 1 else limits}

    def stage_rank(self) -> Rank:
        """Return the rank that the stages have, in the form that the constructor takes.

        Raises:
            UnsupportedLayerError: The class does not say.
        """
        raise UnsupportedLayerError(
            f"{type(self).__name__}: channels cannot be removed from it, as the class has no stage_rank(). Leave the "
            "layer out (but_not=...), or remove channels before it is put in place."
        )

    def resize_to_stages_(self) -> None:
        """Read sizes and rank back from the stages, after channels of these were removed."""
        super().resize_to_stages_()
        self.rank = self.stage_rank()

    def hold_bias(self, bias: bool, size: int, **factory: Any) -> None:
        """Give a layer that ``rearranges`` a bias of its own, not yet filled.

        Args:
            bias: Whether it has one.
            size: Number of outputs.
            **factory: Device and dtype.
        """
        # Under the name that torch's layers have, but not by assignment: the property is in the way.
        self._parameters["bias"] = nn.Parameter(torch.empty(size, **factory)) if bias else None

    @property
    def bias(self) -> Tensor | None:
        """The bias, held by the last stage, or by the layer itself where it ``rearranges``."""
        if self.rearranges:
            return self._parameters["bias"]
        *_, last = self.stages()
        bias = last.bias
        return bias if isinstance(bias, Tensor) else None
