"""What stands right behind a layer: the normalisation of its output, the residual addition that its branch ends in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_nn.graph.inputs import run_model, tensors
from lowrank_nn.graph.places import ForwardWatch, OutOfSight, Place, version_of
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.graph.sites import refuse_opaque
from lowrank_nn.graph.torch_functions import LOOKS
from lowrank_nn.layers import CompressedLayer

NORM_FORWARDS = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)

ADDITIONS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__})


@dataclasses.dataclass(frozen=True)
class Link:
    """What is known of the way that a layer's output takes.

    Attributes:
        norm: Path of the normalisation by running statistics that is called once, on the layer's output, which nothing
            else sees; None where there is none.
        shortcut: Where the tensor comes from that the layer's output (normalised, if there is a norm) is added to,
            which is the only thing that happens to it; the tensor had its value before the layer was called. None
            where no such addition was seen.
    """

    norm: str | None = None
    shortcut: Place | None = None


def find_links(model: nn.Module, example_inputs: Any) -> dict[str, Link]:
    """Run ``model`` once, in eval mode and without gradients, and return what follows each layer.

    A link is stated only where every step of it was seen: an operation that is not understood, or that happens out of
    sight (scripted functions, extensions), is a use of its arguments that ends the chain. The model and the process
    are left as they were.

    Args:
        model: Any module whose forward runs.
        example_inputs: What it is called with; see :func:`lowrank_nn.graph.call_model`.

    Returns:
        By path, in the order of the calls, for every convolution (transposed too), ``nn.Linear`` and compressed layer
        that is called exactly once.

    Raises:
        UnsupportedLayerError: The model is compiled or scripted, or holds layers that have no weights yet.
        PlanError: The forward failed; the error it raised is chained.
    """
    refuse_opaque(model)
    watch = _UseWatch()
    # Inference mode would hide changes in place.
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        watch.attach(model)
        with watch, OutOfSight(watch):
            output = run_model(model, example_inputs)
        watch.end(output)
    layers = {path for path, layer in model.named_modules() if isinstance(layer, (_ConvNd, nn.Linear, CompressedLayer))}
    once = [path for path, calls in watch.calls.items() if len(calls) == 1 and path in layers]
    return {path: _link(model, watch, path) for path in once}


@dataclasses.dataclass(eq=False)
class _Value:
    """A tensor between two changes of its memory.

    Attributes:
        place: Where it comes from; None where that was not seen.
        clock: When it got these values.
        version: The tensor's count of changes in place then.
        uses: What was done with it.
    """

    place: Place | None
    clock: int
    version: int
    uses: list[_Use] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class _Use:
    """One use of a value: by a layer, as one side of an addition, or (both None) by anything else."""

    layer: str | None = None
    added_to: _Value | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer: when, and what it returned."""

    clock: int
    output: _Value
    shape: Sequence[int]


class _UseWatch(ForwardWatch):
    """Notes what is done with every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[_Call]] = {}
        self._clock = 0
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def before(self, arguments: Any) -> list[tuple[Tensor, _Value]]:
        self._clock += 1
        return [(tensor, self._value(tensor)) for tensor in tensors(arguments)]

    def after_function(
        self,
        function: Callable[..., Any],
        options: dict[str, Any],
        seen: list[tuple[Tensor, _Value]],
        outputs: list[tuple[Place, Tensor]],
    ) -> None:
        if function in LOOKS:
            return
        # What comes back as it was, such as from a dropout in eval mode, was not used.
        same = {id(tensor) for tensor, value in seen if version_of(tensor) == value.version}
        returned = same & {id(tensor) for _, tensor in outputs}
        self._add_uses(function, options, [(t, value) for t, value in seen if id(t) not in returned])
        for place, tensor in outputs:
            if id(tensor) not in returned:
                self._values[tensor] = _Value(place, self._clock, version_of(tensor))

    def after_layer(self, place: Place, seen: list[tuple[Tensor, _Value]], output: Any) -> None:
        for _, value in seen:
            value.uses.append(_Use(layer=place.module if len(seen) == 1 else None))
        if isinstance(output, Tensor):
            value = _Value(place, self._clock, version_of(output))
            self._values[output] = value
            # The clock stood still while the layer ran.
            self.calls.setdefault(place.module, []).append(_Call(self._clock, value, output.shape))

    def use_out_of_sight(self, arguments: Any) -> None:
        """Note that something unknown was done with tensors."""
        self._clock += 1
        for tensor in tensors(arguments):
            self._value(tensor).uses.append(_Use())

    def end(self, output: Any) -> None:
        """Note what the model returned: whoever called it uses that."""
        self.use_out_of_sight(output)

    def _value(self, tensor: Tensor) -> _Value:
        version = version_of(tensor)
        known: _Value | None = self._values.get(tensor)  # type: ignore[no-untyped-call]
        if known is None or known.version != version:  # first seen now, or changed where it was not seen
            known = _Value(None, self._clock, version)
            self._values[tensor] = known
        return known

    @staticmethod
    def _add_uses(function: Callable[..., Any], options: dict[str, Any], seen: list[tuple[Tensor, _Value]]) -> None:
        plain = function in ADDITIONS and not options.keys() & {"alpha", "out"} and len(seen) == 2
        if plain and seen[0][0].shape == seen[1][0].shape:
            (_, first), (_, second) = seen
            first.uses.append(_Use(added_to=second))
            second.uses.append(_Use(added_to=first))
        else:
            for _, value in seen:
                value.uses.append(_Use())


def _link(model: nn.Module, watch: _UseWatch, path: str) -> Link:
    """Follow the output of the layer at ``path``, which was called once, as far as it is used once."""
    (call,) = watch.calls[path]
    norm, value = None, call.output
    use = _only_use(value)
    if use.layer is not None and _normalises(model.get_submodule(use.layer), model.get_submodule(path), call.shape):
        after = watch.calls.get(use.layer, [])
        if len(after) == 1:
            norm, value = use.layer, after[0].output
            use = _only_use(value)
    other = use.added_to
    earlier = other is not None and other.clock < call.clock
    return Link(norm, other.place if other is not None and earlier else None)


def _only_use(value: _Value) -> _Use:
    return value.uses[0] if len(value.uses) == 1 else _Use()


def _normalises(norm: nn.Module, layer: nn.Module, shape: Sequence[int]) -> bool:
    """Whether ``norm`` shifts each of the layer's output channels by a running mean."""
    if not isinstance(norm, _NormBase) or norm.running_mean is None or type(norm).forward not in NORM_FORWARDS:
        return False
    arguments = layer.dense_arguments() if isinstance(layer, CompressedLayer) else vars(layer)
    dims = 2 + len(arguments.get("kernel_size", ()))
    return len(shape) == dims and norm.num_features == arguments.get("out_channels", arguments.get("out_features"))
