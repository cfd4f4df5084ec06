"""Sizes that a forward reads from plain attributes of its modules: whole numbers that know where they come from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A whole number that a module keeps.

    Attributes:
        module: Path of the module.
        name: Name of the attribute.
        index: Where in it the number stands, if it is a tuple or list; None if it is the number.
    """

    module: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path if self.index is None else f"{path}[{self.index}]"


class TracedSize(int):
    """A whole number that works like any other and tells the attribute it was read from; what is computed of it not.

    Attributes:
        source: The attribute; None when the run that it was traced for is over (a cache may still hold it).
    """

    source: Attribute | None

    def __new__(cls, value: int, source: Attribute) -> TracedSize:
        """Return the number ``value``."""
        size = super().__new__(cls, value)
        size.source = source
        return size

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Have copies and pickles be plain numbers."""
        return int, (int(self),)


@contextlib.contextmanager
def traced_sizes(model: nn.Module) -> Iterator[None]:
    """Within a block, put traced numbers in the place of all whole numbers, and tuples and lists of them, of modules.

    For use within a block that restores the modules' attributes, :func:`lowrank_nn.graph.preserve.untouched`. Torch's
    own layers are left as they are: what their attributes mean is known (:mod:`lowrank_nn.graph.attributes`).
    """
    made: list[TracedSize] = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, value in list(vars(module).items()):
            if sizes := _traced(value, Attribute(path, name)):
                vars(module)[name] = sizes[0] if type(value) is int else type(value)(sizes)
                made += sizes
    try:
        yield
    finally:
        for size in made:
            size.source = None


def _traced(value: Any, source: Attribute) -> list[TracedSize]:
    """Return a whole number, or those in a tuple or list of nothing else, traced; nothing of other values."""
    if type(value) is int:
        return [TracedSize(value, source)]
    if type(value) in (tuple, list) and all(type(item) is int for item in value):
        return [TracedSize(item, dataclasses.replace(source, index=index)) for index, item in enumerate(value)]
    return []


def shrink_attributes(model: nn.Module, less: dict[Attribute, int], before: dict[nn.Module, dict[str, Any]]) -> None:
    """Lower numbers that modules keep.

    Args:
        model: Changed in place.
        less: By attribute, what to subtract from its value before.
        before: Attributes of all modules concerned, before.
    """
    for source, count in less.items():
        module = model.get_submodule(source.module)
        value = before[module][source.name]
        if source.index is None:
            setattr(module, source.name, value - count)
        else:
            items = list(getattr(module, source.name))
            items[source.index] = value[source.index] - count
            setattr(module, source.name, type(value)(items))


def flat_sizes(arguments: Any) -> Iterator[int]:
    """Yield the whole numbers in the arguments of a reshape: each on its own, or all in a tuple or list."""
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            yield from flat_sizes(argument)
        elif isinstance(argument, int):
            yield argument
