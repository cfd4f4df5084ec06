"""What the layers with ranks share: rank rules, limits, and the bias that sits on their last stage."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from torch import Tensor, nn

from lowrank_nn.layers._base import CompressedLayer
from lowrank_nn.layers._ranks import RankProblem, RankRule
from lowrank_nn.layers._source import Source, read_layer

Rank = int | tuple[int | None, ...]


class LowRankLayer(CompressedLayer):
    """Base of the layers whose weight is a product of factors of small rank.

    Attributes:
        rank: The rank, a plain int, or a tuple where the format has several.
        formats: Options that select the variants of this class that a planner compares.
    """

    rank: Rank
    main_options: ClassVar[tuple[str, ...]] = ("rank",)
    formats: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    @classmethod
    @abc.abstractmethod
    def rank_problem(cls, source: Source, **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""

    @classmethod
    def rank_argument(cls, ranks: tuple[int, ...], limits: tuple[int, ...]) -> Rank:
        """Return the ranks of the modes in the form that the constructor takes."""
        return ranks[0] if len(ranks) == 1 else ranks

    @classmethod
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

    @property
    def bias(self) -> Tensor | None:
        """The bias, held by the last stage."""
        *_, last = self.stages()
        bias = last.bias
        return bias if isinstance(bias, Tensor) else None
