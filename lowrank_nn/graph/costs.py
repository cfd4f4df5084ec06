"""The cost of sites and of whole models, for one recorded forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lowrank_nn.cost import Cost, dense_macs, tensor_cost
from lowrank_nn.cost.flops import FlopCounter
from lowrank_nn.errors import PlanError
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.graph.sites import Recording, Site
from lowrank_nn.layers import CompressedLayer


def site_cost(site: Site) -> Cost:
    """Return the cost of a site: its tensors once, and the multiply-accumulates of all its recorded calls.

    Of a compressed layer, what reading its weight took counts among these. Of one that was never called the tensors
    count as they are in memory.
    """
    layer = site.layer
    if isinstance(layer, CompressedLayer):
        reads = Cost(macs=site.weight_reads * _weight_macs(layer) if site.weight_reads else 0)
        calls = [layer.cost(call.input_shape) for call in site.calls]
        if not calls:
            return sum((tensor_cost(module) for module in layer.modules()), reads)
        return calls[0] + reads + Cost(macs=sum(cost.macs for cost in calls[1:]))
    return tensor_cost(layer) + Cost(macs=sum(_macs(layer, call.input_shape) for call in site.calls))


def model_cost(model: nn.Module, recording: Recording) -> Cost:
    """Return the cost of a model: every tensor once, and the multiply-accumulates of the recorded forward.

    Compressed layers count as their ``cost`` says, all else by its tensors (parameters and persistent buffers; shared
    and tied ones once) and the formulas of :func:`site_cost`; :attr:`Recording.other_macs` is added.

    Args:
        model: The model that was recorded, unchanged since then.
        recording: What :func:`record` returned for it.

    Raises:
        PlanError: The model holds other layers than the recorded one.
    """
    _check_recorded(model, recording)
    outermost = [site for site in recording.sites if site.inside is None]
    total = Cost(macs=recording.other_macs + sum(site_cost(site).macs for site in outermost))
    seen: set[Tensor] = set()
    for site in outermost:
        if isinstance(site.layer, CompressedLayer):
            own = set(itertools.chain(site.layer.parameters(), site.layer.buffers()))
            total += _without_macs(site_cost(site)) - _storage(own & seen)
            seen |= own
    return total + _storage(set(_stored_tensors(model)) - seen)


def _weight_macs(layer: CompressedLayer) -> int:
    """Return what one read of the weight takes, counted as it runs on the meta device."""
    bare = meta_copy(layer)
    assert isinstance(bare, CompressedLayer)
    with torch.no_grad(), FlopCounter() as counter:
        bare.dense_weight()
    macs: int = counter.flops // 2
    return macs


def _check_recorded(model: nn.Module, recording: Recording) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = [site.path for site in recording.sites if modules.get(site.path) is not site.layer]
    if changed:
        raise PlanError(f"model_cost: the model's layers at {changed} are not the recorded ones. Record it again.")


def _stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from module.parameters(recurse=False)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _storage(tensors: set[Tensor]) -> Cost:
    params = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))
    return Cost(params=params, bytes=sum(t.numel() * t.element_size() for t in tensors), nonzeros=params)


def _without_macs(cost: Cost) -> Cost:
    return cost - Cost(macs=cost.macs)


def _macs(layer: nn.Module, input_shape: Sequence[int]) -> int:
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return recurrent_macs(layer, input_shape)
    return dense_macs(layer, input_shape)


def recurrent_macs(layer: nn.RNNBase | nn.RNNCellBase, input_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of one call of a recurrent layer or cell: its weight matrices at every position.

    Args:
        layer: ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` or one of their cells.
        input_shape: Shape of its input, ``(*, input_size)``: batched or not, or the packed data of a sequence.
    """
    matrices = sum(p.numel() for p in layer.parameters(recurse=False) if p.dim() == 2)
    return math.prod(input_shape[:-1]) * matrices
