"""Checks that a layer trains, from scratch and after compression, and that its leaves can be compressed again."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers import LAYERS, CompressedLayer, LowRankLayer
from lowrank_nn.testing._tools import (
    TOLERANCE,
    bias_of,
    built,
    compress,
    dense_output,
    expect,
    expect_acts_as_dense_weight,
    expect_close,
    fresh,
    options_for,
    seeded,
)
from lowrank_nn.testing.cases import Case

INITIAL_DRAWS = 60
TRAINING_STEPS = 12


def _cotangent(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like.dtype)


def check_gradients(cls: type[CompressedLayer], case: Case) -> None:
    """A finite gradient, not all zero, reaches the input and every parameter that trains."""
    layer, x = built(cls, case).train().requires_grad_(True), case.input().requires_grad_(True)
    y = layer(x)
    y.backward(_cotangent(y))
    gradients = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    for name, gradient in gradients.items():
        expect(gradient is not None, f"no gradient reaches {name}")
        assert gradient is not None
        expect(bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite")
        expect(bool(gradient.any()), f"the gradient of {name} is zero")


def check_gradients_are_those_of_dense_weight(cls: type[CompressedLayer], case: Case) -> None:
    """Forward and the dense layer with ``dense_weight()`` have the same gradients in every parameter."""
    layer, x = built(cls, case).double().train().requires_grad_(True), case.input().double()
    parameters = list(layer.parameters())
    if not parameters:
        return
    direct = layer(x)
    through_weight = dense_output(case, x, layer.dense_weight(), bias_of(layer))
    gradients = [torch.autograd.grad(y, parameters, _cotangent(y), allow_unused=True) for y in (direct, through_weight)]
    for (name, _), actual, expected in zip(layer.named_parameters(), *gradients, strict=True):
        expect(actual is not None and expected is not None, f"no gradient reaches {name}")
        assert actual is not None
        assert expected is not None
        expect_close(actual, expected, 1e-8, f"gradient of {name}")


def check_dense_weight_derivative(cls: type[CompressedLayer], case: Case) -> None:
    """The gradient of ``dense_weight()`` is its derivative, by central differences in float64."""
    layer = built(cls, case).double().requires_grad_(True)
    weight = layer.dense_weight()
    cotangent = _cotangent(weight)
    parameters = [p for p in layer.parameters() if p is not layer.bias]
    if not parameters:
        return
    gradients = torch.autograd.grad(weight, parameters, cotangent)
    directions = [_cotangent(p) for p in parameters]
    predicted = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = copy.deepcopy(layer).requires_grad_(False)
        moving = [p for p in moved.parameters() if p is not moved.bias]
        for parameter, direction in zip(moving, directions, strict=True):
            parameter.add_(direction, alpha=sign * step)
        values.append(float((moved.dense_weight() * cotangent).sum()))
    measured = (values[0] - values[1]) / (2 * step)
    scale = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    expect(abs(measured - predicted) <= 1e-6 * scale, f"derivative {measured:.8g}, the gradient says {predicted:.8g}")


def check_initial_variance(cls: type[CompressedLayer], case: Case) -> None:
    """The weight of a fresh layer (the entries it keeps) has torch's default variance, 1 / (3 fan_in)."""
    layer = built(cls, case).float()
    variances = []
    with seeded(), torch.no_grad():
        layer = fresh(layer, dtype=torch.float32)
        expected = 1 / (3 * layer.dense_weight()[0].numel())
        for _ in range(INITIAL_DRAWS):
            layer.reset_parameters()
            weight = layer.dense_weight()
            variances.append(float(weight[weight != 0].square().mean()))
    sample = torch.tensor(variances, dtype=torch.float64, device="cpu")
    mean, error = float(sample.mean()), float(sample.std()) / math.sqrt(INITIAL_DRAWS)
    expect(
        abs(mean - expected) <= 4 * error + 0.05 * expected,
        f"the variance is {mean:.4g} +- {error:.2g}, torch's default is {expected:.4g}",
    )


def check_trains_from_scratch(cls: type[CompressedLayer], case: Case) -> None:
    """A fresh layer learns: a few Adam steps towards the dense layer's outputs lower the squared error.

    A layer whose configuration leaves nothing to train (all of it stored as integers) is let off.
    """
    x = case.input()
    target = case.layer()(x).detach().float()
    with seeded():
        layer = fresh(built(cls, case), dtype=case.dtype).train()
    if not list(layer.parameters()):
        return
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-4)
    losses = []
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        loss = (layer(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    expect(losses[-1] < 0.99 * losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")


def _again(kind: type[nn.Module]) -> list[type[CompressedLayer]]:
    """Registered classes that act on single leaves (pruning, quantization) of this kind."""
    return [cls for cls in LAYERS.values() if cls.replaces is kind and not issubclass(cls, LowRankLayer)]


def check_leaves_compress_again(cls: type[CompressedLayer], case: Case) -> None:
    """With any one leaf, or all of them, pruned or quantized, the layer still acts as its ``dense_weight()``."""
    layer = built(cls, case)
    stages = list(layer.stages())
    leaves = [(name, leaf) for name, leaf in layer.named_children() if any(leaf is stage for stage in stages)]
    for other in dict.fromkeys(again for _, leaf in leaves for again in _again(type(leaf))):
        changed = copy.deepcopy(layer)
        for name, leaf in leaves:
            if other.replaces is type(leaf):
                setattr(changed, name, compress(other, leaf, other.usual_options(leaf)))
                what = f"after {other.__name__} on {name}"
                expect_acts_as_dense_weight(changed, case, case.input(), TOLERANCE[case.dtype], what)
        expect_close(changed.weight, changed.dense_weight(), 0, f"weight after {other.__name__}")
        expect(changed.cost(case.input_shape).nonzeros > 0, f"no cost after {other.__name__}")
        expect((changed.bias is None) == (layer.bias is None), f"the bias is lost after {other.__name__}")
        expect_acts_as_dense_weight(
            copy.deepcopy(changed), case, case.input(), TOLERANCE[case.dtype], f"copy after {other.__name__}"
        )


def check_zeros_stay(cls: type[CompressedLayer], case: Case) -> None:
    """On top of a pruned layer the zeros stay zero, also in training; or the pruned layer is refused."""
    plain = dataclasses.replace(case, options={}) if case.options else case
    for other in _again(cls.replaces):
        pruned = built(other, plain)
        zeros = pruned.dense_weight() == 0
        if other is cls or not zeros.any():
            continue
        try:
            layer = compress(cls, pruned, options_for(cls, case, pruned))
        except UnsupportedLayerError as error:
            expect(str(error).startswith(cls.__name__), f"the message does not start with the class: {error}")
            continue
        expect(not layer.dense_weight()[zeros].any(), f"zeros of {other.__name__} are lost")
        _take_a_step(layer, case)
        expect(not layer.dense_weight()[zeros].any(), f"zeros of {other.__name__} are lost in training")
        expect_acts_as_dense_weight(layer, case, case.input(), TOLERANCE[case.dtype], f"on top of {other.__name__}")


def check_training_keeps_zeros(cls: type[CompressedLayer], case: Case) -> None:
    """Entries that a layer without factors holds at zero are zero after a training step with weight decay too."""
    layer = built(cls, case)
    if list(layer.stages()) or issubclass(cls, LowRankLayer):
        return
    zeros = layer.dense_weight() == 0
    if cls.lossless_options(case.layer()) is not None:
        _take_a_step(layer, case)
        expect(not layer.dense_weight()[zeros].any(), "zeros came back in training")


def _take_a_step(layer: CompressedLayer, case: Case) -> None:
    layer.train().requires_grad_(True)
    parameters = list(layer.parameters())
    if not parameters:
        return
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y = layer(case.input())
        y.backward(_cotangent(y))
        optimizer.step()
