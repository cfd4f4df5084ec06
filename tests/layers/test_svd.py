import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.layers import SVDConv2d, SVDLinear, read_layer
from tests.layers.geometries import AWKWARD, assert_costs_agree, convolutions, dense_conv, largest_difference

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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", AWKWARD)
def test_full_rank_is_the_dense_layer(name, order):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        dense = dense_conv(dtype, **AWKWARD[name])
        (limit,) = SVDConv2d.rank_problem(read_layer(dense, SVDConv2d), order=order).limits
        compressed = SVDConv2d.from_pretrained_layer(dense, rank=limit, order=order)
        assert largest_difference(compressed, dense) < tolerance
        assert largest_difference(compressed, dense, batched=False) < tolerance


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
