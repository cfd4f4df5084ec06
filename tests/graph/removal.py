"""Removing and zeroing units by hand, to hold channel groups against."""

import collections
import copy
import functools
import random

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowrank_nn.graph.inputs import call_model, tensors
from tests.zoo.language import RootMeanSquareNorm
from tests.zoo.nfnet import StandardisedConv2d

HEADS = {"num_heads", "n_heads", "heads", "kv_heads"}
"""Attributes that count the heads of an attention module."""


def assert_removable(model, inputs, groups):
    """For each group that is not frozen, and for all together: removing half of the units is zeroing them."""
    rng = random.Random(0)
    removals = [(g, rng.sample(range(g.size), max(1, g.size // 2))) for g in groups if not g.frozen]
    for chosen in [*([removal] for removal in removals), removals]:
        expected = list(tensors(_run(zeroed(model, chosen), inputs)))
        result = list(tensors(_run(removed(model, chosen), inputs)))
        names = ", ".join(group.name for group, _ in chosen)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9, msg=f"not the same without {names}")


@torch.no_grad()
def _run(model, inputs):
    return call_model(model, inputs)


def doomed(removals):
    """By name of a tensor and dim, the positions that go; ``removals`` are pairs of a group and unit numbers."""
    positions = collections.defaultdict(set)
    for group, units in removals:
        for member in group.members:
            for unit in units:
                positions[member.name, member.dim].update(member.positions[unit])
    return positions


@torch.no_grad()
def zeroed(model, removals):
    """A copy with all members of the units set to zero."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for (name, dim), positions in doomed(removals).items():
        tensor = tensors[name].data
        index = torch.tensor(sorted(positions))
        tensors[name].data = tensor.index_fill(dim, index, 0)
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.LayerNorm):
            owner.forward = functools.partial(_normalised_without, owner, positions)
        if isinstance(owner, nn.GroupNorm) and owner.num_groups == 1:
            owner.forward = functools.partial(_normalised_without, owner, positions)
        if isinstance(owner, RootMeanSquareNorm):
            owner.forward = functools.partial(_scaled_without, owner, positions)
        if isinstance(owner, StandardisedConv2d) and dim == 1:
            owner.standardised = functools.partial(_standardised_without, owner, positions)
    return model


def _normalised_without(norm, gone, x):
    """Layer normalisation, or that of one group of channels, by its formula, over the channels that are left."""
    there = torch.tensor([float(i not in gone) for i in range(len(norm.weight))], dtype=x.dtype)
    dims, weight, bias = [-1], norm.weight, norm.bias
    if isinstance(norm, nn.GroupNorm):
        dims = list(range(1, x.dim()))
        there, weight, bias = (t.reshape(-1, *(1,) * (x.dim() - 2)) for t in (there, weight, bias))
    count = there.expand_as(x[:1]).sum(dims, keepdim=True)
    mean = (x * there).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * there).sum(dims, keepdim=True) / count
    return ((x - mean) / (variance + norm.eps).sqrt() * weight + bias) * there


def _scaled_without(norm, gone, x):
    """Division by the root mean square, by its formula, over the channels that are left."""
    there = torch.tensor([float(i not in gone) for i in range(len(norm.weight))], dtype=x.dtype)
    square = (x.square() * there).sum(-1, keepdim=True) / there.sum()
    return x / (square + 1e-6).sqrt() * norm.weight * there


def _standardised_without(conv, gone):
    """Weight standardisation by its formula, over the input channels that are left."""
    weight = conv.weight
    there = torch.tensor([float(i not in gone) for i in range(weight.shape[1])], dtype=weight.dtype)[:, None, None]
    count = there.sum() * weight[0, 0].numel()
    mean = (weight * there).sum((1, 2, 3), keepdim=True) / count
    variance = ((weight - mean).square() * there).sum((1, 2, 3), keepdim=True) / count
    return (weight - mean) / (variance + 1e-6).sqrt() * there * conv.gain * conv.scale


@torch.no_grad()
def removed(model, removals):
    """A copy without the units; the sizes that torch's layers keep as attributes follow their weights."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    positions = doomed(removals)
    groups = {path: _groups_left(path, module, positions) for path, module in model.named_modules()}
    for (name, dim), gone in positions.items():
        tensor = tensors[name].data
        kept = torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone])
        assert len(kept), f"nothing left of {name}"
        tensors[name].data = tensor.index_select(dim, kept)
    for path, module in model.named_modules():
        _fit_attributes(module, groups[path])
        for name in HEADS & vars(module).keys():
            for group, units in removals:
                count = getattr(module, name)
                if group.name.startswith(path) and count % group.size == 0:
                    setattr(module, name, count // group.size * (group.size - len(units)))
    return model


def _groups_left(path, module, positions):
    if isinstance(module, _ConvNd) and module.groups > 1:
        gone = positions.get((f"{path}.weight".lstrip("."), 0), set())
        size = module.weight.shape[0] // module.groups
        blocks = {position // size for position in gone}
        return module.groups - (len(blocks) if len(blocks) * size == len(gone) else 0)
    if isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        return max(1, module.num_groups - len(positions.get((f"{path}.weight", 0), ())) // size)
    return getattr(module, "groups", 1)


def _fit_attributes(module, groups):
    if isinstance(module, _ConvNd):
        module.groups = groups
        first, second = module.weight.shape[:2]
        transposed = isinstance(module, _ConvTransposeNd)
        module.out_channels = second * groups if transposed else first
        module.in_channels = first if transposed else second * groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = groups, len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.weight_ih_l0.shape[1]
        module.hidden_size = (module.weight_hr_l0 if module.proj_size else module.weight_hh_l0).shape[1]
        module.proj_size = len(module.weight_hr_l0) if module.proj_size else 0
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
