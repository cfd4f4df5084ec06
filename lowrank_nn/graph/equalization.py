"""Cross-layer equalisation: channels rescaled between the layers that compute them and those that read them."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_nn.graph.agree import keeps_outputs, outputs_of
from lowrank_nn.graph.derive import deep_copy
from lowrank_nn.graph.fold import DENSE, computed_weight, held, uses_of
from lowrank_nn.graph.groups import ChannelGroup, find_groups
from lowrank_nn.graph.rescaling import Rescaling, merged, rescale_, rescaled
from lowrank_nn.graph.swap import replace_module

logger = logging.getLogger(__name__)

MAX_SWEEPS = 200
TOLERANCE = 1e-5
"""Sweeps end when none of them changes a channel by a larger share."""

TINY = torch.finfo(torch.float64).tiny

PROBED_POWERS = (20, 25)
"""Channels are probed with powers of two: no rounding, and far beyond the bends of any activation."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a weight, as it would be with ``groups=1``, holds channels: ``positions`` along ``dim``, a row for each."""

    path: str
    dim: int
    positions: Tensor


@dataclasses.dataclass(frozen=True)
class Channels:
    """Channels, the weights that compute them and those that read them."""

    name: str
    size: int
    computed: tuple[Place, ...]
    read: tuple[Place, ...]


def equalize(model: nn.Module, example_inputs: Any) -> nn.Module:
    r"""Return a copy of ``model`` that computes the same, its channels taking equal shares of the ranges of weights.

    A function f with f(s x) = s f(x) for all s > 0, such as ReLU or pooling, lets a channel take any factor: what
    computes it is divided by s_i, what reads it multiplied. The factor is

    .. math:: s_i = \sqrt{p^{(1)}_i p^{(2)}_i} / p^{(2)}_i, \quad W^{(1)}_{i\cdot} / s_i, \quad b_i / s_i, \quad
              W^{(2)}_{\cdot i} s_i

    with :math:`p^{(1)}_i`, :math:`p^{(2)}_i` the largest :math:`|w|` that computes and that reads channel i, as shares
    of the largest of the whole weight, which sets the scale where all of it is quantized with one. It is done for all
    channels in turn until nothing changes; then :math:`p^{(1)}_i = p^{(2)}_i`.

    Channels are those of :func:`lowrank_nn.find_groups`, so residual sums, concatenations and depthwise convolutions
    are followed; p is the largest over all weights on that side. They are rescaled only between plain convolutions
    (transposed too) and linear layers, and only where a trial shows that the outputs stay the same for any factors, up
    to 2^24 and down to 2^-24; ReLU6, SiLU or a norm in between rule that out, so fold batch norms first
    (:func:`lowrank_nn.fold_batchnorm`). Channels that stay are logged, with the reason; the step
    :class:`lowrank_nn.Equalize` has them in the report.

    Args:
        model: The trained model; not changed.
        example_inputs: What it is called with; see :func:`lowrank_nn.graph.call_model`.

    Raises:
        UnsupportedLayerError: The model is compiled or scripted, or holds layers that have no weights yet.
        PlanError: The forward failed on ``example_inputs``, or the model cannot be copied.

    References:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.
    """
    equal = deep_copy(model, "equalize")
    _, left = equalize_(equal, example_inputs)
    for path, reason in left.items():
        logger.info("equalize: the channels of %s stay: %s.", path, reason)
    return equal


def equalize_(model: nn.Module, example_inputs: Any) -> tuple[Rescaling, dict[str, str]]:
    """Equalise in place.

    Returns:
        What weights were multiplied by; and by path of a layer, why the channels that it computes stay.
    """
    one_group, uses = with_one_group(model), uses_of(model)
    found, left = [], {}
    for group in find_groups(one_group, example_inputs):
        reason = refusal(model, group, uses)
        if reason:
            left[group.name] = reason
        else:
            found.append(channels_of(group))
    trial = _Trial(model, one_group, example_inputs)
    left |= trial.refused(found)
    rescaling = _equal_shares(one_group, [channels for channels in found if channels.name not in left])
    if not trial.keeps_outputs(rescaling):
        return {}, left | {channels.name: "the model's outputs would change" for channels in found}
    rescale_(model, rescaling)
    return rescaling, left


def with_one_group(model: nn.Module) -> nn.Module:
    """Return a copy whose grouped convolutions are dense ones, zero between groups, that compute the same.

    A depthwise convolution reads and computes channels that are one to :func:`find_groups`, and can be rescaled
    on either side; as a dense one it shows which are which.
    """
    dense = copy.deepcopy(model)
    for path, layer in list(dense.named_modules()):
        plain = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not computed_weight(layer)
        if plain and layer.groups > 1:
            replace_module(dense, path, _one_group(layer))
    return dense


def _one_group(layer: nn.Module) -> nn.Module:
    dense = copy.deepcopy(layer)
    weight, groups = dense._parameters["weight"], layer.groups
    assert weight is not None
    assert isinstance(groups, int)
    (rows, columns), taps = weight.shape[:2], weight.shape[2:]
    blocks = weight.new_zeros(groups, rows // groups, groups, columns, *taps)
    each = torch.arange(groups, device=weight.device)
    blocks[each, :, each] = weight.detach().reshape(groups, rows // groups, columns, *taps)
    dense.weight = nn.Parameter(blocks.reshape(rows, groups * columns, *taps), requires_grad=weight.requires_grad)
    dense.groups = 1  # type: ignore[assignment]
    return dense


def refusal(model: nn.Module, group: ChannelGroup, uses: Counter[int]) -> str:
    """Return why channels cannot be rescaled, as far as the layers tell; empty where they may be."""
    if group.frozen:
        return group.frozen
    for member in group.members:
        path = member.name.rpartition(".")[0]
        layer = model.get_submodule(path)
        kind = type(layer).__name__
        if member.role == "through":
            if not isinstance(layer, nn.PReLU):  # slopes go with any factor
                advice = ": fold batch norms first" if isinstance(layer, _BatchNorm) else ""
                return f"{member.name} of a {kind} is on the way{advice}"
        elif not isinstance(layer, DENSE):
            return f"{member.name} belongs to a {kind}, which is no plain convolution or linear layer"
        elif reason := computed_weight(layer) or held(layer, uses):
            return f"{path} has to stay: {reason}"
    return "" if any(member.role == "in" for member in group.members) else "no layer reads them"


def channels_of(group: ChannelGroup) -> Channels:
    """Return the units of a group as channels."""

    def places(role: str) -> tuple[Place, ...]:
        weights = [m for m in group.members if m.role == role and m.name.endswith(".weight")]
        return tuple(
            Place(m.name.removesuffix(".weight"), m.dim, torch.tensor(m.positions, device="cpu")) for m in weights
        )

    return Channels(group.name, group.size, places("out"), places("in"))


class _Trial:
    """Tells whether the outputs of a model stay the same when its channels are rescaled."""

    def __init__(self, model: nn.Module, one_group: nn.Module, example_inputs: Any) -> None:
        self._model, self._one_group, self._inputs = model, one_group, example_inputs
        self._expected = outputs_of(model, example_inputs)
        self._generator = torch.Generator().manual_seed(0)

    def refused(self, found: Sequence[Channels]) -> dict[str, str]:
        """Return by name which channels cannot take any factor, and why."""
        if not found:
            return {}
        if not self._take_any_factor(found):
            if len(found) > 1:
                half = len(found) // 2
                return self.refused(found[:half]) | self.refused(found[half:])
            reason = "something on the way, such as ReLU6, SiLU or a constant that is added, is not homogeneous"
            return {found[0].name: reason}
        return {
            channels.name: "the outputs for example_inputs do not depend on them"
            for channels in found
            if self.keeps_outputs(
                _rescaling(self._one_group, dataclasses.replace(channels, read=()), self._factors(channels))
            )
        }

    def keeps_outputs(self, rescaling: Rescaling) -> bool:
        """Whether the outputs stay the same; the model is left as it was."""
        with rescaled(self._model, rescaling):
            return keeps_outputs(self._model, self._inputs, self._expected)

    def _take_any_factor(self, found: Sequence[Channels]) -> bool:
        probes = [(channels, self._factors(channels)) for channels in found]
        return all(
            self.keeps_outputs(merged(_rescaling(self._one_group, channels, s**sign) for channels, s in probes))
            for sign in (1, -1)
        )

    def _factors(self, channels: Channels) -> Tensor:
        powers = torch.randint(*PROBED_POWERS, (channels.size,), generator=self._generator, device="cpu")
        signs = 2 * torch.randint(2, (channels.size,), generator=self._generator, device="cpu") - 1
        return 2.0 ** (signs * powers).double()


def _rescaling(one_group: nn.Module, channels: Channels, s: Tensor) -> Rescaling:
    """Return what divides the weights that compute channels by s, and multiplies those that read them."""
    parts: list[Rescaling] = []
    for places, factors in ((channels.computed, 1 / s), (channels.read, s)):
        for place in places:
            factor = torch.ones(
                one_group.get_parameter(f"{place.path}.weight").shape[place.dim], dtype=torch.float64, device="cpu"
            )
            factor[place.positions] = factors[:, None]
            parts.append({place.path: {place.dim: factor}})
    return merged(parts)


@torch.no_grad()
def _equal_shares(one_group: nn.Module, found: Sequence[Channels]) -> Rescaling:
    """Return the rescaling after which every channel takes the same share of the ranges on both sides."""
    peaks: dict[str, Tensor] = {}
    for place in (place for channels in found for place in (*channels.computed, *channels.read)):
        weight = one_group.get_parameter(f"{place.path}.weight").detach()
        peaks[place.path] = weight.abs().reshape(*weight.shape[:2], -1).amax(2).float().cpu()
    totals = [torch.ones(channels.size, dtype=torch.float64, device="cpu") for channels in found]
    for _ in range(MAX_SWEEPS):
        change = 0.0
        for channels, total in zip(found, totals, strict=True):
            first, second = _share(peaks, channels.computed), _share(peaks, channels.read)
            s = torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)
            _rescale_(peaks, _rescaling(one_group, channels, s))
            total *= s
            change = max(change, float(s.log().abs().max()))
        if change < TOLERANCE:
            break
    return merged(_rescaling(one_group, *pair) for pair in zip(found, totals, strict=True))


def _rescale_(peaks: dict[str, Tensor], rescaling: Rescaling) -> None:
    for path, factors in rescaling.items():
        for dim, factor in factors.items():
            peaks[path] *= factor.unsqueeze(1 - dim)


def _share(peaks: dict[str, Tensor], places: Sequence[Place]) -> Tensor:
    """Return the largest absolute weight of each channel over that of the whole weight, float64."""
    shares = []
    for place in places:
        largest = peaks[place.path].amax(1 - place.dim).double()
        shares.append((largest / largest.max().clamp(min=TINY))[place.positions].amax(1))
    return torch.stack(shares).amax(0)
