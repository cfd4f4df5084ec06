"""One function call of a forward, as rules see it, and the table of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from lowrank_nn.errors import OptionError
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.labels import Labels
from lowrank_nn.graph.sizes import Attribute, TracedSize
from lowrank_nn.graph.units import Mean, Units

Planes = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Call:
    """A function call that has returned.

    Attributes:
        units: The units of the model.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
        where: Its name and place, for reasons.
        known: By the ``id`` of every tensor in the arguments, its labels before the call.
        modules: Paths of the modules whose forward is running.
        number: Of a statistic: how many there were before it in this forward.
        means: Filled by the rule: means over units that the result is.
    """

    units: Units
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    where: str
    known: dict[int, Labels]
    modules: frozenset[str] = frozenset()
    number: int = 0
    means: list[Mean] = dataclasses.field(default_factory=list)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument that stands at ``position`` or is called ``name``."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def labels(self, tensor: Any) -> Labels:
        """Return the labels of an argument; none for None and numbers."""
        return self.known[id(tensor)] if isinstance(tensor, Tensor) else Labels(())

    @property
    def first(self) -> Labels:
        """Labels of the first argument, a tensor."""
        return self.labels(self.args[0] if self.args else next(iter(self.kwargs.values())))

    def operands(self) -> list[Labels]:
        """Return the labels of all tensors in the arguments, but for ``out=``."""
        inputs = [value for name, value in self.kwargs.items() if name != "out"]
        return [self.labels(tensor) for tensor in tensors([*self.args, inputs])]

    def source(self, size: int) -> Attribute | None:
        """Return the attribute of a running module that the forward has this size from; None if it is none."""
        source = size.source if isinstance(size, TracedSize) else None
        # A size that another module keeps comes out of a cache that takes equal numbers for the same.
        return source if source is not None and source.module in self.modules else None

    def note_size(self, size: int, plane: Tensor, dim: int) -> None:
        """Note that the forward gives this size to a dim along which a tensor has these ids."""
        source = self.source(size)
        if source is not None and plane.shape[dim] > 1:
            self.units.note_size(source, plane.movedim(dim, 0).reshape(plane.shape[dim], -1))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all tensors in the result."""
        return [tuple(tensor.shape) for tensor in tensors(self.result)]


Outcome = list[Planes] | Callable[[], list[Planes]]
Rule = Callable[[Call], Outcome | None]
"""Returns the planes of the results: one entry for all, or one for each; or a function to be called for these only if
something uses the result; or None if it does not understand the call."""

RuleType = TypeVar("RuleType", bound=Rule)

RULES: dict[Callable[..., Any], Rule] = {}

NAMESPACES = (torch, torch.Tensor, F, torch._C._nn, torch.linalg, torch.special, torch.functional)


def functions(name: str) -> list[Callable[..., Any]]:
    """Return what torch calls by this name, as a function, as a method and in place; a property's getter."""
    found = []
    for namespace in NAMESPACES:
        for spelling in (name, f"{name}_"):
            value = getattr(namespace, spelling, None)
            if callable(value):
                found.append(value)
            elif namespace is Tensor and value is not None:
                found.append(value.__get__)
    return list(dict.fromkeys(found))


def rule_for(names: str) -> Callable[[RuleType], RuleType]:
    """Register a rule for the functions of torch with these names, separated by spaces."""

    def register(rule: RuleType) -> RuleType:
        RULES.update((function, rule) for name in names.split() for function in functions(name))
        return rule

    return register


def aligned(labels: Labels, dims: int, first: int | None = None) -> Labels:
    """Return ``labels`` of a tensor with dimensions of size 1 added in front, or with its first one at ``first``."""
    front = dims - len(labels.shape) if first is None else first
    back = dims - len(labels.shape) - front
    index = (*(None,) * front, ..., *(None,) * back)
    shape = (*(1,) * front, *labels.shape, *(1,) * back)
    return dataclasses.replace(labels, shape=shape, planes=tuple(plane[index] for plane in labels.planes))


def normal_dims(dims: Any, count: int) -> list[int]:
    """Return what torch's ``dim`` argument means: one, several, or all where it is None, empty or another argument."""
    if dims is None or dims == () or isinstance(dims, bool):  # x.std(False) is over all
        return list(range(count))
    chosen: Iterable[int] = [dims] if isinstance(dims, int) else dims
    return [dim % max(count, 1) for dim in chosen]


def register_rule(
    function: Callable[..., Any], rule: Rule | None = None, *, like: Callable[..., Any] | None = None
) -> None:
    """Say what a function does with channels, for :func:`lowrank_nn.find_groups` to look through it.

    Without a rule it is a barrier: all that goes into it is kept. Functions that are written with torch's own need
    none; those that are out of sight of torch's function modes (scripted ones) can have none.

    Args:
        function: An operator (``torch.ops.my_library.my_op``), a builtin of torch, or a function that calls
            ``torch.overrides.handle_torch_function``.
        rule: Takes a :class:`lowrank_nn.graph.rules.Call` and returns the planes of its results.
        like: A function with a rule that holds here too: ``register_rule(torch.ops.my.gate, like=torch.mul)`` for an
            element-wise one.

    Raises:
        OptionError: Neither or both of ``rule`` and ``like`` are given, or there is no rule for ``like``.
    """
    if (rule is None) == (like is None):
        raise OptionError("register_rule: pass either rule= or like=.")
    if like is not None:
        rule = RULES.get(like)
    if rule is None:
        raise OptionError(f"register_rule: there is no rule for like={full_name(like)}. Pass a function that has one.")
    RULES[function] = rule


def full_name(function: Any) -> str:
    """Return the name under which users know a function: ``torch.nn.functional.relu``."""
    return str(resolve_name(function) or getattr(function, "__qualname__", function))


def short_name(function: Any) -> str:
    """Return the name of a function, or of the property that it gets."""
    getter = getattr(function, "__name__", "") == "__get__"
    return str(getattr(function.__self__ if getter else function, "__name__", function))
