"""The copy that a recipe is carried out on, and that it calls layers of its own only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lowrank_nn.errors import PlanError
from lowrank_nn.graph import Recording, record
from lowrank_nn.graph.inputs import run_model
from lowrank_nn.graph.preserve import evaluating, untouched
from lowrank_nn.pipeline.apply import Apply
from lowrank_nn.pipeline.dryrun import DryRun
from lowrank_nn.pipeline.lowrank import LowRank
from lowrank_nn.pipeline.state import Step


def working_copy(model: nn.Module, steps: Sequence[Step], planned: DryRun, example_inputs: Any) -> nn.Module:
    """Return a deep copy of the given model, proven to call none of its layers.

    Layers that the first step replaces share their parameters, which saves up to the model's memory.

    Raises:
        PlanError: A function, such as a lambda in ``__init__``, leads the copy to layers of the given model.
    """
    replaced = _replaced_at_once(steps, planned)
    copied = copy.deepcopy(model, {id(p): p for path in replaced for p in model.get_submodule(path).parameters()})
    given = {module: path for path, module in model.named_modules()}
    with untouched(model), evaluating(copied), _calls_of(given) as called:
        run_model(copied, example_inputs)
    if called:
        raise PlanError(
            f"{type(model).__name__}: a copy is worked on, and copy.deepcopy(model) calls layers of the given model: "
            f"{', '.join(called)}. Functions are not copied: make a lambda or closure over the model a method."
        )
    return copied


def record_result(model: nn.Module, example_inputs: Any, replaced: Mapping[nn.Module, str]) -> Recording:
    """Record a compressed model.

    Args:
        model: The compressed model.
        example_inputs: What it is called with.
        replaced: Layers that others stand in for now, as far as they are still there, with their paths.

    Raises:
        PlanError: It does not run, or still calls a layer that was replaced.
    """
    with _calls_of(replaced) as called:
        try:
            recording = record(model, example_inputs)
        except PlanError as error:
            raise PlanError(
                f"compress_model: the compressed model does not run where the dense one does. {error} If the model "
                "reads attributes of a layer that its replacement lacks, leave that layer dense (but_not=...)."
            ) from error
    if called:
        raise PlanError(
            f"compress_model: the model still calls the layers that were replaced: {', '.join(called)}. It holds them "
            "in an object of another kind than modules, lists, tuples and dicts, such as functools.partial: hold them "
            "as attributes, or leave them dense (but_not=...)."
        )
    return recording


@contextlib.contextmanager
def _calls_of(modules: Mapping[nn.Module, str]) -> Iterator[list[str]]:
    """Note the paths of those of ``modules`` that are called within a block, by whatever model."""
    called: list[str] = []

    def note(module: nn.Module, _: Any) -> None:
        path = modules.get(module)
        if path is not None and path not in called:
            called.append(path)

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


def _replaced_at_once(steps: Sequence[Step], planned: DryRun) -> set[str]:
    """Return the paths that the first step replaces, if all that it does with the old layers is to read them."""
    if not isinstance(steps[0], (Apply, LowRank)):
        return set()
    return {decision.path for decision in planned.decisions[0] if decision.layer_class is not None}
