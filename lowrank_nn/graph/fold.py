"""Batch normalisation folded into the layer in front of it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from lowrank_nn.graph.agree import keeps_outputs, outputs_of
from lowrank_nn.graph.derive import deep_copy
from lowrank_nn.graph.links import NORM_FORWARDS, Link, find_links
from lowrank_nn.graph.swap import HOOK_TABLES, replace_module
from lowrank_nn.layers import CompressedLayer

logger = logging.getLogger(__name__)

DENSE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
"""Layers that can take up a norm."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """A batch normalisation that the layer in front of it can take up.

    Attributes:
        layer: Path of the layer.
        norm: Path of the normalisation.
    """

    layer: str
    norm: str


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> nn.Module:
    r"""Return a copy of ``model`` in which layers have taken up the batch normalisations right behind them.

    In eval mode a batch normalisation is an affine map of each channel, so that with W, b of the layer in front of it

    .. math:: W' = \operatorname{diag}(s) W, \quad b' = s (b - \mu) + \beta, \quad
              s = \gamma / \sqrt{\sigma^2 + \epsilon}

    the layer alone computes the same, and an ``nn.Identity`` stands where the normalisation was. A layer without a bias
    gets one. Taken up are running statistics, whatever mode the model is in: in train mode the copy no longer
    normalises by the batch, and has no statistics to update. Fold when training is over.

    Convolutions, transposed convolutions and linear layers take up a norm, and of a factorised layer its last leaf
    does. That happens only where a recorded forward shows that the norm is called once, on the layer's output, which
    nothing else sees, and where the copy's outputs agree with the model's (relative error 1e-4 in float32, 1e-10 in
    float64). A norm *ahead* of a layer is not folded: its shift would change what a padded border holds. Which norms
    stay, and why, is logged; the step :class:`lowrank_nn.FoldBatchNorm` has it in the report.

    Args:
        model: The trained model; not changed.
        example_inputs: What it is called with; see :func:`lowrank_nn.graph.call_model`.

    Raises:
        UnsupportedLayerError: The model is compiled or scripted, or holds layers that have no weights yet.
        PlanError: The forward failed on ``example_inputs``, or the model cannot be copied.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", section 3.2.
    """
    folds, left = find_folds(model, find_links(model, example_inputs))
    folded = deep_copy(model, "fold_batchnorm")
    left |= fold_proven(folded, folds, example_inputs)
    for path, reason in left.items():
        logger.info("fold_batchnorm: %s stays: %s.", path, reason)
    return folded


def find_folds(model: nn.Module, links: Mapping[str, Link]) -> tuple[list[Fold], dict[str, str]]:
    """Return the folds that are possible, in the order of the calls, and why each other batch normalisation stays.

    Args:
        model: The model, on any device.
        links: What :func:`find_links` returned for it, or for the model that it was before some layers were replaced.
    """
    norms = {path: norm for path, norm in model.named_modules() if isinstance(norm, _BatchNorm)}
    left = {path: _unfit(norm) for path, norm in norms.items()}
    folds, uses = [], uses_of(model)
    for path, link in links.items():
        if link.norm is None or link.norm not in norms:
            continue
        refusal = _refusal(model.get_submodule(path), uses)
        reason = f"the layer ahead cannot take it up: {refusal}" if refusal else held(norms[link.norm], uses)
        if reason:
            left[link.norm] = reason
        else:
            folds.append(Fold(path, link.norm))
            del left[link.norm]
    return folds, left


def fold_proven(model: nn.Module, folds: Sequence[Fold], example_inputs: Any) -> dict[str, str]:
    """Carry out those of ``folds`` that keep the outputs of ``model``, in place.

    All together are tried first; where the outputs do not agree, one by one.

    Returns:
        By path, why a norm stays after all.
    """
    expected = outputs_of(model, example_inputs)
    if _try(model, folds, example_inputs, expected):
        return {}
    refused = [fold for fold in folds if not _try(model, [fold], example_inputs, expected)]
    return {fold.norm: f"folded into {fold.layer}, the model's outputs would change" for fold in refused}


def folded_norms(dense: nn.Module, small: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Return, by path of a layer, the norm that it had behind it in ``dense`` and has taken up in ``small``."""
    now = dict(small.named_modules(remove_duplicate=False))
    norms = [path for path, module in dense.named_modules() if isinstance(module, _BatchNorm)]
    gone = {path for path in norms if isinstance(now.get(path), nn.Identity)}
    links = find_links(dense, example_inputs) if gone else {}
    return {path: link.norm for path, link in links.items() if link.norm in gone and link.norm is not None}


def fold_(model: nn.Module, fold: Fold) -> tuple[nn.Module, nn.Module]:
    """Replace the layer by one that has taken up the norm, and the norm by an ``nn.Identity``, in place.

    Returns:
        The layer and the norm that were there; they have not changed.
    """
    layer, norm = model.get_submodule(fold.layer), model.get_submodule(fold.norm)
    assert isinstance(norm, _BatchNorm)
    new = copy.deepcopy(layer)
    _scale_and_shift_(last_leaf(new), norm)
    replace_module(model, fold.layer, new)
    replace_module(model, fold.norm, nn.Identity())
    return layer, norm


def norm_scale(norm: nn.Module) -> Tensor:
    """Return gamma / sqrt(variance + eps) of a batch normalisation, float64, one factor per channel."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    return scale * norm.weight.detach().double() if norm.affine else scale


def _try(model: nn.Module, folds: Sequence[Fold], example_inputs: Any, expected: list[Tensor]) -> bool:
    """Carry out ``folds`` if the outputs stay as expected, else leave the model as it is."""
    undo = [(fold, fold_(model, fold)) for fold in folds]
    if keeps_outputs(model, example_inputs, expected):
        return True
    for fold, (layer, norm) in undo:
        replace_module(model, fold.layer, layer)
        replace_module(model, fold.norm, norm)
    return False


@torch.no_grad()
def _scale_and_shift_(leaf: nn.Module, norm: _BatchNorm) -> None:
    weight, bias = leaf._parameters["weight"], leaf._parameters["bias"]
    assert weight is not None
    assert norm.running_mean is not None
    scale, mean = norm_scale(norm).to(weight.device), norm.running_mean.to(weight.device, torch.float64)
    shift = scale * (-mean if bias is None else bias - mean)
    if norm.affine:
        shift += norm.bias
    weight.copy_(scaled_weight(leaf, scale))
    if bias is not None:
        bias.copy_(shift)
    else:
        leaf.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def scaled_weight(leaf: nn.Module, scale: Tensor) -> Tensor:
    """Return the weight of a convolution or linear layer with its output channels multiplied by ``scale``."""
    weight = leaf.weight
    assert isinstance(weight, Tensor)
    if not isinstance(leaf, _ConvTransposeNd):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    # (in, out / groups, ...): the rows of each group of inputs lead to that group of outputs.
    parts = weight.reshape(leaf.groups, -1, *weight.shape[1:])
    return (parts * scale.reshape(leaf.groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def last_leaf(layer: nn.Module) -> nn.Module:
    """Return the leaf whose channels are a layer's outputs: the layer itself, or the last stage of a factorised one."""
    *_, last = [layer, *layer.stages()] if isinstance(layer, CompressedLayer) and not layer.rearranges else [layer]
    return last


def uses_of(model: nn.Module) -> Counter[int]:
    """Return by id how often modules and tensors stand in the model."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        uses.update(id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()))
    return uses


def _refusal(layer: nn.Module, uses: Counter[int]) -> str:
    """Return why a layer cannot take up a norm; empty where it can."""
    leaf = last_leaf(layer)
    if isinstance(leaf, CompressedLayer) and leaf.rearranges:
        return f"no stage of {type(leaf).__name__} has its outputs as channels; fold before compressing it"
    if not isinstance(leaf, DENSE):
        return f"it is a {type(leaf).__name__}; fold before pruning and quantizing"
    return computed_weight(leaf) or held(layer, uses)


def computed_weight(leaf: nn.Module) -> str:
    """Return why a dense layer computes with something else than its weight as it stands; empty where it does not."""
    if parametrize.is_parametrized(leaf) or "weight" not in leaf._parameters:
        return "its weight is computed before each call (parametrization, weight_norm, spectral_norm)"
    for method in ("forward", "_conv_forward"):
        plain = {getattr(cls, method, None) for cls in DENSE if isinstance(leaf, cls)}
        if method in vars(leaf) or getattr(type(leaf), method, None) not in plain:
            return f"{type(leaf).__name__} overrides {method}"
    return ""


def _unfit(norm: _BatchNorm) -> str:
    """Return why a norm is not behind any layer that could take it up."""
    if type(norm).forward not in NORM_FORWARDS:
        return f"{type(norm).__name__} overrides forward"
    if norm.running_mean is None:
        return "it has no running statistics"
    return "it is not called once, on the output of one layer, which nothing else sees"


def held(module: nn.Module, uses: Counter[int]) -> str:
    """Return why a module must keep its values: others have a hold of it; empty where none has.

    Args:
        module: The module.
        uses: What :func:`uses_of` returned for the model that it is in.
    """
    if any(uses[id(part)] > 1 for part in (*module.modules(), *module.parameters(), *module.buffers())):
        return "it, or a tensor of it, is shared with another place in the model"
    if any(getattr(part, table) for part in module.modules() for table in HOOK_TABLES):
        return "it has hooks, which would see other values"
    return ""
