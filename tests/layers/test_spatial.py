import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import RankError
from lowrank_nn.graph import record
from lowrank_nn.layers import VBMF, Energy, Params, SpatialSVDConv2d, SpeedUp, SVDConv2d, read_layer
from lowrank_nn.planning import low_rank_candidates
from tests.layers.geometries import assert_costs_agree, convolutions, dense_conv, largest_difference
from tests.layers.metrics import images, metric_of, random_covariances, random_metric


def problem_of(layer):
    return SpatialSVDConv2d.rank_problem(read_layer(layer, SpatialSVDConv2d))


def change(layer, compressed):
    return (layer.weight - compressed.weight).detach()


def rearranged(weight, groups):
    """The matrix of (i, h) x (o, w) of each group, with numpy."""
    for block in np.split(weight.detach().numpy(), groups):
        out, inn, height, width = block.shape
        yield block.transpose(1, 2, 0, 3).reshape(inn * height, out * width)


def squared_tail(matrix, rank):
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_error_is_the_tail_of_the_singular_values_of_every_group(groups):
    layer = dense_conv(in_channels=6, kernel_size=(3, 2), groups=groups)
    table = problem_of(layer).table()
    for rank in (1, 3, 8):
        compressed = SpatialSVDConv2d.from_pretrained_layer(layer, rank=rank)
        expected = sum(squared_tail(matrix, rank) for matrix in rearranged(layer.weight, groups))
        assert float(change(layer, compressed).square().sum()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert table.errors[table.ranks[:, 0] == rank] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert [np.linalg.matrix_rank(m) for m in rearranged(compressed.weight, groups)] == [rank] * groups


def test_dense_weight_is_the_sum_over_the_channels_between():
    layer = SpatialSVDConv2d(4, 6, (3, 2), groups=2, rank=5, dtype=torch.float64)
    vertical, horizontal = layer.vertical.weight.detach().numpy(), layer.horizontal.weight.detach().numpy()
    for group in range(2):
        A = vertical[5 * group : 5 * group + 5, :, :, 0]
        B = horizontal[3 * group : 3 * group + 3, :, 0, :]
        expected = np.einsum("orw,rih->oihw", B, A)
        np.testing.assert_allclose(layer.weight[3 * group : 3 * group + 3].detach().numpy(), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1), (0, 3)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_it_runs_the_convolution_of_its_dense_weight(padding_mode, padding):
    """Rows and columns padded one after the other, at any rank."""
    stride = 1 if padding == "same" else (2, 3)
    arguments = {"padding": padding, "stride": stride, "padding_mode": padding_mode, "dilation": (1, 2)}
    layer = SpatialSVDConv2d(4, 6, (4, 3), **arguments, groups=2, rank=2, dtype=torch.float64)
    assert largest_difference(layer, layer.to_dense_layer()) < 1e-12


def test_geometry_is_divided_between_the_two():
    layer = SpatialSVDConv2d(4, 6, (5, 3), stride=(2, 3), padding=(1, 2), dilation=(3, 4), rank=2)
    vertical, horizontal = layer.vertical, layer.horizontal
    assert (vertical.kernel_size, horizontal.kernel_size) == ((5, 1), (1, 3))
    assert (vertical.stride, horizontal.stride) == ((2, 1), (1, 3))
    assert (vertical.padding, horizontal.padding) == ((1, 0), (0, 2))
    assert (vertical.dilation, horizontal.dilation) == ((3, 1), (1, 4))
    assert (vertical.bias is None, layer.bias is horizontal.bias) == (True, True)


@given(convolutions(), st.data())
def test_costs_agree_with_the_layer_and_with_torch(drawn, data):
    layer, input_shape = drawn
    (limit,) = problem_of(layer).limits
    assert_costs_agree(SpatialSVDConv2d, layer, input_shape, (data.draw(st.integers(1, limit)),))


def test_factors_are_balanced():
    layer = dense_conv(in_channels=6, kernel_size=3, groups=2)
    for metric in (None, random_metric(layer)):
        compressed = SpatialSVDConv2d.from_pretrained_layer(layer, rank=5, metric=metric)
        vertical = compressed.vertical.weight.detach().reshape(2, 5, -1)
        horizontal = compressed.horizontal.weight.detach().reshape(2, -1, 5, 3).transpose(1, 2).flatten(2)
        for factor in (vertical, horizontal):  # orthogonal, and one as long as the other
            gram = factor @ factor.mT
            torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)
        torch.testing.assert_close(vertical.norm(dim=2), horizontal.norm(dim=2), rtol=1e-9, atol=0)


def test_rank_rules():
    layer = dense_conv(in_channels=16, out_channels=24, kernel_size=3, padding=1)
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(5, 16, 3, generator=generator, dtype=torch.float64)
    B = torch.randn(24, 5, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(0.05).add_(torch.einsum("orw,rih->oihw", B, A))
    dense = layer.weight.numel()
    assert SpatialSVDConv2d.from_pretrained_layer(layer, rank=VBMF()).rank == 5
    assert SpatialSVDConv2d.from_pretrained_layer(layer, rank=Energy(0.99)).rank == 5
    assert SpatialSVDConv2d.from_pretrained_layer(layer, rank=Params(0.3)).rank == int(0.3 * dense / (16 * 3 + 24 * 3))
    assert SpatialSVDConv2d.from_pretrained_layer(layer, rank=SpeedUp(4)).rank == int(dense / 4 / (16 * 3 + 24 * 3))


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(RankError, match=f"SpatialSVDConv2d: rank must be from 1 to 12, got {rank}"):
        SpatialSVDConv2d.from_pretrained_layer(dense_conv(kernel_size=3), rank=rank)


@pytest.mark.parametrize(
    ("kernel_size", "order"), [((3, 1), "spatial_first"), ((1, 3), "pointwise_first"), (1, "spatial_first")]
)
def test_on_thin_kernels_it_is_the_svd_layer_and_no_candidate(kernel_size, order):
    layer = dense_conv(torch.float32, in_channels=12, out_channels=16, kernel_size=kernel_size)
    spatial = SpatialSVDConv2d.from_pretrained_layer(layer, rank=3)
    svd = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order)
    torch.testing.assert_close(spatial.weight, svd.weight, rtol=0, atol=1e-5)
    metric = metric_of(layer, images(12))
    spatial = SpatialSVDConv2d.from_pretrained_layer(layer, rank=3, metric=metric)
    svd = SVDConv2d.from_pretrained_layer(layer, rank=3, order=order, metric=metric)
    assert metric.error(change(layer, spatial)) < 1.01 * metric.error(change(layer, svd))
    assert [len(problem_of(layer).table(given).ranks) for given in (None, metric)] == [0, 0]
    site = record(layer, torch.ones(1, 12, 9, 9)).sites[0]
    table = low_rank_candidates(site, layer, [SpatialSVDConv2d])
    assert len(table.candidates) == 1
    assert table.note == "no format at any rank is smaller"


def brute_force(layer, rank, metric, starts=4):
    """The least error that scipy's BFGS finds from many starts, over both factors, by numpy's own formula."""
    out, inn, height, width = layer.weight.shape
    weight, C, H = layer.weight.detach().numpy(), metric.covariance[0].numpy(), metric.curvature[0].numpy()
    random = np.random.default_rng(0)
    sizes = (rank, inn, height), (out, rank, width)

    def error_and_gradient(x):
        A, B = x[: rank * inn * height].reshape(sizes[0]), x[rank * inn * height :].reshape(sizes[1])
        delta = np.einsum("orw,rih->oihw", B, A) - weight
        weighted = (H @ delta.reshape(out, -1) @ C).reshape(delta.shape)
        gradients = np.einsum("orw,oihw->rih", B, weighted), np.einsum("rih,oihw->orw", A, weighted)
        return float((delta * weighted).sum()), 2 * np.concatenate([g.ravel() for g in gradients])

    size = sum(np.prod(shape) for shape in sizes)
    found = [
        scipy.optimize.minimize(
            error_and_gradient, random.standard_normal(size), jac=True, method="L-BFGS-B", options={"maxiter": 1000}
        )
        for _ in range(starts)
    ]
    return min(result.fun for result in found)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_fit_under_a_metric_is_that_of_brute_force(rank, seed):
    layer = dense_conv(in_channels=3, out_channels=4, kernel_size=(3, 2), bias=False)
    metric = dataclasses.replace(metric_of(layer, images(3, seed)), curvature=random_metric(layer, seed).curvature)
    metric = metric.with_mean()
    compressed = SpatialSVDConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
    assert metric.error(change(layer, compressed)) <= 1.01 * brute_force(layer, rank, metric)


def test_a_metric_of_white_inputs_is_the_frobenius_norm():
    layer = dense_conv(in_channels=6, kernel_size=3, groups=2, bias=False)
    metric = Metric(torch.eye(27, dtype=torch.float64).expand(2, -1, -1), torch.zeros(2, 27, dtype=torch.float64))
    under = SpatialSVDConv2d.from_pretrained_layer(layer, rank=4, metric=metric)
    plain = SpatialSVDConv2d.from_pretrained_layer(layer, rank=4)
    torch.testing.assert_close(under.weight, plain.weight, rtol=0, atol=1e-6)


def test_columns_without_correlation_are_fitted_by_the_svd_of_the_weighted_kernel():
    """With the same covariance of (i, h) in every column and none between columns there is a closed form."""
    layer = dense_conv(in_channels=3, out_channels=5, kernel_size=(2, 3), bias=False)
    generator = torch.Generator().manual_seed(4)
    rows, H = random_covariances(1, 6, generator)[0], random_covariances(1, 5, generator)[0]
    covariance = torch.kron(rows, torch.eye(3, dtype=torch.float64))
    metric = Metric(covariance[None], torch.zeros(1, 18, dtype=torch.float64), H[None])
    weighted = np.linalg.cholesky(rows.numpy()).T @ next(rearranged(layer.weight, 1))
    weighted = np.einsum("xow,op->xpw", weighted.reshape(6, 5, 3), np.linalg.cholesky(H.numpy())).reshape(6, 15)
    for rank in (1, 2, 4):
        compressed = SpatialSVDConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
        assert metric.error(change(layer, compressed)) == pytest.approx(squared_tail(weighted, rank), rel=1e-4)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_metric_s_table_holds_what_the_fits_attain(groups, curvature, diagonal):
    layer = dense_conv(in_channels=6, out_channels=9, kernel_size=3, groups=groups, bias=False)
    metric = metric_of(layer, images(6))
    metric = dataclasses.replace(
        metric,
        covariance=metric.covariance.diagonal(dim1=1, dim2=2) if diagonal else metric.covariance,
        curvature=random_metric(layer).curvature if curvature else None,
    ).with_mean()
    table = problem_of(layer).table(metric)
    assert table.ranks[:, 0].tolist() == list(range(1, problem_of(layer).limits[0] + 1))
    assert all(after <= before for before, after in pairwise(table.errors))
    for rank in (1, 2) if groups == 3 else (1, 2, 5):  # as far as they save anything
        compressed = SpatialSVDConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
        error = metric.error(change(layer, compressed))
        assert error == pytest.approx(table.errors[rank - 1], rel=0.1)


@pytest.mark.parametrize("rank", [2, 12])
def test_refitting_follows_weight_and_metric(rank):
    layer = dense_conv(in_channels=4, kernel_size=3, bias=False)
    compressed = SpatialSVDConv2d.from_pretrained_layer(layer, rank=rank, metric=random_metric(layer))
    other = dense_conv(in_channels=4, kernel_size=3, bias=False)
    with torch.no_grad():
        other.weight.add_(0.3 * layer.weight.roll(1, 0))
    metric = random_metric(layer, 1).without_mean()
    before = metric.error(change(other, compressed))
    compressed.refit_(other.weight.detach(), metric)
    anew = SpatialSVDConv2d.from_pretrained_layer(other, rank=rank, metric=metric)
    after = metric.error(change(other, compressed))
    assert after < 0.5 * before
    assert after == pytest.approx(metric.error(change(other, anew)), rel=0.05, abs=1e-20)


@pytest.mark.cuda
def test_fit_under_a_metric_on_a_gpu(device):
    layer = dense_conv(in_channels=6, kernel_size=3, groups=2)
    metric = random_metric(layer)
    on_cpu = SpatialSVDConv2d.from_pretrained_layer(layer, rank=3, metric=metric)
    on_gpu = SpatialSVDConv2d.from_pretrained_layer(layer.to(device), rank=3, metric=metric)
    assert on_gpu.weight.device == device
    torch.testing.assert_close(on_gpu.weight.cpu(), on_cpu.weight, rtol=1e-6, atol=1e-6)
