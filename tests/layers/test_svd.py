import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.layers import SVDConv2d, SVDLinear, read_layer
from tests.layers.geometries import assert_costs_agree, convolutions, dense_conv
from tests.layers.metrics import error_of, images, metric_of, output_error, random_metric

ORDERS = ["spatial_first", "pointwise_first"]


def squared_tail(matrix, rank):
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def unfolded(layer, order):
    """The matrix of each group, with numpy."""
    weight = layer.weight.detach().numpy()
    for block in np.split(weight, layer.groups):
        if order == "pointwise_first":
            block = block.transpose(1, 0, 2, 3)
        yield block.reshape(block.shape[0], -1)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_linear_error_is_the_tail_of_the_singular_values(rank):
    layer = nn.Linear(17, 12, dtype=torch.float64)
    compressed = SVDLinear.from_pretrained_layer(layer, rank=rank)
    error = float((compressed.weight - layer.weight).square().sum().detach())
    assert error == pytest.approx(squared_tail(layer.weight.detach().numpy(), rank), rel=1e-9)
    assert np.linalg.matrix_rank(compressed.weight.detach().numpy()) == rank


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_error_is_the_tail_of_the_singular_values_of_every_group(order, groups):
    layer = dense_conv(in_channels=6, kernel_size=(3, 2), groups=groups)
    table = SVDConv2d.rank_problem(read_layer(layer, SVDConv2d), order=order).table()
    for rank in (1, 2, 3):
        compressed = SVDConv2d.from_pretrained_layer(layer, rank=rank, order=order)
        error = float((compressed.weight - layer.weight).square().sum().detach())
        expected = sum(squared_tail(matrix, rank) for matrix in unfolded(layer, order))
        assert error == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert table.errors[table.ranks[:, 0] == rank] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(convolutions(), st.sampled_from(ORDERS), st.data())
def test_costs_agree_with_the_layer_and_with_torch(drawn, order, data):
    layer, input_shape = drawn
    (limit,) = SVDConv2d.rank_problem(read_layer(layer, SVDConv2d), order=order).limits
    assert_costs_agree(SVDConv2d, layer, input_shape, (data.draw(st.integers(1, limit)),), order=order)


@pytest.mark.parametrize(("rank", "got"), [(0, "0"), (9, "9"), (-1, "-1")])
def test_a_rank_out_of_range_is_refused(rank, got):
    with pytest.raises(RankError, match=rf"SVDConv2d: rank must be from 1 to 8, got {got}"):
        SVDConv2d.from_pretrained_layer(dense_conv(kernel_size=3), rank=rank)
    with pytest.raises(RankError, match=rf"SVDLinear: rank must be from 1 to 8, got {got}"):
        SVDLinear(8, 12, rank=rank)


@pytest.mark.parametrize("rank", [2.0, True, None, "4", (2, 2)])
def test_a_rank_that_is_no_integer_is_refused(rank):
    with pytest.raises(RankError, match="rank must be an integer or a rank rule"):
        SVDLinear.from_pretrained_layer(nn.Linear(4, 4), rank=rank)


def test_an_unknown_order_is_refused():
    with pytest.raises(OptionError, match="order must be 'spatial_first' or 'pointwise_first', got 'depthwise'"):
        SVDConv2d.from_pretrained_layer(dense_conv(kernel_size=3), rank=1, order="depthwise")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_metric_s_error_is_that_of_the_outputs_on_its_data(order, groups, bias):
    layer = dense_conv(in_channels=8, kernel_size=3, stride=2, groups=groups, bias=bias)
    x = images(8)
    metric = metric_of(layer, x)
    plain = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order)
    fitted = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order, metric=metric)
    seen = metric if bias else metric.with_mean()
    assert output_error(fitted, layer, x) == pytest.approx(error_of(fitted, layer, seen), rel=1e-6)
    assert output_error(fitted, layer, x) < 0.9 * output_error(plain, layer, x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_fitted_by_the_principal_components_of_its_outputs(bias):
    layer = nn.Linear(20, 9, bias=bias, dtype=torch.float64)
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    fitted = SVDLinear.from_pretrained_layer(layer, rank=4, metric=metric_of(layer, x))
    outputs = layer(x).detach().numpy()
    centred = outputs - outputs.mean(0) if bias else outputs
    expected = squared_tail(centred, 4) / len(x)
    assert output_error(fitted, layer, x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("in_features", "out_features"), [(20, 9), (9, 20)])
def test_the_table_of_a_linear_layer_holds_the_errors_under_the_metric(in_features, out_features):
    layer = nn.Linear(in_features, out_features, dtype=torch.float64)
    metric = random_metric(layer)
    ranks, errors = SVDLinear.rank_problem(read_layer(layer, SVDLinear)).table(metric)
    assert ranks[:, 0].tolist() == list(range(1, 10))
    for (rank,), error in zip(ranks.tolist(), errors.tolist(), strict=True):
        fitted = SVDLinear.from_pretrained_layer(layer, rank=rank, metric=metric)
        assert error == pytest.approx(error_of(fitted, layer, metric), rel=1e-4, abs=1e-8 * metric.error(layer.weight))


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("order", "slack"), [("spatial_first", 1e-5), ("pointwise_first", 0.4)])
def test_the_table_of_a_convolution_holds_the_errors_under_the_metric(order, slack, groups, diagonal):
    layer = dense_conv(in_channels=8, kernel_size=3, groups=groups)
    metric = dataclasses.replace(metric_of(layer, images(8)), curvature=random_metric(layer).curvature)
    if diagonal:
        metric = dataclasses.replace(metric, covariance=metric.covariance.diagonal(dim1=1, dim2=2))
    ranks, errors = SVDConv2d.rank_problem(read_layer(layer, SVDConv2d), order=order).table(metric)
    assert ranks[:, 0].tolist() == list(range(1, 8 // groups + 1))
    for (rank,), error in list(zip(ranks.tolist(), errors.tolist(), strict=True))[:-1]:
        fitted = SVDConv2d.from_pretrained_layer(layer, rank=rank, order=order, metric=metric)
        attained = error_of(fitted, layer, metric)
        assert attained * (1 - 1e-5) <= error <= attained * (1 + slack)
    assert errors[-1] <= 1e-12 * errors[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_narrow_layers_are_fitted_as_well_as_their_dtype_allows(order, dtype, slack):
    wide = dense_conv(in_channels=8, kernel_size=3)
    narrow = dense_conv(dtype, in_channels=8, kernel_size=3)
    metric = metric_of(wide, images(8))
    expected = error_of(SVDConv2d.from_pretrained_layer(wide, rank=3, order=order, metric=metric), wide, metric)
    fitted = SVDConv2d.from_pretrained_layer(narrow, rank=3, order=order, metric=metric)
    assert fitted.weight.dtype == dtype
    assert error_of(fitted.double(), wide, metric) == pytest.approx(expected, rel=slack)


@pytest.mark.parametrize("order", ORDERS)
def test_factors_under_a_metric_are_balanced(order):
    layer = dense_conv(in_channels=8, kernel_size=3)
    fitted = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order, metric=random_metric(layer))
    first, second = fitted.reduce.weight.flatten(1), fitted.expand.weight.transpose(0, 1).flatten(1)
    torch.testing.assert_close(first @ first.T, second @ second.T)
    assert bool(first.norm(dim=1).diff().le(0).all())


@pytest.mark.parametrize("order", ORDERS)
def test_refitting_follows_weight_and_metric(order):
    layer = dense_conv(in_channels=8, kernel_size=3)
    compressed = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order, metric=random_metric(layer))
    with torch.no_grad():
        layer.weight.add_(layer.weight.roll(1, 0), alpha=0.3)
    metric = random_metric(layer, 1)
    anew = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order, metric=metric)
    before = error_of(compressed, layer, metric)
    compressed.refit_(layer.weight.detach(), metric)
    assert error_of(compressed, layer, metric) < 0.9 * before
    assert error_of(compressed, layer, metric) == pytest.approx(error_of(anew, layer, metric), rel=0.05)


def test_a_meta_layer_takes_a_metric():
    layer = dense_conv(in_channels=8, kernel_size=3)
    for order in ORDERS:
        new = SVDConv2d(8, 8, 3, rank=3, order=order, device="meta")
        new.approximate_(layer.weight.to("meta"), random_metric(layer))
        assert new.weight.is_meta
