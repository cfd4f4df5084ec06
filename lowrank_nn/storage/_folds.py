"""Batch norms that were folded into the layers in front of them: what a file says of them, and doing it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_nn.graph import replace_module
from lowrank_nn.graph.fold import DENSE


def identity_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of all identities, where norms may have been."""
    return tuple(path for path, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Identity)


def folds_norms(model: nn.Module, identities: Iterable[str]) -> bool:
    """Whether the model has a norm where the file has an identity."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return any(isinstance(modules.get(path), _BatchNorm) for path in identities)


def fold_again(model: nn.Module, identities: Sequence[str], keys: Iterable[str]) -> dict[str, str]:
    """Put identities in the places of norms, and give layers the biases that these left them, not yet filled.

    Args:
        model: Changed in place.
        identities: Paths of the identities that the file lists.
        keys: State-dict keys that may be biases.

    Returns:
        By path of each identity that does not fit, why.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: dict[str, str] = {}
    for path in identities:
        slot = modules.get(path)
        if isinstance(slot, _BatchNorm):
            replace_module(model, path, nn.Identity())
        elif not isinstance(slot, nn.Identity):
            held = "no module there" if slot is None else type(slot).__name__
            problems[path] = f"is an Identity in the file, as it stands where a norm was folded; the model has {held}."
    _add_biases(model, keys)
    return problems


def _add_biases(model: nn.Module, keys: Iterable[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in keys:
        path, _, name = key.rpartition(".")
        layer = modules.get(path)
        if name == "bias" and isinstance(layer, DENSE) and layer._parameters.get("bias", key) is None:
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            bias = torch.empty(outputs, device=layer.weight.device, dtype=layer.weight.dtype)
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
