"""Where in a forward a tensor comes from, in words that mean the same in every forward of the model."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_nn.graph.inputs import tensors
from lowrank_nn.layers import CompressedLayer

WHOLE = (_ConvNd, nn.Linear, CompressedLayer, _NormBase)
"""Layers looked at from outside only: what they do inside may differ between a model and its compressed copy."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The function call, or the layer, that a tensor comes from.

    Two forwards of a model agree on it as long as the forward of this one module takes the same way; what other
    modules do, and which of its layers are compressed, has no influence.

    Attributes:
        module: Path of the module whose forward calls the function; of the layer itself where a layer returned it.
        call: Number of that module's call, from 0.
        index: Number of the tensor among those that functions called by this forward itself return, from 0.
        function: Name of the function; "" where a layer returned the tensor.
    """

    module: str
    call: int
    index: int
    function: str


@dataclasses.dataclass
class _Frame:
    module: str
    call: int
    count: int = 0


class ForwardWatch(TorchFunctionMode):
    """Sees every function call and every layer's call of a forward, and names the places that tensors come from.

    Subclasses override :meth:`before`, :meth:`after_function` and :meth:`after_layer`. Works in the thread that
    enters it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 0  # above 0 inside a function or a whole layer, where nothing is looked at
        self._frames = [_Frame("", -1)]
        self._calls: collections.Counter[str] = collections.Counter()

    def attach(self, model: nn.Module) -> None:
        """Wrap the forward of every module, on the instances."""
        for path, module in model.named_modules():
            wrap = self._whole if isinstance(module, WHOLE) else self._framed
            vars(module)["forward"] = functools.wraps(module.forward)(wrap(path, module.forward))

    def before(self, arguments: Any) -> Any:
        """Called ahead of a function or a layer; what it returns comes back in the call after it."""
        return None

    def after_function(
        self, function: Callable[..., Any], options: dict[str, Any], seen: Any, outputs: list[tuple[Place, Tensor]]
    ) -> None:
        """Called when a function has returned ``outputs``; ``options`` are its keyword arguments."""

    def after_layer(self, place: Place, seen: Any, output: Any) -> None:
        """Called when the layer at ``place.module`` has returned ``output``."""

    def use_out_of_sight(self, arguments: Any) -> None:
        """Called when something unknown is done with tensors (where an :class:`OutOfSight` runs beside)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function and see what it takes and returns."""
        kwargs = kwargs or {}
        if self.hidden:
            return func(*args, **kwargs)
        seen = self.before((args, kwargs))
        result = self.hide(func, *args, **kwargs)
        frame = self._frames[-1]
        outputs = []
        for tensor in tensors(result):
            place = Place(frame.module, frame.call, frame.count, getattr(func, "__name__", ""))
            frame.count += 1
            outputs.append((place, tensor))
        self.after_function(func, kwargs, seen, outputs)
        return result

    def hide(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function without looking at what happens inside."""
        self.hidden += 1
        try:
            return function(*args, **kwargs)
        finally:
            self.hidden -= 1

    def _run_layer(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = self.before((args, kwargs))
        output = forward(*args, **kwargs)
        self.after_layer(Place(path, self._count(path), 0, ""), seen, output)
        return output

    def _framed(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def framed(*args: Any, **kwargs: Any) -> Any:
            self._frames.append(_Frame(path, self._count(path)))
            try:
                return forward(*args, **kwargs)
            finally:
                self._frames.pop()

        return framed

    def _whole(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def whole(*args: Any, **kwargs: Any) -> Any:
            if self.hidden:
                return forward(*args, **kwargs)
            return self.hide(self._run_layer, path, forward, args, kwargs)

        return whole

    def _count(self, path: str) -> int:
        self._calls[path] += 1
        return self._calls[path] - 1


class OutOfSight(TorchDispatchMode):
    """Reports operations on tensors that no function call seen by a watch stands for."""

    supports_higher_order_operators = True

    def __init__(self, watch: ForwardWatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports dynamo, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if any(kind is not Tensor for kind in types):
            return NotImplemented  # a subclass runs plain operations inside, and those come here
        if self._watch.hidden:
            return func(*args, **kwargs)
        self._watch.hide(self._watch.use_out_of_sight, (args, kwargs))
        return self._watch.hide(func, *args, **kwargs)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; of those made in inference mode, which do not count, 0."""
    return 0 if tensor.is_inference() else tensor._version
