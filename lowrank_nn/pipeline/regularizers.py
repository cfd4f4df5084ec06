"""Penalties that drive whole units of a network to zero during training, so that pruning them costs nothing."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lowrank_nn.errors import OptionError, PlanError
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.graph.sites import describe_paths, find_sites
from lowrank_nn.layers._masks import Granularity, Units
from lowrank_nn.pipeline.select import Patterns, select

FOR_LINEAR = ("element", "channel", "filter")
"""Granularities that a linear layer has."""


class Regularizer(abc.ABC):
    """A penalty on the weights of a model: ``loss = loss + penalty(model)``, or ``FineTune(regularizer=penalty)``.

    Args:
        strength: Factor of the penalty, not negative.
    """

    def __init__(self, strength: float) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise OptionError(f"{type(self).__name__}: strength must be a number from 0, got {strength!r}.")
        self.strength = strength

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar that gradients flow through.

        Args:
            model: The model in training.

        Raises:
            PlanError: There is nothing in the model that the penalty is about.
        """
        return self.strength * torch.stack([term.sum() for term in self.terms(model)]).sum()

    @abc.abstractmethod
    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the penalties of units, without the factor, in pieces of any shape; at least one."""


class GroupLasso(Regularizer):
    r"""Group lasso (l2,1 norm) on the units of each convolution and linear layer.

    .. math:: R(W) = \lambda \sum_l \sum_u \sqrt{n_u} \, \| W_{l,u} \|_2

    with u the units of layer l and n_u the weights in one, so that units of all sizes are under the same pressure.
    The gradient is :math:`\lambda \sqrt{n_u} W_u / \| W_u \|`; where a unit is zero it is zero, which is a subgradient.

    Acts on ``nn.Conv2d`` and ``nn.Linear``, the factors inside low-rank layers included.

    Args:
        strength: The factor lambda; 1e-5 to 1e-3 beside a mean cross-entropy.
        granularity: What a unit is; see :class:`lowrank_nn.PrunedConv2d`. ``"filter"`` and ``"channel"`` for removal,
            ``"group"`` (one kernel position of one channel, over all filters) or ``"shape"`` for kernel shapes. Linear
            layers that do not have the granularity are left out.
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave alone, such as the classifier.

    Raises:
        OptionError: ``strength`` is negative.

    References:
        Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks"; Lebedev and Lempitsky 2016, "Fast
        ConvNets Using Group-wise Brain Damage"; Yuan and Lin 2006, "Model Selection and Estimation in Regression with
        Grouped Variables" (the factor sqrt(n)).
    """

    def __init__(
        self,
        strength: float,
        granularity: Granularity = "filter",
        *,
        where: Patterns = "*",
        but_not: Patterns = (),
    ) -> None:
        super().__init__(strength)
        Units.of(type(self).__name__, granularity, (1, 1, 1, 1))  # refuses an unknown granularity
        self.granularity: Granularity = granularity
        self.where, self.but_not = where, but_not

    def __repr__(self) -> str:
        return f"GroupLasso({self.strength}, {self.granularity!r}, where={self.where!r}, but_not={self.but_not!r})"

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield sqrt(n_u) ||W_u|| of all units, layer by layer."""
        name = type(self).__name__
        fitting = (nn.Conv2d, nn.Linear) if self.granularity in FOR_LINEAR else (nn.Conv2d,)
        for layer in _chosen(name, model, fitting, self.where, self.but_not):
            assert isinstance(layer.weight, Tensor)
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            units = Units.of(name, self.granularity, tuple(layer.weight.shape), groups)
            yield math.sqrt(units.size) * units.norms(layer.weight)


class ChannelLasso(Regularizer):
    r"""Group lasso on whole channel groups: everything that goes when a channel is removed, as one unit.

    .. math:: R = \lambda \sum_u \sqrt{n_u} \Big( \sum_{m} \| \theta_{m,u} \|_2^2 \Big)^{1/2}

    with :math:`\theta_{m,u}` the slice that unit u has of member m (rows of producers, columns of consumers, scale and
    shift of norms, biases; buffers do not count), and n_u the number of weights in all of them. So a channel vanishes
    from all layers that a residual sum ties together at once, and ``Prune`` can remove it at no loss.

    Args:
        groups: What :func:`lowrank_nn.find_groups` returned for the model; frozen groups are left out.
        strength: The factor lambda.

    Raises:
        OptionError: ``strength`` is negative, or all groups are frozen.

    References:
        Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks"; Fang et al. 2023, "DepGraph: Towards
        Any Structural Pruning" (over all members of a group).
    """

    def __init__(self, groups: Sequence[ChannelGroup], strength: float) -> None:
        super().__init__(strength)
        self.groups = tuple(group for group in groups if not group.frozen)
        if not self.groups:
            raise OptionError("ChannelLasso: there is no group that anything can be removed from. Print the groups.")
        self._positions = [
            [torch.tensor(member.positions, device="cpu") for member in group.members] for group in self.groups
        ]

    def __repr__(self) -> str:
        return f"ChannelLasso({len(self.groups)} groups, {self.strength})"

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield sqrt(n_u) ||theta_u|| of all units, group by group.

        Raises:
            PlanError: The groups are not those of this model.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for group, positions in zip(self.groups, self._positions, strict=True):
            slices = [
                _slices(parameters[member.name], member, where)
                for member, where in zip(group.members, positions, strict=True)
                if member.name in parameters
            ]
            if not slices:
                raise PlanError(
                    f"ChannelLasso: the model has no parameter of the group {group.name!r}. Find the groups of the "
                    "model that is trained."
                )
            size = sum(part[0].numel() for part in slices)
            norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in slices])
            yield math.sqrt(size) * torch.linalg.vector_norm(norms, dim=0)


class ScaleL1(Regularizer):
    r"""L1 norm of the scales of batch normalisations: network slimming.

    .. math:: R = \lambda \sum_l \| \gamma_l \|_1

    Channels whose scale goes to zero become constant, and ``Prune(criterion="bn_scale")`` removes them. The gradient is
    :math:`\lambda \operatorname{sign}(\gamma)`, zero at zero.

    Args:
        strength: The factor lambda; 1e-5 to 1e-4 beside a mean cross-entropy.
        where: Shell patterns on dotted paths of the norms wanted.
        but_not: Shell patterns of the norms to leave alone.

    Raises:
        OptionError: ``strength`` is negative.

    References:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """

    def __init__(self, strength: float, *, where: Patterns = "*", but_not: Patterns = ()) -> None:
        super().__init__(strength)
        self.where, self.but_not = where, but_not

    def __repr__(self) -> str:
        return f"ScaleL1({self.strength}, where={self.where!r}, but_not={self.but_not!r})"

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield |gamma| of all norms.

        Raises:
            PlanError: No norm that is wanted has a scale.
        """
        norms = _chosen(type(self).__name__, model, (_NormBase,), self.where, self.but_not)
        scales = [norm.weight.abs() for norm in norms if isinstance(norm.weight, Tensor)]
        if not scales:
            raise PlanError("ScaleL1: no batch normalisation among those wanted has a scale (affine=True).")
        yield from scales


def _slices(parameter: Tensor, member: Member, positions: Tensor) -> Tensor:
    """Return what each unit has of a parameter, shape (units, weights)."""
    along = parameter.movedim(member.dim, 0)
    if int(positions.max()) >= len(along):
        raise PlanError(
            f"ChannelLasso: {member.name} has {len(along)} entries along dim {member.dim}, the group wants "
            f"{int(positions.max()) + 1}. Find the groups again after channels were removed."
        )
    return along[positions.to(parameter.device)].flatten(1)


def _chosen(
    name: str, model: nn.Module, kinds: tuple[type[nn.Module], ...], where: Patterns, but_not: Patterns
) -> list[nn.Module]:
    """Return the layers of these kinds that are wanted."""
    sites = [site for site in find_sites(model) if isinstance(site.layer, kinds)]
    chosen = [site.layer for site in select(sites, where, but_not, name)]
    if not chosen:
        raise PlanError(f"{name}: but_not leaves no layer. {describe_paths(site.path for site in sites)}")
    return chosen
