"""Published recipes by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowrank_nn.errors import PlanError
from lowrank_nn.layers import VBMF
from lowrank_nn.pipeline.lowrank import LowRank
from lowrank_nn.pipeline.state import Step

Recipe = str | Step | Sequence[str | Step]


def one_shot() -> list[Step]:
    """Return the recipe of Kim et al. 2016: EVBMF ranks, Tucker-2 for k x k kernels, the SVD for the rest.

    The paper then fine-tunes: append a ``FineTune`` step, ``["one-shot", FineTune(loader, epochs=10)]``.
    """
    return [LowRank(rank=VBMF())]


RECIPES: dict[str, Callable[[], list[Step]]] = {"one-shot": one_shot}
"""The recipes that ``compress_model`` takes by name."""


def read_recipe(recipe: Recipe | None) -> list[Step]:
    """Return a recipe as a list of steps: names are spelled out, None is ``[LowRank()]``.

    Raises:
        PlanError: An unknown name, something that is not a step, or no step at all.
    """
    if recipe is None:
        return [LowRank()]
    parts = [recipe] if isinstance(recipe, (str, Step)) else list(recipe)
    steps: list[Step] = []
    for part in parts:
        if isinstance(part, str):
            if part not in RECIPES:
                raise PlanError(f"recipe: there is no recipe {part!r}; there are: {', '.join(map(repr, RECIPES))}.")
            steps += RECIPES[part]()
        elif isinstance(part, Step):
            steps.append(part)
        else:
            raise PlanError(
                f"recipe: expected steps (LowRank(), Apply(...), Prune(...), Quantize(...), FineTune(...)) or names of "
                f"recipes, got {part!r}."
            )
    if not steps:
        raise PlanError("recipe: it has no steps. Leave it out for [LowRank()], or give at least one step.")
    return steps
