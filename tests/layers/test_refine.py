"""Refinement of any low-rank layer under a metric."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lowrank_nn.decompose import Metric, weighted_svd
from lowrank_nn.layers import CPConv2d, LowRankLayer, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.layers._refine import refine_
from lowrank_nn.layers._shapes import CompressedLinear
from tests.layers.geometries import dense_conv
from tests.layers.metrics import random_metric


def dense_linear(dtype=torch.float64):
    layer = nn.Linear(12, 10, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(10, 12, generator=torch.Generator().manual_seed(0)))
    return layer


class Sandwich(LowRankLayer, CompressedLinear):
    """What a third party may write: scales of outputs, a shared matrix, and a fixed basis of the inputs."""

    def __init__(self, in_features, out_features, bias=True, *, rank, device=None, dtype=None):
        super().__init__(in_features, out_features)
        self.rank = rank
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.mix = nn.Linear(rank, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reduce.weight.requires_grad_(False)

    rank_problem = usual_options = lossless_options = approximate_ = reset_parameters = None

    def forward(self, input):
        return self.expand(self.mix(self.reduce(input)))

    def dense_weight(self):
        return self.expand.weight @ self.mix.weight @ self.reduce.weight

    def stages(self):
        yield from (self.reduce, self.mix, self.expand)


def sandwich(rank=3, dtype=torch.float64):
    layer = Sandwich(12, 10, rank=rank, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def error(layer, weight, metric):
    wide = copy.deepcopy(layer).double()
    return metric.error(weight.double() - wide.dense_weight())


LAYERS = [
    (lambda dense: SVDConv2d.from_pretrained_layer(dense, rank=3), "conv"),
    (lambda dense: TuckerConv2d.from_pretrained_layer(dense, rank=(3, 2)), "conv"),
    (lambda dense: CPConv2d.from_pretrained_layer(dense, rank=4), "conv"),
    (lambda dense: SVDLinear.from_pretrained_layer(dense, rank=3), "linear"),
]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("build", "kind"), LAYERS)
def test_lowers_the_error_of_any_layer_in_any_dtype(build, kind, dtype, diagonal):
    dense = dense_conv(dtype, kernel_size=3) if kind == "conv" else dense_linear(dtype)
    metric = random_metric(dense, diagonal=diagonal)
    layer = build(dense)
    before, bias = error(layer, dense.weight, metric), layer.bias.detach().clone()
    refine_(layer, dense.weight, metric)
    assert error(layer, dense.weight, metric) < 0.9 * before
    assert torch.equal(layer.bias, bias)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


@pytest.mark.parametrize("curvature", [False, True])
def test_finds_the_optimum_where_there_is_a_closed_form(curvature):
    dense = dense_linear()
    metric = random_metric(dense, curvature=curvature)
    layer = SVDLinear.from_pretrained_layer(dense, rank=3)
    refine_(layer, dense.weight, metric, iterations=400)
    left, right = weighted_svd(dense.weight, metric, 3)
    best = metric.error(dense.weight - left[0] @ right[0])
    assert best * (1 - 1e-9) <= error(layer, dense.weight, metric) < best * 1.001


def test_the_factors_are_also_refitted_to_another_weight():
    dense = dense_conv(kernel_size=3)
    metric, other = random_metric(dense), dense.weight.detach().roll(1, 0)
    layer = TuckerConv2d.from_pretrained_layer(dense, rank=(4, 3))
    before = error(layer, other, metric)
    refine_(layer, other, metric)
    assert error(layer, other, metric) < 0.7 * before


def test_fixed_parameters_stay_and_flags_are_kept():
    dense, layer = dense_linear(), sandwich()
    metric = random_metric(dense)
    before, basis, bias = error(layer, dense.weight, metric), layer.reduce.weight.clone(), layer.bias.detach().clone()
    refine_(layer, dense.weight, metric)
    assert error(layer, dense.weight, metric) < before
    assert torch.equal(layer.reduce.weight, basis)
    assert torch.equal(layer.bias, bias)
    assert [p.requires_grad for p in layer.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_layer_frozen_as_a_whole_is_fitted_and_stays_frozen():
    dense, layer = dense_linear(), sandwich().requires_grad_(False)
    metric = random_metric(dense)
    before, basis = error(layer, dense.weight, metric), layer.reduce.weight.clone()
    with torch.no_grad():
        refine_(layer, dense.weight, metric)
    assert error(layer, dense.weight, metric) < before
    assert not torch.equal(layer.reduce.weight, basis)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimum_is_never_made_worse_by_rounding(dtype):
    dense = dense_linear(dtype)
    metric = random_metric(dense)
    layer = SVDLinear.from_pretrained_layer(dense, rank=3, metric=metric)
    for _ in range(3):
        before = error(layer, dense.weight, metric)
        refine_(layer, dense.weight, metric)
        assert error(layer, dense.weight, metric) <= before


def test_a_zero_weight_is_approached():
    layer, zero = sandwich(), torch.zeros(10, 12, dtype=torch.float64)
    metric = random_metric(dense_linear())
    before = error(layer, zero, metric)
    refine_(layer, zero, metric)
    assert error(layer, zero, metric) < 1e-4 * before


def test_where_there_is_nothing_to_gain_nothing_changes():
    dense = dense_linear()
    metric = random_metric(dense)
    layer = sandwich()
    state = copy.deepcopy(layer.state_dict())
    refine_(layer, layer.dense_weight().detach(), metric)
    blind = dataclasses.replace(metric, covariance=torch.zeros_like(metric.covariance))
    refine_(layer, dense.weight, blind)
    refine_(layer, torch.full_like(dense.weight, torch.nan), metric)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_on_the_meta_device_nothing_is_computed():
    dense = dense_linear()
    layer = sandwich().to("meta")
    refine_(layer, dense.weight.detach().to("meta"), random_metric(dense))
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_no_side_effects():
    dense, layer = dense_linear(), sandwich()
    metric = random_metric(dense)
    state, weight, covariance = torch.get_rng_state(), dense.weight.detach().clone(), metric.covariance.clone()
    refine_(layer, dense.weight, metric)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dense.weight, weight)
    assert torch.equal(metric.covariance, covariance)
    assert dense.weight.grad is None


@pytest.mark.cuda
def test_layer_and_metric_on_different_devices(device):
    dense = dense_linear()
    metric = random_metric(dense)
    layer = sandwich().to(device)
    before = error(layer.cpu(), dense.weight, metric)
    layer.to(device)
    refine_(layer, dense.weight.to(device), Metric(metric.covariance, metric.mean, metric.curvature))
    assert error(layer.cpu(), dense.weight, metric) < before
