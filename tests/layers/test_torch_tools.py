"""Layers under tools of torch that the contract does not go through: tracers, late memory, forward-mode derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import lowrank_nn as lnn
from lowrank_nn.layers import LAYERS, LowRankLayer

MASKED = {
    "PrunedConv2d": {"granularity": "kernel"},
    "CodebookConv2d": {"nonzeros": 40},
    "CodebookLinear": {"nonzeros": 40},
    "QuantConv2d": {"nonzeros": 40, "activation_bits": 8},
    "QuantLinear": {"nonzeros": 40, "activation_bits": 8, "frozen": True},
}
"""Options of the constructor for tensors that are neither parameters nor computed."""


def with_tensors(name):
    """A layer built by its constructor, with all the tensors that its class may have, and its input."""
    torch.manual_seed(0)
    cls = LAYERS[name]
    linear = cls.replaces is nn.Linear
    dense = nn.Linear(12, 8) if linear else nn.Conv2d(6, 8, 3, padding=1)
    config = cls.from_pretrained_layer(dense, **cls.usual_options(dense)).config()
    return cls(**config | MASKED.get(name, {})), torch.randn(4, 12) if linear else torch.randn(2, 6, 5, 5)


@pytest.mark.parametrize("name", LAYERS)
def test_memory_that_comes_late_is_filled_by_reset_parameters(name):
    usual, x = with_tensors(name)
    with torch.device("meta"):
        layer = type(usual)(**usual.config())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for saved in layer.state_dict().values():
            saved.fill_(float("nan") if saved.is_floating_point() else 0)
    layer.reset_parameters()
    assert torch.isfinite(layer(x)).all()
    sizes = [float(built.dense_weight().detach().square().mean()) for built in (layer, usual)]
    assert 0.2 < sizes[0] / sizes[1] < 5
    masks = [getattr(built, "mask", None) for built in (layer, usual)]
    assert masks[1] is None or int(masks[0].sum()) == int(masks[1].sum())


def test_masks_that_are_there_stay_through_a_reset():
    for name in ("PrunedConv2d", "CodebookConv2d", "QuantConv2d"):
        layer, _ = with_tensors(name)
        mask = layer.mask.flip(0).clone()
        layer.mask.copy_(mask)
        layer.reset_parameters()
        assert torch.equal(layer.mask, mask)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_does_not_reach_what_is_made_of_a_layer(name):
    cls = LAYERS[name]
    torch.manual_seed(0)
    dense = nn.Linear(12, 8) if cls.replaces is nn.Linear else nn.Conv2d(6, 8, 3)
    options = cls.usual_options(dense) | ({"rank": lnn.Params(0.5)} if issubclass(cls, LowRankLayer) else {})
    expected = cls.from_pretrained_layer(dense, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = cls.from_pretrained_layer(dense, **options)
        again = layer.to_dense_layer()
    assert torch.equal(layer.dense_weight(), expected.dense_weight())
    assert torch.equal(again.weight, expected.dense_weight())


@pytest.mark.parametrize("name", ["SVDConv2d", "SpatialSVDConv2d", "TuckerConv2d", "CPConv2d", "TTConv2d", "SVDLinear"])
def test_symbolic_traces_show_the_factors(name):
    layer, x = with_tensors(name)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    torch.testing.assert_close(traced(x), layer(x).relu())
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == [f"0.{factor}" for factor, _ in layer.named_children()] + ["1"]


def on_kernels():
    """Layers that hold something made from their tensors from call to call in eval mode, with an input."""
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    quantized = lnn.QuantLinear.from_pretrained_layer(nn.Linear(64, 64), activation_bits=7, inputs=x, frozen=False)
    return [
        pytest.param(layer.eval(), x, id=type(layer).__name__)
        for layer in (quantized, lnn.BFloat16Linear(64, 64), lnn.CirculantLinear(64, 64, block_size=32))
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, for its decompositions
@pytest.mark.parametrize(("layer", "x"), on_kernels())
def test_forward_mode_derivatives_where_no_gradient_is_wanted(layer, x):
    direction = torch.ones_like(x)
    derivative = torch.func.jvp(layer.simulate if hasattr(layer, "simulate") else layer, (x,), (direction,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        layer(x)
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, derivative.detach())


@pytest.mark.parametrize(("layer", "x"), on_kernels())
def test_learning_in_eval_mode_by_steps_that_do_not_show(layer, x):
    layer = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)  # changes no version
    with torch.no_grad():
        before = layer(x)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer(x)
        torch.testing.assert_close(after, copy.deepcopy(layer)(x))
    assert not torch.allclose(after, before)
