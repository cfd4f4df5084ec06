"""Published recipes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lowrank_nn.errors import OptionError, PlanError
from lowrank_nn.layers import VBMF
from lowrank_nn.pipeline.codebook import Codebook
from lowrank_nn.pipeline.finetune import FineTune
from lowrank_nn.pipeline.lowrank import LowRank
from lowrank_nn.pipeline.prune import Prune
from lowrank_nn.pipeline.state import Step

Recipe = str | Step | Sequence[str | Step]


def one_shot() -> list[Step]:
    """Return the recipe of Kim et al. 2016: EVBMF ranks, Tucker-2 for k x k kernels, the SVD for the rest.

    The paper then fine-tunes: append a ``FineTune`` step, ``["one-shot", FineTune(loader, epochs=10)]``.
    """
    return [LowRank(rank=VBMF())]


def deep_compression(
    retrain: FineTune | None = None,
    tune: FineTune | None = None,
    *,
    sparsity: float = 0.9,
    bits: int = 5,
    conv_bits: int = 8,
) -> list[Step]:
    """Return the recipe of Han et al. 2016: prune by magnitude, retrain, share weights, train what is shared.

    The fourth part, entropy coding, is what :func:`lowrank_nn.save` does. By its name, ``"deep-compression"``, the
    recipe has no training; the networks of the paper need it.

    Args:
        retrain: The training after pruning, ``FineTune(loader, epochs=10)``; left out, there is none.
        tune: The training of the shared weights; ``retrain`` once more if left out.
        sparsity: Share of each layer's weights that is pruned.
        bits: Bits per weight in linear layers.
        conv_bits: Bits per weight in convolutions.

    Raises:
        OptionError: One step with a checkpoint was given for both trainings, which would take the file of the first
            for that of the second; or another argument is out of range.

    References:
        Han, Mao, Dally 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization
        and Huffman Coding".
    """
    tune = retrain if tune is None else tune
    if retrain is not None and tune is retrain and retrain.checkpoint is not None:
        raise OptionError(
            "deep_compression: with checkpoints pass two FineTune steps with a file each, retrain and tune."
        )
    steps = [Prune(sparsity), retrain, Codebook(bits, conv_bits=conv_bits), tune]
    return [step for step in steps if step is not None]


RECIPES: dict[str, Callable[[], list[Step]]] = {"one-shot": one_shot, "deep-compression": deep_compression}
"""The recipes that ``compress_model`` takes by name."""


def read_recipe(recipe: Recipe | None) -> list[Step]:
    """Return a recipe as a list of steps: names are spelled out, None is ``[LowRank()]``.

    Raises:
        PlanError: An unknown name, something that is not a step, or no step at all.
    """
    if recipe is None:
        return [LowRank()]
    parts: list[Any] = list(recipe) if isinstance(recipe, Iterable) and not isinstance(recipe, str) else [recipe]
    steps: list[Step] = []
    for part in parts:
        if isinstance(part, str):
            if part not in RECIPES:
                raise PlanError(f"recipe: there is no recipe {part!r}; there are: {', '.join(map(repr, RECIPES))}.")
            steps += RECIPES[part]()
        elif isinstance(part, Step):
            steps.append(part)
        else:
            called = f" Call the class: {part.__name__}(...)." if _is_class_of_steps(part) else ""
            raise PlanError(
                "recipe: expected steps, such as LowRank() or Quantize('int8'), or names of recipes, got "
                f"{part!r}.{called}"
            )
    if not steps:
        raise PlanError("recipe: it has no steps. Leave it out for [LowRank()], or give at least one step.")
    return steps


def _is_class_of_steps(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Step)
