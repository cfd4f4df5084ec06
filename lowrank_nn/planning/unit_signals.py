"""What batches say about the units of channel groups: their activations, and what a loss thinks of their readers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.planning.calibration import run_batches, watch
from lowrank_nn.planning.fisher import BatchLoss, diagonal_fisher

Score = Callable[[ChannelGroup], Tensor | None]
"""Scores the units of a group; None where there is nothing to score them by."""


def unit_slices(tensor: Tensor, member: Member) -> Tensor:
    """Return what of a tensor goes with each unit of a member, shape ``(units, entries)``, float64."""
    index = torch.tensor(member.positions, device=tensor.device)
    rows = tensor.detach().movedim(member.dim, 0)[index]
    return (torch.view_as_real(rows) if rows.is_complex() else rows).flatten(1).double()


def relative(values: Tensor) -> Tensor:
    """Return non-negative values over their mean."""
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def mean_of(values: list[Tensor]) -> Tensor | None:
    """Return the mean of tensors of one shape, on the CPU; None of none."""
    return torch.stack([value.cpu() for value in values]).mean(0) if values else None


def readers(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[str, Any, Member]]:
    """Yield the convolutions and linear layers that read the units: path, layer and the member that is its weight."""
    for member in group.members:
        path, _, name = member.name.rpartition(".")
        layer = model.get_submodule(path)
        if member.role == "in" and name == "weight" and isinstance(layer, (_ConvNd, nn.Linear)):
            yield path, layer, member


def _is_plain(layer: nn.Module) -> bool:
    """Whether the columns of the weight are the channels of the input."""
    return not isinstance(layer, _ConvNd) or layer.groups == 1


def from_inputs(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str,
    calibration: Iterable[Any] | None,
    progress: bool,
) -> Score:
    """Measure the inputs of all readers, and return what scores a group by them.

    Raises:
        CalibrationError: There are no batches, or they are not usable.
    """
    if calibration is None:
        raise CalibrationError(
            f"criterion={criterion!r} looks at activations and there are no calibration batches. Pass "
            "compress_model(..., calibration=batches)."
        )
    layers = {path: layer for group in groups for path, layer, _ in readers(model, group) if _is_plain(layer)}
    signal = (lambda x: x != 0) if criterion == "apoz" else torch.abs
    of_channels = _channel_means(model, layers, signal, calibration, progress)

    def score(group: ChannelGroup) -> Tensor | None:
        means = [
            of_channels[path][torch.tensor(member.positions, device=of_channels[path].device)].mean(1)
            for path, _, member in readers(model, group)
            if path in of_channels
        ]
        return mean_of(means if criterion == "apoz" else [relative(mean) for mean in means])

    return score


def _channel_means(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    signal: Callable[[Tensor], Tensor],
    calibration: Iterable[Any],
    progress: bool,
) -> dict[str, Tensor]:
    """Return the mean of ``signal`` of each input channel of the layers, by path; of those that are called."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, channels: int, x: Tensor) -> None:
        samples = signal(x).double().movedim(channels, -1).flatten(0, -2)
        totals[path] = totals.get(path, 0) + samples.sum(0)
        counts[path] = counts.get(path, 0) + len(samples)

    with evaluating(model):
        for path, layer in layers.items():
            channels = -1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
            watch(layer, path, before=functools.partial(add, path, channels))
        for _ in run_batches(model, calibration, max_batches=None, progress=progress):
            pass
    return {path: total / counts[path] for path, total in totals.items()}


def from_loss(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str,
    batches: Iterable[Any] | None,
    loss: BatchLoss | None,
) -> Score:
    """Propagate the loss back, and return what scores a group by what its readers do to it.

    Raises:
        CalibrationError: There are no batches or no loss, or it is not one number that depends on the weights.
    """
    if batches is None or loss is None:
        raise CalibrationError(
            f"criterion={criterion!r} needs batches=... and loss=... (loss(model, batch) -> scalar)."
        )
    if criterion == "taylor":
        return _first_order(model, groups, batches, loss)
    paths = dict.fromkeys(path for group in groups for path, _, _ in readers(model, group))
    fisher = diagonal_fisher(model, batches, loss, paths=paths)

    def score(group: ChannelGroup) -> Tensor | None:
        terms = [
            (unit_slices(layer.weight, member).square() * unit_slices(fisher[path], member)).sum(1).cpu() / 2
            for path, layer, member in readers(model, group)
            if path in fisher
        ]
        return torch.stack(terms).sum(0) if terms else None

    return score


def _first_order(model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any], loss: BatchLoss) -> Score:
    parameters = dict(model.named_parameters())
    readers = {g.name: [m for m in g.members if m.role == "in" and m.name in parameters] for g in groups}
    weights = {member.name: parameters[member.name] for found in readers.values() for member in found}
    sums: dict[str, Tensor] = {}
    count = 0
    with evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            count += 1
            gradients = torch.autograd.grad(_scalar(loss(model, batch)), list(weights.values()), allow_unused=True)
            by_name = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
            for group, found in readers.items():
                known = [(weights[m.name], by_name[m.name], m) for m in found if m.name in by_name]
                if known:
                    sums[group] = sums.get(group, 0) + _sum_of_products(known).abs()
    if not count:
        raise CalibrationError("criterion='taylor': batches gave nothing. Pass at least one batch.")
    return lambda group: sums[group.name] / count if group.name in sums else None


def _sum_of_products(terms: Iterable[tuple[Tensor, Tensor, Member]]) -> Tensor:
    """Return for each unit the sum of products of two tensors over its slices, and over all terms; on the CPU."""
    products = [(unit_slices(a, member) * unit_slices(b, member)).sum(1).cpu() for a, b, member in terms]
    return torch.stack(products).sum(0)


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or not loss.requires_grad:
        raise CalibrationError(
            "criterion='taylor': loss must return one number that depends on the weights; look for detach() or "
            "no_grad() in it."
        )
    return loss.reshape(())
