"""What a step of a recipe sees, and what it decides."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import types
import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any, TypeVar

from torch import nn
from tqdm.auto import tqdm

from lowrank_nn.cost import Cost
from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import Recording, Site, model_cost, replace_module
from lowrank_nn.graph.attributes import resized_attributes
from lowrank_nn.graph.derive import derive_recording
from lowrank_nn.graph.rescaling import Rescaling
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.planning import Budget, Candidate, Clock

Item = TypeVar("Item")

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one layer in one step.

    Attributes:
        path: The layer's dotted path.
        layer_class: The class that replaces it, or None where it stays as it is.
        options: What ``from_pretrained_layer`` is called with, apart from measured data.
        note: Why the layer stays as it is; empty where it is replaced.
        error: Predicted relative change of the weight, ||W - W'|| / ||W||, where the step knows it.
        candidates: What the step chose from, the dense layer first, where there was a choice.
    """

    path: str
    layer_class: type[CompressedLayer] | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    error: float | None = None
    candidates: tuple[Candidate, ...] = dataclasses.field(default=(), repr=False)


@dataclasses.dataclass
class State:
    """The model on its way through a recipe.

    Attributes:
        model: The model as the steps before left it; on the meta device in a dry run.
        dense: The model as it was given; never changed.
        original: What the given model was recorded to do.
        example_inputs: What the model is called with.
        calibration: Batches of such inputs, or None.
        budget: What may remain at the end of the recipe, or None.
        slack: Factor by which a step that allocates may exceed the budget, because later steps save the rest.
        seed: Seed of everything random.
        progress: Whether long work shows a progress bar (never when the output is not a terminal).
        dry: Whether this is a dry run: structure without numbers.
        clock: Estimates latencies; None where the budget asks for none.
        cache: What steps computed from the given weights and want to find again in the next dry run.
        remarks: What the report is to say about layers: remark to paths.
        pruned: Where steps have removed channels: the model without them, with numbers, and what it was recorded to do.
        rescaled: What weights were multiplied by, so that the report measures errors from there.
        replaced: Paths of layers that were replaced, as long as anything holds them.
    """

    model: nn.Module
    dense: nn.Module
    original: Recording
    example_inputs: Any
    calibration: Iterable[Any] | None = None
    budget: Budget | None = None
    slack: float = 1.0
    seed: int = 0
    progress: bool = True
    dry: bool = False
    clock: Clock | None = None
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)
    remarks: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    pruned: tuple[nn.Module, Recording] | None = None
    rescaled: Rescaling = dataclasses.field(default_factory=dict)
    replaced: MutableMapping[nn.Module, str] = dataclasses.field(default_factory=weakref.WeakKeyDictionary)

    @property
    def base(self) -> tuple[nn.Module, Recording]:
        """The model with numbers whose layers have the present sizes, and what it was recorded to do.

        It is the given one until channels are removed; layers that were replaced since may stand there as they were.
        """
        return self.pruned or (self.dense, self.original)

    def sites(self) -> tuple[Site, ...]:
        """Return the layers as they are now, with the shapes they are called with."""
        return self.recording().sites

    def recording(self) -> Recording:
        """Return what the model was recorded to do, with the layers as they are now."""
        return derive_recording(self.base[1], self.model)

    def cost(self) -> Cost:
        """Return the cost of the model as it is now."""
        return model_cost(self.model, self.recording())

    def dense_cost(self) -> Cost:
        """Return the cost of the model as it was given."""
        return model_cost(self.dense, self.original)

    def with_clock(self) -> State:
        """Return this state with a clock: the same one in all dry runs that share a cache."""
        if self.clock is not None:
            return self
        if "clock" not in self.cache:
            self.cache["clock"] = Clock(self.dense, self.original, self.example_inputs)
        return dataclasses.replace(self, clock=self.cache["clock"])

    def latency(self) -> float:
        """Return the estimated milliseconds of one forward of the model as it is now; 0 where no budget asks for it."""
        return 0.0 if self.clock is None else self.clock.forward(self.recording())

    def dense_latency(self) -> float:
        """Return the measured milliseconds of one forward of the given model; 0 where no budget asks for it."""
        return 0.0 if self.clock is None else self.clock.dense

    def weights_of(self, site: Site) -> nn.Module:
        """Return the layer with numbers at this site: in a dry run the place to find them."""
        return self.base[0].get_submodule(site.path)

    def is_resized(self, path: str) -> bool:
        """Whether the layer at ``path`` has lost channels."""
        try:
            return resized_attributes(self.model.get_submodule(path)) is not None
        except AttributeError:  # there is no module any more
            return False

    def replace(self, path: str, new: nn.Module) -> None:
        """Put ``new`` in the place of the layer at ``path``, under all its names."""
        self.replaced[self.model.get_submodule(path)] = path
        self.model = replace_module(self.model, path, new)

    def remark(self, path: str, text: str) -> None:
        """Have the report say ``text`` of the layer at ``path``."""
        text = text.rstrip(".")  # paths follow behind a colon
        self.remarks[text] = (*self.remarks.get(text, ()), path)

    def watch(self, items: Iterable[Item], title: str) -> Iterable[Item]:
        """Iterate under a progress bar; none in a dry run, on request, or when the output is not a terminal."""
        hidden = True if self.dry or not self.progress else None
        bar: Iterable[Item] = tqdm(items, desc=title, disable=hidden, leave=False)
        return bar


def build(decision: Decision, layer: nn.Module, data: dict[str, Any]) -> CompressedLayer:
    """Build what ``decision`` says from ``layer``; errors come back with the layer's path in front."""
    assert decision.layer_class is not None
    try:
        return decision.layer_class.from_pretrained_layer(layer, **decision.options, **data)
    except LowRankError as error:
        raise error.at(decision.path) from error


class Step(abc.ABC):
    """One step of a recipe: it decides what becomes of each layer, and then does it.

    First, on the meta device, every step decides what becomes of each layer (from the structure and, where it must,
    from the given weights) and carries its decisions out on the model without numbers: that is the plan. Then the
    same decisions are carried out on a copy of the model itself, so plan and result cannot drift apart.
    """

    def _shown(self) -> dict[str, Any]:
        """Return the constructor's arguments that ``repr`` shows, by name; keywords at their defaults are left out."""
        return {}

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        own = (
            f"{name}={_text(value)}"
            for name, value in self._shown().items()
            if name not in parameters or value != parameters[name].default or parameters[name].kind is not _KEYWORD
        )
        return f"{type(self).__name__}({', '.join(own)})"

    @abc.abstractmethod
    def decide(self, state: State) -> list[Decision]:
        """Return a decision for every layer that this step is about.

        Args:
            state: The dry run up to this step; its model is on the meta device.

        Raises:
            PlanError: The step cannot be carried out on this model.
        """

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Replace the layers as decided, each filled from the layer it replaces.

        Args:
            state: The dry run, or the copy with numbers; its model is changed in place.
            decisions: What :meth:`decide` returned.
        """
        replaced = [decision for decision in decisions if decision.layer_class is not None]
        data = self.measure(state, replaced)
        for decision in state.watch(replaced, type(self).__name__):
            layer = state.model.get_submodule(decision.path)
            state.replace(decision.path, build(decision, layer, data.get(decision.path, {})))

    def measure(self, state: State, decisions: list[Decision]) -> dict[str, dict[str, Any]]:
        """Return, per path, the options that need data, such as input ranges; called before any layer changes.

        Args:
            state: As for :meth:`execute`.
            decisions: Those that replace a layer.
        """
        return {}

    def allocates(self) -> bool:
        """Whether this step chooses what it does by the budget."""
        return False


def _text(value: object) -> str:
    """Return what ``repr`` says of a value, and of classes and functions their names."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return value.__name__ if isinstance(value, (type, types.FunctionType)) else repr(value)
