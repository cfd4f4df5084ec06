"""Running a model without leaving a trace in it or in the process."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_nn.accelerator import generators_kept

MODULE_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Names of the dicts that every module keeps: parameters, buffers, children and hooks."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients; restore ``model`` and the process on exit, however it ends.

    Restored are, for every module: its attributes (train / eval flag, forward, counters), its tables of parameters,
    buffers, children and hooks, other dicts and lists that it holds (caches), the values of its buffers and the
    requires_grad flags of its parameters; for the process: the random states of Python, numpy, torch and the
    accelerator in use, grad mode, warnings filters and the switch of torch's fused attention. Not restored are values
    written into parameters, and changes inside what such a dict or list holds.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _has_values(buffer)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with untouched_process():
        try:
            yield
        finally:
            for parameter, trains in flags:
                _restore_flag(parameter, trains)
            for module, (attributes, tables) in modules:
                _restore_attributes(module, attributes, tables)
            for buffer, values in buffers:
                _restore_values(buffer, values)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """As :func:`untouched`, with ``model`` in eval mode and every layer run by the ``forward`` of its instance.

    Torch's encoder layers would otherwise hand their weights to a fused kernel, and call none of their layers.
    """
    with untouched(model):
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            vars(module).update(training=False, _compiled_call_impl=None)
        yield


@contextlib.contextmanager
def untouched_process() -> Iterator[None]:
    """Run a block without gradients; restore what :func:`untouched` says of the process, however it ends."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with preserved_random_state(), torch.no_grad():
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Run a block; restore the random states of Python, numpy, torch and the accelerator in use, and warnings filters.

    Args:
        seed: What all of them are seeded with inside; None to go on from where they are.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's code may draw
    with warnings.catch_warnings(), generators_kept():
        try:
            if seed is not None:
                seed_all(seed)
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def random_states() -> tuple[Any, ...]:
    """Return the states of Python's, numpy's and torch's global generators (of torch's, the one for the CPU)."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put back what :func:`random_states` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


Table = dict[Any, Any] | list[Any]


def _attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Table]]:
    attributes = dict(vars(module))
    tables = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, (dict, list))}
    return attributes, tables


def _restore_attributes(module: nn.Module, attributes: dict[str, Any], tables: dict[str, Table]) -> None:
    # The dicts are refilled, not replaced: the handles of hooks point to them.
    namespace = vars(module)
    for name in namespace.keys() - attributes.keys():
        del namespace[name]
    namespace.update(attributes)
    for name, entries in tables.items():
        table = attributes[name]
        if _identities(table) != _identities(entries):
            table.clear()
            table.extend(entries) if isinstance(table, list) else table.update(entries)


def _identities(table: Table) -> list[tuple[Any, int]]:
    entries = enumerate(table) if isinstance(table, list) else table.items()
    return [(key, id(value)) for key, value in entries]


def _restore_flag(parameter: Tensor, trains: bool) -> None:
    if parameter.requires_grad != trains:
        with torch.inference_mode(parameter.is_inference()):
            parameter.requires_grad_(trains)


def _has_values(buffer: Tensor) -> bool:
    return not buffer.is_meta and buffer.layout is torch.strided


def _restore_values(buffer: Tensor, values: Tensor) -> None:
    # An unchanged buffer is not written: a write would invalidate a graph of the user's that saved it for backward.
    if buffer.shape == values.shape and torch.equal(buffer, values):
        return
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        if buffer.shape == values.shape:
            buffer.copy_(values)
        else:
            buffer.data = values
