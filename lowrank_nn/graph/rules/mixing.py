"""Operations that mix what stands along some dimensions: norms, softmax, pooling, reductions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.graph.labels import Labels, in_groups, join_dims, merge, mix, support
from lowrank_nn.graph.rules._call import RULES, Call, Outcome, Planes, Rule, aligned, functions, normal_dims, rule_for
from lowrank_nn.graph.rules.elementwise import elementwise, per_channel
from lowrank_nn.graph.units import Mean


def of_parameters(labels: Labels) -> bool:
    """Whether a tensor is computed of parameters alone: a weight, on its way to where it is used."""
    return labels.constant == 2


def mix_all(call: Call, labels: Labels, dims: Iterable[int]) -> Planes:
    """Return the planes of a tensor of which an operation mixes all along ``dims``, without changing its dimensions."""
    dims = set(dims)
    mixed = (mix(call.units, plane, dims, call.where) for plane in labels.planes)
    return [plane for plane in mixed if plane is not None]


STATISTICS = frozenset(itertools.chain(*map(functions, ("mean", "var", "std", "var_mean", "std_mean"))))
"""Statistics, which may go on being those of what is left of a weight, or of the channels that a forward normalises."""


_SUMS = frozenset(itertools.chain(*map(functions, ("sum", "nansum"))))
_NORMS = frozenset(itertools.chain(*map(functions, ("norm", "vector_norm"))))


def _skips_zeros(call: Call) -> bool:
    """Whether a function sums, so that zeros do not count; a norm of negative order is a minimum."""
    order = call.argument(1, "p", call.kwargs.get("ord"))
    return call.function in _SUMS or (call.function in _NORMS and (isinstance(order, str | None) or order > 0))


def dims_of(call: Call, position: int = 1, default: Any = None) -> list[int]:
    """Return the dimensions that an argument ``dim`` names, or ``axis``."""
    dims = call.argument(position, "dim", call.kwargs.get("axis", default))
    return normal_dims(dims, len(call.first.shape))


def _along(position: int, default: Any = None) -> Rule:
    """Return the rule of functions that mix along the dimensions that an argument ``dim`` names."""

    def rule(call: Call) -> Callable[[], list[Planes]]:
        labels, count = call.first, len(call.first.shape)
        dims = dims_of(call, position, default)
        over: list[Tensor] = []  # planes along these dims alone, whose units go one by one: they are not mixed
        statistic = call.function in STATISTICS and (of_parameters(labels) or not labels.constant)
        if statistic or _skips_zeros(call):
            over = [plane for plane in labels.planes if support(plane) <= set(dims)]
            left = [plane for plane in labels.planes if not support(plane) <= set(dims)]
            labels = dataclasses.replace(labels, planes=tuple(left))

        def planes() -> list[Planes]:
            if statistic and not labels.constant:
                means = (Mean(call.number, tuple(support(p)), p.reshape(-1), call.where) for p in over)
                call.means.extend(means)
            mixed = mix_all(call, labels, dims)
            if not call.shapes or len(call.shapes[0]) == count:
                return [mixed]
            index = tuple(0 if dim in dims else slice(None) for dim in range(count))
            return [[plane[index] for plane in mixed]]

        return planes

    return rule


rule_for(
    """softmax log_softmax softmin mean sum nansum nanmean prod amax amin aminmax argmax argmin std var std_mean
    var_mean logsumexp any all median nanmedian cumsum cumprod cummax cummin logcumsumexp msort count_nonzero"""
)(_along(1))
rule_for("sort argsort mode")(_along(1, -1))
rule_for("norm vector_norm")(_along(2))
rule_for("topk kthvalue")(_along(2, -1))


@rule_for("tril triu")
def triangle(call: Call) -> list[Planes]:
    """Which elements stay is a matter of their numbers along the last two dimensions."""
    count = len(call.first.shape)
    return [mix_all(call, call.first, (count - 2, count - 1))]


@rule_for("diff")
def diff(call: Call) -> Outcome | None:
    """Differences of neighbours; None where others are put around them."""
    return None if len(call.operands()) > 1 else _along(2, -1)(call)


def _transform(count: int | None) -> Rule:
    """Return the rule of Fourier transforms along ``count`` dimensions if none are named; None for all of them."""

    def rule(call: Call) -> list[Planes]:
        dims, sizes, total = call.argument(2, "dim"), call.argument(1, "s"), len(call.first.shape)
        last = count or (len(sizes) if sizes is not None else total)
        return [mix_all(call, call.first, normal_dims(range(-last, 0) if dims is None else dims, total))]

    return rule


for _ending, _count in (("", 1), ("2", 2), ("n", None)):
    for _kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
        RULES[getattr(torch.fft, f"{_kind}{_ending}")] = _transform(_count)


@rule_for("view_as_complex view_as_real")
def complex_view(call: Call) -> list[Planes]:
    """Real and imaginary parts along a last dimension, which stay two, or as complex numbers."""
    count = len(call.first.shape)
    if len(call.shapes[0]) > count:
        return [[plane.unsqueeze(-1) for plane in call.first.planes]]
    return [[plane[..., 0] for plane in mix_all(call, call.first, [count - 1])]]


@rule_for("max min")
def extremum(call: Call) -> Outcome | None:
    """Over dimensions, or of two tensors."""
    return elementwise(call) if len(call.operands()) > 1 else _along(1)(call)


def _pool(spatial: int) -> Rule:
    """Return the rule of functions that mix along the last ``spatial`` dimensions, and change their sizes."""

    def rule(call: Call) -> list[Planes]:
        count = len(call.first.shape)
        return [mix_all(call, call.first, range(count - spatial, count))]

    return rule


for _dims in (1, 2, 3):
    rule_for(
        " ".join(
            f"{kind}{_dims}d{ending}"
            for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
            for ending in ("", "_with_indices")
        )
    )(_pool(_dims))


@rule_for("interpolate upsample upsample_nearest upsample_bilinear")
def interpolate(call: Call) -> list[Planes]:
    """Mix over space."""
    return [mix_all(call, call.first, range(2, len(call.first.shape)))]


@rule_for("grid_sample")
def grid_sample(call: Call) -> list[Planes]:
    """Mix over space; the grid stays."""
    call.units.freeze(call.labels(call.argument(1, "grid")).ids(), f"used as a grid by {call.where}")
    return interpolate(call)


@rule_for("local_response_norm")
def local_response_norm(call: Call) -> list[Planes]:
    """Each channel is divided by what its neighbours are."""
    return [mix_all(call, call.first, [1])]


@rule_for("batch_norm")
def batch_norm(call: Call) -> list[Planes]:
    """Each channel has its statistics, over the batch and space (also in training).

    Of a weight that is standardised, each filter has, over what it reads; that goes one by one, and what is left is
    standardised.
    """
    dims = [dim for dim in range(len(call.first.shape)) if dim != 1]
    planes = list(call.first.planes) if of_parameters(call.first) else mix_all(call, call.first, dims)
    return [per_channel(call, planes, _norm_parameters(call))]


@rule_for("instance_norm")
def instance_norm(call: Call) -> list[Planes]:
    """Each channel has its statistics, over space."""
    return [per_channel(call, mix_all(call, call.first, range(2, len(call.first.shape))), _norm_parameters(call))]


def _norm_parameters(call: Call) -> list[Labels]:
    names = ("running_mean", "running_var", "weight", "bias")
    return [call.labels(call.argument(position, name)) for position, name in enumerate(names, start=1)]


@rule_for("group_norm")
def group_norm(call: Call) -> list[Planes]:
    """A group of channels is normalised as one: it goes as a whole; a single group as those of a layer norm."""
    groups = call.argument(1, "num_groups")
    parameters = [call.labels(call.argument(position, name)) for position, name in ((2, "weight"), (3, "bias"))]
    planes = mix_all(call, call.first, range(2, len(call.first.shape)))
    if groups == 1 and isinstance(call.argument(2, "weight"), nn.Parameter):
        return [per_channel(call, planes, parameters)]
    grouped = in_groups(Labels(call.first.shape, tuple(planes)), 1, groups)
    mixed = mix_all(call, grouped, [2])
    return [per_channel(call, [join_dims(plane, 1, grouped.shape[1:3]) for plane in mixed], parameters)]


@rule_for("layer_norm rms_norm")
def layer_norm(call: Call) -> list[Planes]:
    """Channels with a weight of their own go one by one, and what is left is normalised; others go all together."""
    labels, count = call.first, len(call.first.shape)
    shape, weight = call.argument(1, "normalized_shape"), call.argument(2, "weight")
    parameters = [call.labels(call.argument(position, name)) for position, name in ((2, "weight"), (3, "bias"))]
    first = count - len(shape)
    if not isinstance(weight, nn.Parameter):
        labels = dataclasses.replace(labels, planes=tuple(mix_all(call, labels, range(first, count))))
        for parameter in parameters:
            call.units.freeze(parameter.ids(), f"mixed by {call.where}")
    planes = merge(call.units, [labels, *(aligned(p, count) for p in parameters if p.shape)], call.where)
    for plane, (dim, size) in itertools.product(planes, enumerate(shape, first)):
        call.note_size(size, plane, dim)
    return [planes]
