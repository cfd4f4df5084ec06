"""Following units through one forward of a model, whatever it does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_nn.errors import PlanError
from lowrank_nn.graph.inputs import doubled, run_model, tensors
from lowrank_nn.graph.labels import Labels, support
from lowrank_nn.graph.parametrized import parametrized
from lowrank_nn.graph.places import ForwardWatch, OutOfSight, version_of
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.graph.rules import RULES, Call, Planes, Rule, full_name, short_name
from lowrank_nn.graph.rules.means import means_left
from lowrank_nn.graph.rules.mixing import STATISTICS
from lowrank_nn.graph.sites import refuse_opaque
from lowrank_nn.graph.sizes import traced_sizes
from lowrank_nn.graph.torch_functions import LOOKS, python_body
from lowrank_nn.graph.units import IN, OUT, Units

_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Known:
    """Labels of a tensor, or what makes them; its count of changes in place then."""

    labels: Labels | Callable[[], Labels]
    version: int
    storage: int

    def force(self) -> Labels:
        if not isinstance(self.labels, Labels):
            self.labels = self.labels()
        return self.labels


def follow(model: nn.Module, example_inputs: Any) -> Units:
    """Run ``model`` in eval mode and without gradients, and return the units of its parameters and buffers.

    Run once as it is called, once with a batch twice as large, if it takes one: what either of them unites or freezes
    counts. Where that leaves parameters unused, it is run in train mode too. The model and the process are left as they
    were.

    Raises:
        UnsupportedLayerError: The model is compiled or scripted, or holds layers that have no weights yet.
        PlanError: The forward failed; the error it raised is chained.
    """
    refuse_opaque(model)
    with contextlib.suppress(PlanError):
        return _follow(model, example_inputs, _tracing)
    # There is code that takes plain numbers only; if it was not that, here is the error again.
    return _follow(model, example_inputs, evaluating)


_Around = Callable[[nn.Module], AbstractContextManager[None]]
"""A block for forwards, which leaves the model as it was."""


@contextlib.contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """As :func:`evaluating`, with traced sizes."""
    with evaluating(model), traced_sizes(model):
        yield


def _follow(model: nn.Module, example_inputs: Any, around: _Around) -> Units:
    follower = _Follower(model)
    with around(model):
        follower.run(model, example_inputs)
        follower.run_doubled(model, example_inputs)
    if not all(map(follower.has_seen, model.parameters())):
        with around(model):
            follower.run_training(model, example_inputs)
    follower.units.settle()
    return follower.units


class _Follower(ForwardWatch):
    """Carries labels along with every tensor of a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.units = Units()
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._refusals = dict(parametrized(model))
        self._refused_parameters = {
            id(parameter): reason
            for path, reason in self._refusals.items()
            for parameter in model.get_submodule(path).parameters()
        }
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def run(self, model: nn.Module, example_inputs: Any) -> None:
        """Follow one forward, without gradients."""
        self.attach(model)
        self._forward(model, example_inputs)

    def run_doubled(self, model: nn.Module, example_inputs: Any) -> None:
        """Follow a further forward, with a larger batch: some treat the batch as channels."""
        try:
            inputs = doubled(example_inputs)
        except Exception as error:  # of what cannot be copied, or cut from a view
            _logger.debug("no second batch size: %s", error)
            return
        with contextlib.suppress(PlanError):  # it takes one size only
            self._forward(model, inputs)

    def _forward(self, model: nn.Module, example_inputs: Any) -> None:
        self._statistics = 0
        # Inference mode would hide changes in place.
        with torch.inference_mode(False), torch.no_grad():
            with self, OutOfSight(self):
                output = run_model(model, example_inputs)
            self._freeze(output, "reaches the output of the model")

    def run_training(self, model: nn.Module, example_inputs: Any) -> None:
        """Follow a forward in train mode: what auxiliary heads read there must shrink too."""
        known = len(self.units.sources)
        for module in model.modules():
            vars(module)["training"] = True
        try:
            self.run(model, example_inputs)
        except PlanError:  # it may want targets; how far the output depends on what it used is not known
            for source in self.units.sources[known:]:
                ids = torch.arange(source.first, source.first + source.size, device="cpu")
                computed = ids[self.units.kinds()[ids] == OUT]
                self.units.freeze(computed, "computed in train mode only, where the forward failed")

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether anything was done with a tensor."""
        return tensor in self._known

    def attach(self, model: nn.Module) -> None:
        """Wrap the forward of every module, on the instances, to know where a function is called."""
        for path, module in model.named_modules():
            wrap = self._refused if path in self._refusals else self._framed
            vars(module)["forward"] = functools.wraps(module.forward)(wrap(path, module.forward))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function, and find the labels of what it returns."""
        kwargs = kwargs or {}
        if self.hidden or func in LOOKS:
            return self.hide(func, *args, **kwargs)
        rule = RULES.get(func) or RULES.get(getattr(func, "overloadpacket", func))
        if rule is None and (body := python_body(func)) is not None:
            with self:
                return body(*args, **kwargs)
        return self.hide(self._run, rule, func, args, kwargs)

    def read(self, tensor: Tensor) -> Labels:
        """Return the labels of a tensor."""
        known: _Known | None = self._known.get(tensor)  # type: ignore[no-untyped-call]
        if known is None:
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                self._freeze(torch._C._functorch.get_unwrapped(tensor), f"goes into torch.func, in {self._path}")
            known = self._write(tensor, self._new(tensor))
        elif known.version != version_of(tensor):
            self.units.freeze(known.force().ids(), f"changed in place out of sight, in {self._path}")
            known = self._write(tensor, Labels(tuple(tensor.shape)))
        return known.force()

    def use_out_of_sight(self, arguments: Any) -> None:
        """Freeze what goes into code that cannot be watched."""
        self._freeze(arguments, f"used by code that cannot be watched, in {self._path}")

    @property
    def _path(self) -> str:
        return self._frames[-1].module or "the model itself"

    def _write(self, tensor: Tensor, labels: Labels | Callable[[], Labels]) -> _Known:
        known = _Known(labels, version_of(tensor), _storage(tensor))
        self._known[tensor] = known
        return known

    def _new(self, tensor: Tensor) -> Labels:
        """Return fresh units for a parameter or buffer; any other tensor comes from outside and has none."""
        shape = tuple(tensor.shape)
        name = self._names.get(id(tensor))
        if name is None:
            return Labels(shape)
        planes = []
        for dim, size in enumerate(shape):
            if size > 1:
                ids = self.units.fresh(size, (name, dim))
                planes.append(ids[(*(None,) * dim, slice(None), *(None,) * (len(shape) - 1 - dim))])
                if id(tensor) in self._refused_parameters:
                    self.units.freeze(ids, self._refused_parameters[id(tensor)])
                    self.units.mark(ids, IN if dim else OUT)
        return Labels(shape, tuple(planes), constant=2 if isinstance(tensor, nn.Parameter) else 1)

    def _run(self, rule: Rule | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = {id(tensor): tensor for tensor in tensors((args, kwargs))}
        known = {key: self.read(tensor) for key, tensor in seen.items()}
        versions = {key: version_of(tensor) for key, tensor in seen.items()}
        result = func(*args, **kwargs)
        made = args[0] if func is Tensor.__setitem__ else result
        where = f"{short_name(func)} in {self._path}"
        modules = frozenset(frame.module for frame in self._frames)
        call = Call(self.units, func, args, kwargs, made, where, known, modules, self._statistics)
        self._statistics += func in STATISTICS
        for tensor, labels_of in self._results(rule, call):
            if id(tensor) not in seen:
                self._write(tensor, labels_of)
                if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # what it is outside is not seen
                    self._freeze(tensor, f"comes out of torch.func, in {self._path}")
            elif version_of(tensor) != versions.pop(id(tensor), None):
                self._change(tensor, known[id(tensor)], labels_of())
        for key in versions:  # arguments that were not returned
            if version_of(seen[key]) != self._known[seen[key]].version:
                # A function with a rule is known to keep the units (a norm updates its statistics).
                self._change(seen[key], known[key], known[key] if rule is not None else Labels(known[key].shape))
        return result

    def _results(self, rule: Rule | None, call: Call) -> list[tuple[Tensor, Callable[[], Labels]]]:
        """Return the tensors that a call returned or wrote into, each with what gives its labels."""
        means, planes = means_left(rule, call), self._ask(rule, call)
        origins = [labels.constant for labels in call.known.values()]
        constant = max(origins, default=0) if all(origins) else 0
        made = list(tensors(call.result))
        blanks = (Labels(tuple(tensor.shape), (), constant, means) for tensor in made)
        given = [functools.partial(self._labels, call, planes, *numbered) for numbered in enumerate(blanks)]
        return list(zip(made, given, strict=True))

    def _ask(self, rule: Rule | None, call: Call) -> Callable[[], list[Planes]]:
        """Return what gives the planes of the results, for one use of a function; without a rule it is a barrier."""
        outcome = self._attempt(call, lambda: None if rule is None else rule(call))
        if callable(outcome):
            return functools.cache(lambda: self._attempt(call, outcome) or self._bar(call))
        results = self._bar(call) if outcome is None else outcome
        return lambda: results

    @staticmethod
    def _attempt(call: Call, step: Callable[[], _Result]) -> _Result | None:
        """Run a rule. One that fails has not understood the call; that must not end the user's forward."""
        try:
            return step()
        except Exception:
            _logger.warning("the rule for %s failed; it is taken as unknown", call.where, exc_info=True)
            return None

    def _bar(self, call: Call) -> list[Planes]:
        for labels in call.known.values():
            self.units.freeze(labels.ids(), f"no rule for {full_name(call.function)}, called in {self._path}")
        return [[]]

    def _labels(self, call: Call, made: Callable[[], list[Planes]], index: int, blank: Labels) -> Labels:
        """Return the labels of a result, of which ``blank`` says all but the planes."""
        results, shape = made(), blank.shape
        planes = results[index if len(results) > 1 else 0]
        for plane in planes:
            assert plane.dim() == len(shape)
            assert all(size in (1, full) for size, full in zip(plane.shape, shape, strict=True))
            if len(support(plane)) > 1:
                self.units.note_box(plane)
        return dataclasses.replace(blank, planes=tuple(planes), means=(*blank.means, *call.means))

    def _change(self, tensor: Tensor, before: Labels, after: Labels) -> None:
        """Note a change in place. Other tensors in the same memory stay known where the units stay the same."""
        storage = _storage(tensor)
        everything = self._known.items()  # type: ignore[no-untyped-call]
        others = [known for t, known in everything if known.storage == storage and t is not tensor]
        old, new = ([p for p in labels.planes if not self.units.stay(p)] for labels in (before, after))
        same = len(old) == len(new) and all(map(torch.equal, old, new))
        if same:
            for known in others:
                known.version = version_of(tensor)
        elif others or tensor._is_view():
            reason = f"written into a part of a tensor, in {self._path}"
            self.units.freeze(torch.cat([before.ids(), after.ids()]), reason)
        self._write(tensor, after)

    def _refused(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Freeze all that a layer with a computed weight reads."""
        framed = self._framed(path, forward)

        def refused(*args: Any, **kwargs: Any) -> Any:
            self.hide(self._freeze, (args, kwargs), self._refusals[path])
            return framed(*args, **kwargs)

        return refused

    def _freeze(self, arguments: Any, reason: str) -> None:
        for tensor in tensors(arguments):
            labels = self.read(tensor)
            self.units.freeze_means(labels.means)
            self.units.freeze(labels.ids(), reason)


def _storage(tensor: Tensor) -> int:
    plain = tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.untyped_storage()._cdata if plain else id(tensor)
