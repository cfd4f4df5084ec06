"""Putting another layer in a layer's place."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_nn.errors import PlanError
from lowrank_nn.graph.attributes import MARK, mark_resized
from lowrank_nn.graph.preserve import MODULE_TABLES
from lowrank_nn.graph.sites import describe_paths
from lowrank_nn.graph.special import release_fast_path

CONTAINERS = (list, tuple, dict)

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of the module at ``path``, wherever the model holds that module.

    That is among its modules, and in attributes: lists, tuples and dicts there may hold it too. Forward and backward
    hooks move from the old module to the new one (their handles keep working), and the new one takes its train / eval
    mode and the note that channels were removed.

    Args:
        model: Changed in place.
        path: Dotted path of the module to replace; "" for the model itself.
        new: The module to put there.

    Returns:
        The root: ``model``, or ``new`` where the model itself was replaced.

    Raises:
        PlanError: There is no module at ``path``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        raise PlanError(f"replace_module: no module at {path!r}. {describe_paths(modules)}")
    old = modules[path]
    if new is old:
        return model
    for parent in set(modules.values()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
        attributes = vars(parent)
        for name, value in attributes.items():
            if value is old or (isinstance(value, CONTAINERS) and name not in MODULE_TABLES):
                attributes[name] = _exchange(value, old, new, set())
    new.train(old.training)
    if MARK in vars(old):
        mark_resized(new, vars(old)[MARK])
    _move_hooks(old, new)
    root = new if old is model else model
    release_fast_path(root)
    return root


def _exchange(value: Any, old: nn.Module, new: nn.Module, met: set[int]) -> Any:
    """Return ``new`` for ``old``, wherever it is in containers; lists and dicts are changed in place."""
    if value is old:
        return new
    if not isinstance(value, CONTAINERS) or id(value) in met:
        return value
    met.add(id(value))
    if isinstance(value, tuple):
        items = [_exchange(item, old, new, met) for item in value]
        same = all(now is before for now, before in zip(items, value, strict=True))
        return value if same else tuple(items)
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if item is old or isinstance(item, CONTAINERS):
            value[key] = _exchange(item, old, new, met)
    return value


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    # The dicts themselves move: the handles that registering returned point to them.
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook
    for name in HOOK_TABLES:
        moved, own = getattr(old, name), getattr(new, name)
        moved.update(own)
        setattr(old, name, type(moved)())
        setattr(new, name, moved)
