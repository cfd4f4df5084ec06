"""Checks of how a layer is made from a dense one: nothing dropped, nothing touched."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.testing._tools import (
    bias_of,
    built,
    built_with_source,
    compress,
    expect,
    expect_same_state,
    options_for,
    seeded,
    storages,
)
from lowrank_nn.testing.cases import Case


def check_source_untouched(cls: type[CompressedLayer], case: Case) -> None:
    """The dense layer keeps its values, flags and attributes, and shares no memory with the new layer."""
    layer, dense = built_with_source(cls, case)
    reference = case.layer()
    expect(not storages(dense) & storages(layer), "memory is shared with the source")
    expect_same_state(dense, reference, "the source after compressing it")
    expect(set(vars(dense)) == set(vars(reference)), "attributes were added to the source")
    expect(repr(dense) == repr(reference), f"the source became {dense!r}")
    expect(dense.training == reference.training, "the train/eval mode of the source changed")
    for name, parameter in dense.named_parameters():
        trains = reference.get_parameter(name).requires_grad
        expect(parameter.requires_grad == trains, f"requires_grad of the source's {name} changed")
        expect(parameter.grad is None, f"the source's {name} got a gradient")
        expect(parameter.stride() == reference.get_parameter(name).stride(), f"strides of the source's {name} changed")


def check_flags_follow(cls: type[CompressedLayer], case: Case) -> None:
    """Train/eval mode, requires_grad flags, dtype, device and memory format are the source's."""
    layer, dense = built(cls, case), case.layer()
    for module in layer.modules():
        expect(module.training == dense.training, f"training is {module.training} in {type(module).__name__}")
    weight = dense.get_parameter("weight")
    for name, parameter in layer.named_parameters():
        expect(parameter.dtype == weight.dtype, f"{name} is {parameter.dtype}, expected {weight.dtype}")
        expect(parameter.device == weight.device, f"{name} is on {parameter.device}, expected {weight.device}")
        source = "bias" if parameter is layer.bias else "weight"
        trains = dense.get_parameter(source).requires_grad
        expect(parameter.requires_grad == trains, f"requires_grad of {name} is {parameter.requires_grad}")
        expect(parameter.is_leaf and parameter.grad is None, f"{name} is not a fresh leaf")
    bias, expected = bias_of(layer), bias_of(dense)
    expect((bias is None) == (expected is None), "the bias is lost, or one was added")
    if bias is not None and expected is not None:
        expect(isinstance(bias, nn.Parameter), "the bias is no parameter")
        expect(torch.equal(bias, expected), "the bias changed")
    if case.channels_last:
        for name, parameter in layer.named_parameters():
            kept = parameter.dim() != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
            expect(kept, f"{name} is not channels last, as the source is")


@contextlib.contextmanager
def _globals_watched() -> Iterator[None]:
    """Require that the block leaves random states, warnings filter and settings alone, and prints nothing."""

    def state() -> tuple[object, ...]:
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - it must not have moved
        settings = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
        drawn = torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(legacy)
        return *drawn, list(warnings.filters), settings

    before, printed = state(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield
    after = state()
    names = (
        "torch's random state",
        "random's state",
        "numpy's random state",
        "the warnings filter",
        "torch's settings",
    )
    for name, old, new in zip(names, before, after, strict=True):
        expect(old == new, f"{name} changed")
    expect(not printed.getvalue(), f"it printed {printed.getvalue()!r}")


def check_deterministic(cls: type[CompressedLayer], case: Case) -> None:
    """Two builds, and two calls, are equal bit for bit; no random number is drawn, no global state touched."""
    layer, dense, x = built(cls, case), case.layer(), case.input()
    with seeded(1), _globals_watched():
        again = compress(cls, dense, options_for(cls, case, dense))
        expect_same_state(again, layer, "second build")
        expected = layer(x)
    with seeded(2), _globals_watched():
        expect(torch.equal(again(x), expected), "the second layer gives another output")
        expect(torch.equal(layer(x), expected), "the second call gives another output")


def check_meta(cls: type[CompressedLayer], case: Case) -> None:
    """On the meta device the same code gives the same configuration, cost, state shapes and output shape."""
    layer, dense = built(cls, case), case.layer().to("meta")
    shadow = compress(cls, dense, options_for(cls, case, dense))
    devices = {t.device.type for t in (*shadow.parameters(), *shadow.buffers())}
    expect(devices == {"meta"}, f"tensors are on {sorted(devices)}, expected meta")
    expect(shadow.config() == layer.config(), f"config is {shadow.config()}, expected {layer.config()}")
    costs = shadow.cost(case.input_shape), layer.cost(case.input_shape)
    expect(costs[0] == costs[1], f"cost is {costs[0]}, expected {costs[1]}")
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (shadow, layer)]
    expect(shapes[0] == shapes[1], f"state is {shapes[0]}, expected {shapes[1]}")
    y = shadow(case.input().to("meta"))
    expect(tuple(y.shape) == layer.output_shape(case.input_shape), f"output shape on meta is {tuple(y.shape)}")


def _with_value(value: float) -> Callable[[nn.Module], nn.Module]:
    def spoil(layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.get_parameter("weight")[-1].fill_(value)
        return layer

    return spoil


def _complex(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach().to(torch.complex64))
    return layer


def _overriding(layer: nn.Module) -> nn.Module:
    kind = type(layer)

    class Scaled(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * kind.forward(self, x)
            return y

    layer.__class__ = Scaled
    return layer


def _patched(layer: nn.Module) -> nn.Module:
    kind = type(layer)
    layer.forward = lambda x: 2 * kind.forward(layer, x)
    return layer


def _weight_normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


ALTERATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a NaN in the weight": _with_value(float("nan")),
    "an infinity in the weight": _with_value(float("inf")),
    "a parametrized weight": parametrizations.weight_norm,
    "weight_norm by hook": _weight_normed,
    "torch.nn.utils.prune": lambda layer: prune.identity(layer, "weight"),  # type: ignore[no-untyped-call]
    "a subclass with its own forward": _overriding,
    "an instance with its own forward": _patched,
    "a complex weight": _complex,
    "a layer of another class": lambda layer: nn.ReLU(),
    "a transposed convolution": lambda layer: nn.ConvTranspose2d(2, 2, 1, device="meta"),
}
"""Ways to make a layer that cannot be carried over whole."""


def check_refuses_altered_layers(cls: type[CompressedLayer], case: Case) -> None:
    """Layers that cannot be carried over whole are refused, by ``UnsupportedLayerError`` naming the class first."""
    options = options_for(cls, case, case.layer())
    sources = {what: alter(case.layer()) for what, alter in ALTERATIONS.items()}
    if not issubclass(cls, cls.stacks_on):
        sources["a layer compressed already"] = built(cls, case)
    for what, source in sources.items():
        message = _refusal(cls, source, options)
        expect(message is not None, f"{what} was accepted")
        assert message is not None
        expect(message.startswith(cls.__name__), f"{what}: the message does not start with the class: {message}")
        expect(len(message) > 40, f"{what}: the message says too little: {message}")


def _refusal(cls: type[CompressedLayer], source: nn.Module, options: dict[str, Any]) -> str | None:
    try:
        compress(cls, source, options)
    except UnsupportedLayerError as error:
        return str(error)
    return None
