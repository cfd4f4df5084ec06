import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.decompose import Metric
from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.graph import record
from lowrank_nn.layers import (
    VBMF,
    Energy,
    KroneckerConv2d,
    KroneckerLinear,
    Params,
    SpeedUp,
    SVDConv2d,
    SVDLinear,
    read_layer,
)
from lowrank_nn.planning import low_rank_candidates
from tests.layers.geometries import assert_costs_agree, convolutions, dense_conv, largest_difference
from tests.layers.metrics import images, metric_of, random_covariances, random_metric


def dense_linear(in_features=12, out_features=16, *, bias=True):
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=torch.float64).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def problem_of(layer, **options):
    cls = KroneckerLinear if isinstance(layer, nn.Linear) else KroneckerConv2d
    return cls.rank_problem(read_layer(layer, cls), **options)


def change(layer, compressed):
    return (layer.weight - compressed.weight).detach()


def squared_tail(matrix, rank):
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def rearranged(weight, groups, shape):
    """The matrix of (o1, i1) x (o2, i2, taps) of each group, block by block with numpy."""
    for block in np.split(weight.detach().numpy(), groups):
        out, inn = block.shape[0] // shape[0], block.shape[1] // shape[1]
        rows = [
            block[o * out : (o + 1) * out, i * inn : (i + 1) * inn].ravel()
            for o in range(shape[0])
            for i in range(shape[1])
        ]
        yield np.stack(rows)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3), (4, 1), (4, 3)])
def test_error_is_the_tail_of_the_singular_values_of_every_group(groups, shape):
    layer = dense_conv(in_channels=6 * groups, out_channels=4 * groups, kernel_size=(3, 2), groups=groups)
    table = problem_of(layer, shape=shape).table()
    for rank in (1, 3, problem_of(layer, shape=shape).limits[0]):
        compressed = KroneckerConv2d.from_pretrained_layer(layer, rank=rank, shape=shape)
        expected = sum(squared_tail(matrix, rank) for matrix in rearranged(layer.weight, groups, shape))
        assert float(change(layer, compressed).square().sum()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert table.errors[table.ranks[:, 0] == rank] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_dense_weight_is_numpy_s_kron_of_the_factors():
    layer = KroneckerLinear(12, 16, rank=3, shape=(2, 3), dtype=torch.float64)
    inner, outer = layer.inner.weight.detach().numpy(), layer.outer.weight.detach().numpy()
    expected = sum(np.kron(outer[:, 3 * r : 3 * r + 3], inner[8 * r : 8 * r + 8]) for r in range(3))
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-12)
    conv = KroneckerConv2d(12, 16, (3, 2), groups=2, rank=2, shape=(4, 3), dtype=torch.float64)
    inner, outer = conv.inner.weight.detach().numpy(), conv.outer.weight.detach().numpy()[:, :, 0, 0]
    for group in range(2):
        A = [outer[4 * group : 4 * group + 4, 3 * r : 3 * r + 3] for r in range(2)]
        B = [inner[4 * group + 2 * r : 4 * group + 2 * r + 2] for r in range(2)]
        for tap in np.ndindex(3, 2):
            expected = sum(np.kron(a, b[(slice(None), slice(None), *tap)]) for a, b in zip(A, B, strict=True))
            weight = conv.weight[8 * group : 8 * group + 8].detach().numpy()
            np.testing.assert_allclose(weight[(slice(None), slice(None), *tap)], expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", (2, 1)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (3, 2)])
def test_it_runs_the_convolution_of_its_dense_weight(shape, padding_mode, padding):
    stride = 1 if padding == "same" else (2, 3)
    arguments = {"padding": padding, "stride": stride, "padding_mode": padding_mode, "dilation": (1, 2)}
    layer = KroneckerConv2d(4, 6, (4, 3), **arguments, groups=2, rank=2, shape=shape, dtype=torch.float64)
    assert largest_difference(layer, layer.to_dense_layer()) < 1e-12


@given(convolutions(), st.data())
def test_costs_agree_with_the_layer_and_with_torch(drawn, data):
    layer, input_shape = drawn
    out, inn = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    shape = tuple(data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in (out, inn))
    (limit,) = problem_of(layer, shape=shape).limits
    assert_costs_agree(KroneckerConv2d, layer, input_shape, (data.draw(st.integers(1, limit)),), shape=shape)


def test_costs_by_hand():
    conv = KroneckerConv2d(64, 48, 3, stride=2, padding=1, rank=5, shape=(16, 8), bias=False)
    # 8 slices of 8 channels to 5 * 3 each by 3 x 3, then 3 slices of 5 * 8 channels to 16, on 5 x 5 output positions.
    assert conv.cost((2, 64, 9, 9)).macs == 2 * 25 * (8 * (8 * 5 * 3 * 9) + 3 * (5 * 8 * 16))
    assert conv.cost((2, 64, 9, 9)).params == 5 * (16 * 8 + 3 * 8 * 9)
    linear = KroneckerLinear(64, 48, rank=5, shape=(16, 8))
    assert linear.cost((7, 64)).macs == 7 * (8 * (8 * 5 * 3) + 3 * (5 * 8 * 16))
    assert linear.cost((7, 64)).params == 5 * (16 * 8 + 3 * 8) + 48


def test_ensembles_of_convolutions_by_vmap():
    layers = [KroneckerConv2d(8, 12, 3, rank=2) for _ in range(2)]
    x = torch.randn(3, 8, 6, 6)
    together = torch.func.vmap(lambda *state: torch.func.functional_call(layers[0], state, (x,)))(
        *torch.func.stack_module_state(layers)
    )
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


def test_stages_are_called_with_the_shapes_that_it_says():
    model = nn.Sequential(
        KroneckerConv2d(8, 12, 3, stride=2, rank=3, shape=(4, 2)),
        nn.Flatten(2),
        KroneckerLinear(16, 6, rank=2, shape=(2, 4)),
    )
    sites = record(model, torch.zeros(3, 8, 9, 9)).sites
    for layer, shape in ((model[0], (3, 8, 9, 9)), (model[2], (3, 12, 16))):
        seen = {site.layer: site.calls[0].input_shape for site in sites if site.inside is not None}
        for stage, stage_shape in layer.stage_calls(shape):
            assert seen[stage] == stage_shape


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (8, 1), (8, 3)])
def test_with_a_column_or_a_row_it_is_the_svd_layer(shape):
    conv = dense_conv(in_channels=3, out_channels=8, kernel_size=3)
    order = {(8, 1): "spatial_first", (1, 3): "pointwise_first"}.get(shape)
    if order:
        svd = SVDConv2d.from_pretrained_layer(conv, rank=2, order=order)
        kronecker = KroneckerConv2d.from_pretrained_layer(conv, rank=2, shape=shape)
        torch.testing.assert_close(kronecker.weight, svd.weight, rtol=0, atol=1e-12)
        linear = dense_linear(3, 8)
        svd = SVDLinear.from_pretrained_layer(linear, rank=2)
        kronecker = KroneckerLinear.from_pretrained_layer(linear, rank=2, shape=shape)
        torch.testing.assert_close(kronecker.weight, svd.weight, rtol=0, atol=1e-12)
    else:  # a trivial factor: one product is all
        kronecker = KroneckerLinear.from_pretrained_layer(dense_linear(3, 8), rank=1, shape=shape)
        torch.testing.assert_close(kronecker.weight, dense_linear(3, 8).weight, rtol=0, atol=1e-12)


def test_one_product_may_have_the_full_matrix_rank():
    layer = KroneckerLinear(64, 64, rank=1, dtype=torch.float64)
    assert np.linalg.matrix_rank(layer.weight.detach().numpy()) == 64
    assert layer.shape == (8, 8)


def test_rank_rules():
    layer = dense_conv(in_channels=16, out_channels=24, kernel_size=3, padding=1)
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(5, 12, 4, generator=generator, dtype=torch.float64)
    B = torch.randn(5, 2, 4, 9, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(0.05).add_(torch.einsum("rab,rcdt->acbdt", A, B).reshape(layer.weight.shape))
    per_rank = 12 * 4 + 2 * 4 * 9
    macs = 4 * (2 * 4 * 9) + 2 * (12 * 4)
    for rule, rank in (
        (VBMF(), 5),
        (Energy(0.99), 5),
        (Params(0.3), int(0.3 * 24 * 16 * 9 / per_rank)),
        (SpeedUp(4), int(24 * 16 * 9 / 4 / macs)),
    ):
        assert KroneckerConv2d.from_pretrained_layer(layer, rank=rule, shape=(12, 4)).rank == rank


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(RankError, match=f"KroneckerConv2d: rank must be from 1 to 12, got {rank}"):
        KroneckerConv2d(6, 8, 3, rank=rank, shape=(4, 3))


@pytest.mark.parametrize("shape", [(3, 2), (4, 5), (4,), 4, "42", (0, 2), (-4, 2), (2.0, 2), (True, 2)])
def test_a_shape_that_does_not_divide_is_refused(shape):
    with pytest.raises(
        OptionError, match=r"shape must be a pair \(O1, I1\) of which O1 divides 16 .* Leave it out for"
    ):
        KroneckerLinear(12, 16, rank=1, shape=shape)


def nearest_product(layer, rank, shape, metric):
    """The closed form under a metric that is a Kronecker product: numpy's SVD of the weighted weight."""
    roots = [np.linalg.cholesky(part.numpy()).T for part in metric]
    H1, H2, C1, C2 = roots
    out, inn = layer.weight.shape[0], layer.weight.shape[1]
    tensor = layer.weight.detach().numpy().reshape(shape[0], out // shape[0], shape[1], inn // shape[1], -1)
    tensor = tensor.reshape(*tensor.shape[:3], -1)
    weighted = np.einsum("abcd,Aa,Bb,Cc,Dd->ACBD", tensor, H1, H2, C1, C2)
    return squared_tail(weighted.reshape(math.prod(shape), -1), rank)


def test_under_a_product_metric_it_is_the_svd_of_the_weighted_weight():
    layer, shape = dense_conv(in_channels=6, out_channels=8, kernel_size=(2, 3), bias=False), (4, 3)
    generator = torch.Generator().manual_seed(4)
    H1, H2, C1, C2 = (random_covariances(1, size, generator)[0] for size in (4, 2, 3, 12))
    metric = Metric(torch.kron(C1, C2)[None], torch.zeros(1, 36, dtype=torch.float64), torch.kron(H1, H2)[None])
    for rank in (1, 2, 5):
        compressed = KroneckerConv2d.from_pretrained_layer(layer, rank=rank, shape=shape, metric=metric)
        expected = nearest_product(layer, rank, shape, (H1, H2, C1, C2))
        assert metric.error(change(layer, compressed)) == pytest.approx(expected, rel=1e-3)


def alternating_least_squares(layer, rank, shape, metric, starts=6):
    """The least error that least squares for one factor after the other find, from many starts, with numpy."""
    W = layer.weight.detach().numpy()
    H, C = np.linalg.cholesky(metric.curvature[0].numpy()).T, np.linalg.cholesky(metric.covariance[0].numpy()).T
    out, inn = W.shape[0] // shape[0], W.shape[1] // shape[1]
    target = (H @ W @ C.T).ravel()

    def image(A, B):  # of each basis vector of one factor
        return (H @ np.kron(A, B) @ C.T).ravel()

    def basis(rows, columns):
        return np.eye(rows * columns).reshape(-1, rows, columns)

    best, drawn = math.inf, np.random.default_rng(0)
    for _ in range(starts):
        B = drawn.standard_normal((rank, out, inn))
        for _ in range(60):
            system = np.stack([image(a, b) for b in B for a in basis(*shape)], axis=1)
            A = np.linalg.lstsq(system, target, rcond=None)[0].reshape(rank, *shape)
            system = np.stack([image(a, b) for a in A for b in basis(out, inn)], axis=1)
            solution = np.linalg.lstsq(system, target, rcond=None)[0]
            B = solution.reshape(rank, out, inn)
        best = min(best, float(((system @ solution - target) ** 2).sum()))
    return best


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_fit_under_a_metric_is_that_of_alternating_least_squares(rank):
    layer = dense_linear(6, 8, bias=False)
    metric = random_metric(layer).without_mean()
    compressed = KroneckerLinear.from_pretrained_layer(layer, rank=rank, shape=(4, 2), metric=metric)
    best = alternating_least_squares(layer, rank, (4, 2), metric)
    # The last per mille of an ill-conditioned metric takes thousands of steps.
    assert metric.error(change(layer, compressed)) <= 1.02 * best + 1e-3 * metric.error(layer.weight)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_metric_s_table_holds_what_the_fits_attain(groups, curvature, diagonal):
    layer = dense_conv(in_channels=12, out_channels=12, kernel_size=3, groups=groups, bias=False)
    metric = metric_of(layer, images(12))
    metric = dataclasses.replace(
        metric,
        covariance=metric.covariance.diagonal(dim1=1, dim2=2) if diagonal else metric.covariance,
        curvature=random_metric(layer).curvature if curvature else None,
    ).with_mean()
    problem = problem_of(layer)
    table = problem.table(metric)
    assert table.ranks[:, 0].tolist() == list(range(1, problem.limits[0] + 1))
    assert table.errors[-1] == pytest.approx(0, abs=1e-6 * metric.error(layer.weight))
    for rank in (1, 2) if groups == 3 else (1, 3, 6, 9):  # as far as they save anything
        compressed = KroneckerConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
        assert metric.error(change(layer, compressed)) == pytest.approx(table.errors[rank - 1], rel=0.15)


def test_candidates_of_a_format_that_is_named():
    layer = dense_conv(torch.float32, in_channels=16, out_channels=16, kernel_size=3, padding=1)
    site = record(layer, torch.ones(1, 16, 8, 8)).sites[0]
    found = low_rank_candidates(site, layer, [KroneckerConv2d]).candidates[1:]
    assert [candidate.options["rank"] for candidate in found] == list(range(1, len(found) + 1))
    for candidate in (found[0], found[-1]):
        compressed = KroneckerConv2d.from_pretrained_layer(layer, **candidate.options)
        cost = compressed.cost((1, 16, 8, 8))
        assert (cost.params - 16, cost.macs) == (candidate.cost.params, candidate.cost.macs)
        error = float(change(layer, compressed).square().sum() / layer.weight.detach().square().sum())
        assert error == pytest.approx(candidate.error, rel=1e-4)
    assert found[-1].cost.params <= layer.weight.numel()
    assert found[-1].cost.macs <= 64 * layer.weight.numel()


def test_it_is_planned_only_where_it_is_named():
    assert [cls.planned_by_default for cls in (KroneckerConv2d, KroneckerLinear)] == [False, False]


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(24 * 16, 32),
    ).eval()


@pytest.mark.parametrize("calibrated", [False, True])
def test_under_a_budget_from_a_plan_to_a_file(calibrated, tmp_path):
    net, x = small_net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    step = lnn.LowRank(but_not="0", formats=[KroneckerConv2d, KroneckerLinear])
    result = lnn.compress_model(
        net, x, [step], budget=lnn.Budget(params=0.4), calibration=batches if calibrated else None, progress=False
    )
    small = result.model
    assert {type(layer) for layer in (small[3], small[5], small[7])} & {KroneckerConv2d, KroneckerLinear}
    assert type(small[0]) is nn.Conv2d
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())
    assert 0.3 < share <= 0.4
    lnn.save(small, tmp_path / "small.lrnn")
    again = lnn.load(tmp_path / "small.lrnn", small_net()).eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert "shape=" in str(result.report)
    pruned = lnn.compress_model(small, x, [lnn.Prune(0.5), lnn.Quantize("int8")], calibration=batches, progress=False)
    kinds = {type(module).__name__ for module in pruned.model.modules()}
    assert {"QuantConv2d", "QuantLinear"} & kinds


def test_filters_are_removed_around_it_and_norms_stay_behind_it():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        KroneckerConv2d(16, 24, 3, rank=4),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 8, 3),
    ).eval()
    x = torch.randn(2, 3, 10, 10)
    result = lnn.compress_model(net, x, lnn.Prune(0.5, granularity="filter"), progress=False)
    assert result.model[0].out_channels < 16
    assert (result.model[4].in_channels, result.model[4].out_channels) == (16, 24)
    folded = lnn.fold_batchnorm(net, x)
    assert type(folded[5]) is nn.BatchNorm2d
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.cuda
def test_fit_under_a_metric_on_a_gpu(device):
    layer = dense_conv(in_channels=6, kernel_size=3, groups=2)
    metric = random_metric(layer)
    on_cpu = KroneckerConv2d.from_pretrained_layer(layer, rank=3, metric=metric)
    on_gpu = KroneckerConv2d.from_pretrained_layer(layer.to(device), rank=3, metric=metric)
    assert on_gpu.weight.device == device
    torch.testing.assert_close(on_gpu.weight.cpu(), on_cpu.weight, rtol=1e-6, atol=1e-6)
