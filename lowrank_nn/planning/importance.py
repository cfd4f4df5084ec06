"""How much each unit of a channel group matters: the criteria of filter pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.graph.fold import DENSE, computed_weight
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.graph.surgery import named_tensors
from lowrank_nn.planning.fisher import BatchLoss
from lowrank_nn.planning.moment_scores import MOMENT_CRITERIA, from_moments
from lowrank_nn.planning.similar import similarity_scores, unit_columns, unit_rows
from lowrank_nn.planning.unit_signals import Score, from_inputs, from_loss, mean_of, relative, unit_slices

UnitCriterion = Callable[[nn.Module, ChannelGroup], Tensor]
"""``criterion(model, group)``: a number for each unit of the group, larger for those that matter more."""

FROM_WEIGHTS = ("l1", "l2", "bn_scale", "geometric_median", "similar", "random")
FROM_INPUTS = ("activation", "apoz")
FROM_LOSS = ("taylor", "obd")
ADDITIVE = (*MOMENT_CRITERIA, *FROM_LOSS)
"""Criteria that estimate what is lost with a unit, in one unit for all groups: it can be set against what is saved."""
UNIT_CRITERIA = (*FROM_WEIGHTS, *FROM_INPUTS, *MOMENT_CRITERIA, *FROM_LOSS)
_MULTIPLYING = {**dict.fromkeys(MOMENT_CRITERIA, ("in",)), "similar": ("in", "through", "out")}
"""Criteria that multiply by weights or add them up, and the roles of those: the weights that layers compute with."""


def unit_importance(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str | UnitCriterion = "l1",
    *,
    calibration: Iterable[Any] | None = None,
    batches: Iterable[Any] | None = None,
    loss: BatchLoss | None = None,
    corrected: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    r"""Return the importance of each unit of each group.

    A unit is scored over all members of its group. With w_m(u) for the slices of member m that go with unit u, and
    relative values, over their mean in the group, wherever the unit of a score means nothing across groups:

    - ``"l1"``, ``"l2"``: mean over the weights that compute the unit or read it of \|\|w_m(u)\|\|, relative.
    - ``"bn_scale"``: mean of \|gamma\| over the norms that the unit passes, relative.
    - ``"geometric_median"``: sum over the other units v of the distance of the rows, \|\|w_out(u) - w_out(v)\|\|,
      relative: what is near the middle of all rows can be replaced by them.
    - ``"similar"``: how far the unit is from another one that can stand in for it, times the weights that read it; see
      :func:`lowrank_nn.planning.similar.similarity_scores`. Norms count as they are: fold them before.
    - ``"activation"``: mean \|a\| of the unit's activation where it is read, relative.
    - ``"apoz"``: share of the unit's activations that are not zero.
    - ``"lasso"``, ``"thinet"``, ``"obs"``: what the network's output loses, by the second moments of what reads the
      unit: by LASSO regression, by greedy removal, by removal with the best update of the weights that remain; see
      :mod:`lowrank_nn.planning.selection`. In units of the output, squared.
    - ``"taylor"``: mean over batches of \|sum w dL/dw\| over the weights that read the unit: the first-order change of
      the loss when they become zero. In units of the loss.
    - ``"obd"``: 1/2 sum F w^2 over the weights that read the unit, F the diagonal Fisher information. In units of
      the loss.
    - ``"random"``: uniform in [0, 1).

    Args:
        model: The model; left as it was.
        groups: Groups of this model.
        criterion: One of these, or a function ``criterion(model, group)`` that returns a number for each unit.
        calibration: Batches of inputs, for ``"activation"``, ``"apoz"``, ``"lasso"``, ``"thinet"`` and ``"obs"``.
        batches: Batches for ``loss``, for ``"taylor"`` and ``"obd"``; for ``"obd"`` they are cut into samples.
        loss: ``loss(model, batch)``, a scalar.
        corrected: Whether the change of mean outputs will be made up for, by biases and norms; then a constant unit
            costs nothing by ``"lasso"``, ``"thinet"`` and ``"obs"``.
        seed: Seed of ``"random"``, and of what is sampled.
        progress: Whether to show a progress bar over ``calibration`` (never when the output is not a terminal).

    Returns:
        By name of the group a float64 tensor of shape ``(group.size,)`` on the CPU. Groups that the criterion says
        nothing about are left out: without a norm, read by nothing but products of activations, or with an
        :func:`obstacle`.

    Raises:
        OptionError: There is no such criterion, or a function returned something else than a number for each unit.
        CalibrationError: The data or the loss that the criterion needs are missing, or not finite.

    References:
        Li et al. 2017, "Pruning Filters for Efficient ConvNets" (l1); Liu et al. 2017, "Network Slimming" (bn_scale);
        He et al. 2019, "Filter Pruning via Geometric Median"; Srinivas and Babu 2015, "Data-free Parameter Pruning"
        (similar); Hu et al. 2016, "Network Trimming" (apoz); He et al. 2017, "Channel Pruning for Accelerating Very
        Deep Neural Networks" (lasso); Luo et al. 2017, "ThiNet"; Hassibi and Stork 1993, "Optimal Brain Surgeon" (obs);
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning" (taylor); Theis et al. 2018, "Faster
        gaze prediction with dense networks and Fisher pruning" (obd); Fang et al. 2023, "DepGraph" (scores over whole
        groups, relative to their mean).
    """
    tensors = named_tensors(model)
    groups = [group for group in groups if not obstacle(model, group, criterion)]
    score: Score
    if callable(criterion):
        score = functools.partial(criterion, model)
    elif criterion in FROM_INPUTS:
        score = from_inputs(model, groups, criterion, calibration, progress)
    elif criterion in MOMENT_CRITERIA:
        score = from_moments(model, groups, criterion, calibration, corrected=corrected, seed=seed, progress=progress)
    elif criterion in FROM_LOSS:
        score = from_loss(model, groups, criterion, batches, loss)
    elif criterion in FROM_WEIGHTS:
        generator = torch.Generator().manual_seed(seed)
        score = {
            "l1": lambda group: _mean_norm(model, tensors, group, 1),
            "l2": lambda group: _mean_norm(model, tensors, group, 2),
            "bn_scale": lambda group: _scale(model, tensors, group),
            "geometric_median": lambda group: _distance(tensors, group),
            "similar": lambda group: similarity_scores(unit_rows(tensors, group), unit_columns(tensors, group)),
            "random": lambda group: torch.rand(group.size, generator=generator, dtype=torch.float64, device="cpu"),
        }[criterion]
    else:
        raise OptionError(f"criterion must be one of {', '.join(UNIT_CRITERIA)}, or a function, got {criterion!r}.")
    with torch.no_grad():
        found = {group.name: score(group) for group in groups}
    return {g.name: _checked(g, values, criterion) for g in groups if (values := found[g.name]) is not None}


def obstacle(model: nn.Module, group: ChannelGroup, criterion: str | UnitCriterion) -> str:
    """Return why a criterion would judge a group by wrong weights; empty where it would not.

    ``"lasso"``, ``"thinet"``, ``"obs"`` and ``"similar"`` take the weights of convolutions and linear layers as they
    are stored. A layer of a class of its own may compute with others, such as a convolution that standardises them.

    Args:
        model: The model.
        group: One of its groups.
        criterion: As for :func:`unit_importance`.
    """
    roles = _MULTIPLYING.get(criterion, ()) if isinstance(criterion, str) else ()
    paths = dict.fromkeys(member.name.rpartition(".")[0] for member in group.members if member.role in roles)
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, DENSE) and (why := computed_weight(layer)):
            return f"{path} may compute with another weight: {why}"
    return ""


def _checked(group: ChannelGroup, values: Any, criterion: str | UnitCriterion) -> Tensor:
    if not isinstance(values, Tensor) or tuple(values.shape) != (group.size,):
        what = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"{type(values).__name__}"
        raise OptionError(
            f"criterion must return a tensor of shape ({group.size},), a number for each unit of {group.name}; it "
            f"returned {what}."
        )
    scores: Tensor = values.detach().double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise CalibrationError(f"the importance of some units of {group.name} by {criterion!r} is not finite.")
    return scores


def _owner(model: nn.Module, member: Member) -> nn.Module:
    return model.get_submodule(member.name.rpartition(".")[0])


def _mean_norm(model: nn.Module, tensors: dict[str, Tensor], group: ChannelGroup, order: int) -> Tensor | None:
    """Return the mean of relative norms over all weights in the group, those of depthwise convolutions included."""
    weights = [
        member
        for member in group.members
        if tensors[member.name].dim() >= 2 and (member.role != "through" or isinstance(_owner(model, member), _ConvNd))
    ]
    slices = [unit_slices(tensors[member.name], member) for member in weights]
    return mean_of([relative(torch.linalg.vector_norm(rows, order, dim=1)) for rows in slices])


def _scale(model: nn.Module, tensors: dict[str, Tensor], group: ChannelGroup) -> Tensor | None:
    norms = [
        member
        for member in group.members
        if member.name.endswith("weight") and isinstance(_owner(model, member), (_NormBase, nn.GroupNorm))
    ]
    return mean_of([relative(unit_slices(tensors[member.name], member).abs().mean(1)) for member in norms])


def _distance(tensors: dict[str, Tensor], group: ChannelGroup) -> Tensor | None:
    rows = [unit_slices(tensors[m.name], m) for m in group.members if m.role == "out" and tensors[m.name].dim() >= 2]
    if not rows:
        return None
    joined = torch.cat(rows, 1)
    return relative(torch.cdist(joined, joined).sum(1))
