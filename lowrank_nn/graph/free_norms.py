"""Normalisations that hold no tensors: what their sizes become shows only in what they are called with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lowrank_nn.graph.attributes import mark_resized
from lowrank_nn.graph.inputs import run_model
from lowrank_nn.graph.preserve import evaluating


def follow_inputs(model: nn.Module) -> dict[str, int]:
    """Have every normalisation without tensors take the number of channels that it is called with.

    For use within a block that restores the modules' attributes, :func:`lowrank_nn.graph.preserve.untouched`.

    Args:
        model: Watched on its instances.

    Returns:
        Filled in the course of the forward: the channels that each saw, by path.
    """
    seen: dict[str, int] = {}
    for path, norm in _free_norms(model):
        vars(norm)["forward"] = functools.wraps(norm.forward)(functools.partial(_sized, norm, norm.forward, path, seen))
    return seen


def measure_free_norms(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Run a model that has lost channels, and return by path how many channels each norm without tensors sees.

    The model is left as it was; it does not run where there are no such norms.
    """
    if not any(True for _ in _free_norms(model)):
        return {}
    with evaluating(model):
        seen = follow_inputs(model)
        run_model(model, example_inputs)
    return seen


def resize_free_norms(model: nn.Module, channels: Mapping[str, int]) -> None:
    """Set the sizes of norms without tensors to what :func:`measure_free_norms` saw of the same network."""
    for path, count in channels.items():
        _resize(model.get_submodule(path), count)


def _free_norms(model: nn.Module) -> Iterator[tuple[str, nn.GroupNorm | _NormBase]]:
    for path, module in model.named_modules():
        held = (*module._parameters.values(), *module._buffers.values())
        if isinstance(module, (nn.GroupNorm, _NormBase)) and all(tensor is None for tensor in held):
            yield path, module


def _sized(norm: nn.Module, forward: Any, path: str, seen: dict[str, int], input: Tensor) -> Any:
    unbatched = isinstance(norm, nn.modules.instancenorm._InstanceNorm) and input.dim() == norm._get_no_batch_dim()  # type: ignore[no-untyped-call]
    seen[path] = input.shape[0 if unbatched else 1]
    _resize(norm, seen[path])
    return forward(input)


def _resize(norm: nn.Module, channels: int) -> None:
    if isinstance(norm, nn.GroupNorm) and norm.num_channels != channels:
        width = norm.num_channels // norm.num_groups
        norm.num_channels, norm.num_groups = channels, channels // width
        mark_resized(norm, ("num_channels", "num_groups"))
    elif isinstance(norm, _NormBase) and norm.num_features != channels:
        norm.num_features = channels
        mark_resized(norm, ("num_features",))
