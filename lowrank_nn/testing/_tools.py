"""What the checks share: building, comparing, and the dense oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_nn.layers import CompressedLayer
from lowrank_nn.testing.cases import Case

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest relative error between two ways to compute the same, by dtype."""


def expect(condition: bool, message: str) -> None:
    """Raise an ``AssertionError`` with ``message`` unless ``condition``; holds under ``python -O`` too."""
    if not condition:
        raise AssertionError(message)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected``; NaN gives infinity."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def weight_error(layer: CompressedLayer, case: Case) -> float:
    """Return the relative error of the layer's weight as an approximation of the case's."""
    return relative_error(layer.dense_weight().cpu(), case.layer().get_parameter("weight"))


def expect_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Require a relative error of at most ``tolerance``."""
    error = relative_error(actual, expected)
    expect(error <= tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e} is allowed")


def expect_same_state(actual: nn.Module, expected: nn.Module, what: str) -> None:
    """Require the same state-dict keys with bit-equal tensors."""
    left, right = actual.state_dict(), expected.state_dict()
    expect(list(left) == list(right), f"{what}: state-dict keys {list(left)}, expected {list(right)}")
    for key, value in left.items():
        expect(value.dtype == right[key].dtype, f"{what}: {key} is {value.dtype}, expected {right[key].dtype}")
        expect(torch.equal(value, right[key]), f"{what}: {key} differs")


def compress(cls: type[CompressedLayer], layer: nn.Module, options: dict[str, Any]) -> CompressedLayer:
    """Return ``cls.from_pretrained_layer(layer, **options)``; the factory's keywords are the subclass's own."""
    factory: Any = cls
    new = factory.from_pretrained_layer(layer, **options)
    expect(type(new) is cls, f"from_pretrained_layer returns a {type(new).__name__}")
    assert isinstance(new, CompressedLayer)
    return new


def built(cls: type[CompressedLayer], case: Case) -> CompressedLayer:
    """Return the layer made from the case's dense layer; a copy, free to be changed."""
    return copy.deepcopy(built_with_source(cls, case)[0])


# Decompositions are the slow part of the checks, and deterministic: one for all of them.
@functools.lru_cache(maxsize=1024)
def built_with_source(cls: type[CompressedLayer], case: Case) -> tuple[CompressedLayer, nn.Module]:
    """Return the layer and the dense layer it was made from; neither may be changed."""
    layer = case.layer()
    return compress(cls, layer, options_for(cls, case, layer)), layer


def options_for(cls: type[CompressedLayer], case: Case, layer: nn.Module) -> dict[str, Any]:
    """Return the usual options on ``layer``, with what the case sets in place."""
    return cls.usual_options(layer) | dict(case.options)


def storages(layer: nn.Module) -> set[int]:
    """Return the addresses of the memory that the layer's tensors lie in."""
    return {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers()) if t.numel()}


def dense_output(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what torch's own layer computes with ``weight``: the oracle, independent of the compressed layer."""
    layer = case.layer().to(device=x.device)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    y: Tensor = functional_call(layer, tensors, (x,))
    return y


def expect_acts_as_dense_weight(layer: CompressedLayer, case: Case, x: Tensor, tolerance: float, what: str) -> None:
    """Require that ``layer(x)`` is what torch's own layer computes with ``layer.dense_weight()``."""
    expected = dense_output(case, x, layer.dense_weight(), bias_of(layer))
    expect_close(layer(x), expected, tolerance, f"{what}: forward against the dense layer with dense_weight()")


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias of any layer, compressed or dense."""
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def fresh(layer: CompressedLayer, *, dtype: torch.dtype) -> CompressedLayer:
    """Return a layer of the same configuration with newly drawn weights."""
    return type(layer)(**layer.config(), dtype=dtype)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the global random state of the CPU as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
