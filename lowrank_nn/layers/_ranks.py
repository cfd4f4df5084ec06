"""Rank rules: how a user asks for a rank without naming a number."""

from __future__ import annotations

import abc
import dataclasses
import math

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_nn.decompose import evbmf_rank, singular_values
from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.layers._rank_problem import IntArray, RankProblem


class RankRule(abc.ABC):
    """A way to choose ranks from a weight: pass one wherever a layer takes ``rank``."""

    @abc.abstractmethod
    def choose(self, problem: RankProblem) -> tuple[int, ...]:
        """Return one rank per mode, each from 1 to its limit.

        Raises:
            RankError: The rule finds no such ranks.
        """


@dataclasses.dataclass(frozen=True)
class VBMF(RankRule):
    """Ranks by empirical variational Bayesian matrix factorization, the rule of one-shot compression.

    The rank of each unfolding is the number of its singular values that stand out of the noise level estimated
    from the same matrix (Nakajima et al. 2013, global analytic solution; used for CNNs by Kim et al. 2016). With
    ``weaken`` = w it becomes full - w (full - vbmf) (Gusak et al. 2019). A mode in which nothing stands out
    keeps its full rank; if none of the modes has a rank, that is an error.

    Args:
        weaken: Share of the way from full rank to the estimated one, in (0, 1].

    Raises:
        OptionError: ``weaken`` is out of range.
    """

    weaken: float = 1.0

    def __post_init__(self) -> None:
        _check_share("VBMF", "weaken", self.weaken)

    def choose(self, problem: RankProblem) -> tuple[int, ...]:
        """Return the estimated rank of each mode; over groups the largest counts.

        Raises:
            RankError: No mode has a singular value that stands out of the noise.
        """
        estimates = [max(evbmf_rank(matrix) for matrix in matrices) for matrices in problem.unfoldings()]
        if not any(estimates):
            raise RankError(
                f"{problem.name}: VBMF finds no low-rank structure (rank 0): every singular value is within the noise. "
                "Leave the layer dense, or give a rank."
            )
        return tuple(
            math.ceil(limit - self.weaken * (limit - (rank or limit)))
            for rank, limit in zip(estimates, problem.limits, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Energy(RankRule):
    """The smallest ranks that keep a share of the weight's squared norm, mode by mode.

    Rank r of an unfolding with singular values s keeps sum_{i<=r} s_i^2 / sum_i s_i^2 of it.

    Args:
        share: Share of the squared Frobenius norm to keep, in (0, 1].

    Raises:
        OptionError: ``share`` is out of range.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("Energy", "share", self.share)

    def choose(self, problem: RankProblem) -> tuple[int, ...]:
        """Return the smallest rank per mode that keeps the share."""
        ranks = []
        for matrices, limit in zip(problem.unfoldings(), problem.limits, strict=True):
            energy = torch.stack([singular_values(matrix) for matrix in matrices]).square().sum(0).cumsum(0)
            enough = energy >= self.share * energy[-1] * (1 - 1e-12)
            ranks.append(min(limit, int(enough.double().argmax()) + 1))
        return tuple(ranks)


@dataclasses.dataclass(frozen=True)
class Params(RankRule):
    """The largest ranks that need at most a share of the dense layer's parameters.

    Formats with several ranks get the same rank in each mode, up to that mode's limit.

    Args:
        share: Share of the dense weight's scalars that may remain, in (0, 1].

    Raises:
        OptionError: ``share`` is out of range.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("Params", "share", self.share)

    def choose(self, problem: RankProblem) -> tuple[int, ...]:
        """Return the largest equal ranks within the share.

        Raises:
            RankError: Even rank 1 needs more.
        """
        allowed = self.share * problem.dense(problem.typical_positions())[0]
        ranks = _equal_ranks(problem.limits)
        return _largest(problem, ranks, problem.params(*ranks.T) <= allowed, str(self))


@dataclasses.dataclass(frozen=True)
class SpeedUp(RankRule):
    """The largest ranks with at least ``times`` fewer multiply-accumulates than the dense layer.

    Formats with several ranks get the same rank in each mode, up to that mode's limit. For Tucker-2 with
    C_out = n C_in, both ranks k C_in and a K x K kernel at stride 1 this is
    k_max = (sqrt(((n + 1) / K^2)^2 + 4 n / m) - (n + 1) / K^2) / 2: 0.604 for 3 x 3, n = 1, m = 2.

    Args:
        times: How many times fewer MACs, at least 1. MACs predict time only roughly; measure what matters.

    Raises:
        OptionError: ``times`` is no finite number from 1.
    """

    times: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.times) and self.times >= 1):
            raise OptionError(f"SpeedUp: times must be a finite number from 1 up, got {self.times!r}.")

    def choose(self, problem: RankProblem) -> tuple[int, ...]:
        """Return the largest equal ranks that are fast enough.

        Raises:
            RankError: Even rank 1 needs more.
        """
        positions = problem.typical_positions()
        allowed = problem.dense(positions)[1] / self.times
        ranks = _equal_ranks(problem.limits)
        return _largest(problem, ranks, problem.macs(positions, *ranks.T) <= allowed, str(self))


def check_rank(owner: str, rank: object, limit: int, what: str = "rank") -> int:
    """Return ``rank`` as an int between 1 and ``limit``.

    Raises:
        RankError: It is not an integer, or outside.
    """
    if isinstance(rank, RankRule):
        raise RankError(
            f"{owner}: {what} must be an integer here, got {rank!r}: a rule looks at a trained weight. Use "
            "from_pretrained_layer(layer, rank=...), or give a number."
        )
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise RankError(
            f"{owner}: {what} must be an integer or a rank rule (VBMF, Energy, Params, SpeedUp), got {rank!r}."
        )
    if not 1 <= rank <= limit:
        raise RankError(f"{owner}: {what} must be from 1 to {limit}, got {rank}.")
    return int(rank)


def _check_share(owner: str, name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise OptionError(f"{owner}: {name} must be above 0 and at most 1, got {value!r}.")


def _equal_ranks(limits: tuple[int, ...]) -> IntArray:
    """All rank tuples (min(r, limit_1), min(r, limit_2), ...) for r = 1, 2, ..., as rows."""
    steps = np.arange(1, max(limits) + 1)
    return np.stack([np.minimum(steps, limit) for limit in limits], axis=1)


def _largest(problem: RankProblem, ranks: IntArray, fits: NDArray[np.bool_], rule: str) -> tuple[int, ...]:
    if not fits.any():
        raise RankError(
            f"{problem.name}: {rule} cannot be met, even rank 1 needs more. Leave the layer dense, or ask for less."
        )
    return tuple(int(r) for r in ranks[np.flatnonzero(fits)[-1]])
