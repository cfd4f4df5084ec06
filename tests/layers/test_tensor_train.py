import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import tensorly.decomposition
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_nn as lnn
from lowrank_nn.decompose import Metric
from lowrank_nn.errors import OptionError, RankError, UnsupportedLayerError
from lowrank_nn.graph import record
from lowrank_nn.layers import VBMF, Energy, Params, Positions, SpeedUp, TTConv2d, TTLinear, read_layer
from lowrank_nn.planning import low_rank_candidates
from tests.layers.geometries import assert_costs_agree, convolutions, dense_conv, largest_difference
from tests.layers.metrics import images, metric_of, random_metric
from tests.zoo.lenet import LeNet5


def problem_of(layer, **options):
    cls = TTLinear if isinstance(layer, nn.Linear) else TTConv2d
    return cls.rank_problem(read_layer(layer, cls), **options)


def dense_linear(in_features, out_features, *, bias=True, dtype=torch.float64):
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def change(layer, compressed):
    return (layer.weight - compressed.weight).detach()


def conv_tensors(weight, groups):
    """The tensor (I, kh, kw, O) of each group, with numpy."""
    return [block.transpose(1, 2, 3, 0) for block in np.split(weight.detach().double().numpy(), groups)]


def tails(tensor, ranks):
    """The squared error of the best approximation of each unfolding, with numpy."""
    unfolded = [tensor.reshape(math.prod(tensor.shape[:k]), -1) for k in range(1, tensor.ndim)]
    values = [np.linalg.svd(matrix, compute_uv=False) for matrix in unfolded]
    return [float((s[rank:] ** 2).sum()) for s, rank in zip(values, ranks, strict=True)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [(1, 1, 1), (2, 4, 3), (3, 7, 4)])
def test_the_conv_s_error_is_at_most_that_of_tensorly(rank, groups):
    layer = dense_conv(in_channels=6, out_channels=10, kernel_size=(3, 2), groups=groups)
    compressed = TTConv2d.from_pretrained_layer(layer, rank=rank)
    error = float(change(layer, compressed).square().sum())
    least = reference = 0.0
    for tensor, own in zip(conv_tensors(layer.weight, groups), conv_tensors(compressed.weight, groups), strict=True):
        train = tensorly.decomposition.tensor_train(tensor, [1, *rank, 1])
        reference += float(((tensorly.tt_to_tensor(train) - tensor) ** 2).sum())
        least += max(tails(tensor, rank))
        assert tails(own, rank) == pytest.approx([0, 0, 0], abs=1e-20)
    assert least <= error <= reference * (1 + 1e-12)


def test_the_conv_s_dense_weight_is_the_sum_over_the_channels_between():
    layer = TTConv2d(4, 6, (3, 2), groups=2, rank=(2, 5, 3), dtype=torch.float64)
    R, V, H, E = (stage.weight.detach().numpy() for stage in layer.stages())
    for g in range(2):
        a, b, c, o = (slice(n * g, n * (g + 1)) for n in (2, 5, 3, 3))
        terms = R[a, :, 0, 0], V[b, :, :, 0], H[c, :, 0], E[o, :, 0, 0]
        expected = np.einsum("ai,bah,cbw,oc->oihw", *terms)
        np.testing.assert_allclose(layer.weight[o].detach().numpy(), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_it_runs_the_convolution_of_its_dense_weight(padding_mode, padding):
    stride = 1 if padding == "same" else (2, 3)
    arguments = {"padding": padding, "stride": stride, "padding_mode": padding_mode, "dilation": (1, 2)}
    layer = TTConv2d(4, 6, (4, 3), **arguments, groups=2, rank=(2, 3, 2), dtype=torch.float64)
    assert largest_difference(layer, layer.to_dense_layer()) < 1e-12


@given(convolutions(), st.data())
def test_costs_agree_with_the_layer_and_with_torch(drawn, data):
    layer, input_shape = drawn
    ranks = tuple(data.draw(st.integers(1, limit)) for limit in problem_of(layer).limits)
    assert_costs_agree(TTConv2d, layer, input_shape, ranks)


def test_ranks_that_neighbours_cannot_fill_are_lowered():
    layer = dense_conv(in_channels=6, out_channels=10, kernel_size=3)
    compressed = TTConv2d.from_pretrained_layer(layer, rank=(1, 12, 10))
    assert compressed.rank == (1, 3, 9)
    assert compressed.stage_rank() == (1, 3, 9)
    assert TTConv2d(6, 10, 3, rank=8).rank == (6, 8, 8)
    assert TTLinear(12, 30, rank=10, shape=((5, 3, 2), (2, 2, 3))).rank == (10, 6)
    assert TTLinear(12, 30, rank=(1, 6), shape=((5, 3, 2), (2, 2, 3))).rank == (1, 6)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank must be from 1 to 18, got 0"),
        (19, "rank must be from 1 to 18, got 19"),
        ((2, 3), r"rank must be an integer or 3 of them, one for each bond between the cores, got \(2, 3\)"),
        ((7, 3, 3), r"rank\[0\] must be from 1 to 6, got 7"),
        ((2, 3, 2.0), r"rank\[2\] must be an integer or a rank rule"),
        ("223", "rank must be an integer or 3 of them"),
    ],
)
def test_ranks_out_of_range_are_refused(rank, message):
    with pytest.raises(RankError, match=f"TTConv2d: {message}"):
        TTConv2d.from_pretrained_layer(dense_conv(in_channels=6, out_channels=10, kernel_size=3), rank=rank)


def planted(layer, tensors):
    """Set the weight of a layer to a train of random cores, and a little noise."""
    with torch.no_grad():
        layer.weight.mul_(0.01).add_(tensors)
    return layer


def planted_conv():
    generator = torch.Generator().manual_seed(1)
    sizes = (3, 16), (5, 3, 3), (4, 5, 3), (24, 4)
    R, V, H, E = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    kernel = torch.einsum("ai,bah,cbw,oc->oihw", R, V, H, E)
    return planted(dense_conv(in_channels=16, out_channels=24, kernel_size=3, padding=1), kernel / kernel.std())


def test_rank_rules_of_the_conv():
    layer = planted_conv()
    (tensor,) = conv_tensors(layer.weight, 1)
    enough = [min(r for r in range(1, 49) if tails(tensor, (r, r, r))[k] <= 0.02 * (tensor**2).sum()) for k in range(3)]
    assert TTConv2d.from_pretrained_layer(layer, rank=Energy(0.98)).rank == tuple(enough)
    assert TTConv2d.from_pretrained_layer(layer, rank=VBMF()).rank == (3, 5, 4)
    problem, dense = problem_of(layer), layer.weight.numel()

    def scalars(r):
        r1, r2, r3 = min(r, 16), r, min(r, 24)
        return 16 * r1 + 3 * r1 * r2 + 3 * r2 * r3 + 24 * r3

    for rule, allowed in ((Params(0.3), 0.3 * dense), (SpeedUp(3), dense / 3)):
        rank = TTConv2d.from_pretrained_layer(layer, rank=rule).rank
        assert scalars(max(rank)) <= allowed < scalars(max(rank) + 1)
    assert TTConv2d.from_pretrained_layer(layer, rank=VBMF(weaken=0.5)).rank == (10, 27, 14)
    assert problem.limits == (16, 48, 24)


def test_rank_rules_of_the_linear_layer():
    generator = torch.Generator().manual_seed(1)
    G = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 4, 3), (3, 4, 5, 2), (2, 3, 6))]
    weight = torch.einsum("ouA,ApvB,Bqw->opquvw", *G).reshape(60, 120)
    layer = planted(dense_linear(120, 60), weight / weight.std())
    options = {"shape": ((5, 4, 3), (4, 5, 6))}
    for rule in (VBMF(), Energy(0.98)):
        assert TTLinear.from_pretrained_layer(layer, rank=rule, **options).rank == (3, 2)
    half = TTLinear.from_pretrained_layer(layer, rank=Params(0.5), **options)
    assert (
        half.cost((120,)).params - 60
        <= 3600
        < sum(a * b for a, b in zip((20, 20 * 13, 18 * 13), (13, 13, 1), strict=True))
    )
    fast = TTLinear.from_pretrained_layer(layer, rank=SpeedUp(2), **options)
    assert fast.cost((1, 120)).macs <= 3600
    assert TTLinear.from_pretrained_layer(layer, rank=max(fast.rank) + 1, **options).cost((1, 120)).macs > 3600


def test_the_linear_layer_s_dense_weight_is_the_product_of_its_cores():
    outputs, inputs = (2, 3, 2), (3, 2, 2)
    layer = TTLinear(12, 12, rank=(4, 3), shape=(outputs, inputs), dtype=torch.float64)
    bonds = (1, 4, 3, 1)
    G = [
        layer.get_submodule(f"core{k + 1}").weight.detach().numpy().reshape(bonds[k], o, i, bonds[k + 1])
        for k, (o, i) in enumerate(zip(outputs, inputs, strict=True))
    ]
    weight = layer.dense_weight().detach()
    for row, j in enumerate(np.ndindex(outputs)):
        for column, m in enumerate(np.ndindex(inputs)):
            expected = G[0][:, j[0], m[0]] @ G[1][:, j[1], m[1]] @ G[2][:, j[2], m[2]]
            assert float(weight[row, column]) == pytest.approx(expected.item(), rel=1e-12)


@given(st.data())
def test_the_linear_layer_computes_with_its_dense_weight_at_the_cost_it_says(data):
    cores = data.draw(st.integers(2, 4))
    outputs, inputs = (tuple(data.draw(st.integers(1, 4)) for _ in range(cores)) for _ in range(2))
    dense = dense_linear(math.prod(inputs), math.prod(outputs))
    problem = problem_of(dense, shape=(outputs, inputs))
    ranks = tuple(data.draw(st.integers(1, limit)) for limit in problem.limits)
    layer = TTLinear.from_pretrained_layer(
        dense, rank=problem.layer_class.rank_argument(ranks, problem.limits), shape=(outputs, inputs)
    )
    leading = data.draw(st.sampled_from([(), (3,), (2, 3)]))
    x = torch.randn(*leading, dense.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-11)
    cost = layer.cost(x.shape)
    macs = problem.macs(Positions(batch=math.prod(leading)), *ranks)
    assert 2 * cost.macs == counter.get_total_flops() == 2 * macs
    assert cost.params == problem.params(*ranks) + len(dense.bias) == sum(p.numel() for p in layer.parameters())
    reshaped = [
        dense.weight.detach().reshape(*outputs, *inputs).permute([m for k in range(cores) for m in (k, cores + k)])
    ]
    tensor = reshaped[0].reshape([o * i for o, i in zip(outputs, inputs, strict=True)]).numpy()
    error = float(change(dense, layer).square().sum())
    lost = tails(tensor, layer.rank)
    assert max(lost) * (1 - 1e-9) - 1e-18 <= error <= sum(lost) * (1 + 1e-9) + 1e-18


def test_two_cores_are_the_nearest_sum_of_kronecker_products():
    """Van Loan and Pitsianis 1993: the truncated SVD of the rearranged matrix."""
    dense = dense_linear(12, 6)
    layer = TTLinear.from_pretrained_layer(dense, rank=2, shape=((2, 3), (3, 4)))
    rearranged = dense.weight.detach().numpy().reshape(2, 3, 3, 4).transpose(0, 2, 1, 3).reshape(6, 12)
    U, s, Vh = np.linalg.svd(rearranged)
    expected = sum(s[r] * np.kron(U[:, r].reshape(2, 3), Vh[r].reshape(3, 4)) for r in range(2))
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "cores", "shape"),
    [
        ((512, 512), None, ((8, 8, 8), (8, 8, 8))),
        ((768, 3072), None, ((16, 16, 12), (8, 8, 12))),
        ((100, 10), 2, ((5, 2), (10, 10))),
        ((64, 7), 3, ((7, 1, 1), (4, 4, 4))),
        ((1, 9), 4, ((3, 3, 1, 1), (1, 1, 1, 1))),
    ],
)
def test_sizes_are_split_into_nearly_equal_factors(features, cores, shape):
    layer = TTLinear(*features, rank=1, cores=cores, device="meta")
    assert (layer.shape, layer.cores) == (shape, len(shape[0]))


@pytest.mark.parametrize(
    "options",
    [
        {"shape": ((2, 3), (3, 5))},
        {"shape": ((2, 3), (3, 2, 2))},
        {"shape": ((6,), (12,))},
        {"shape": ((2, 3), (3, 4)), "cores": 3},
        {"shape": ((-2, -3), (3, 4))},
        {"shape": 2},
        {"shape": (2, 3)},
        {"shape": ("23", "34")},
        {"shape": ((2.0, 3), (3, 4))},
        {"shape": ((True, 6), (3, 4))},
        {"cores": 1},
        {"cores": 1000},
    ],
)
def test_shapes_that_do_not_fit_are_refused(options):
    with pytest.raises(OptionError, match=r"TTLinear: (shape must be|cores)"):
        TTLinear(12, 6, rank=1, **options)


def test_the_weight_can_be_read_under_autocast():
    layer = TTLinear(12, 30, rank=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), layer.weight, rtol=0.05, atol=0.02)


def test_an_empty_batch_goes_through():
    layer = TTLinear(12, 30, rank=4)
    assert layer(torch.zeros(0, 12)).shape == (0, 30)
    assert layer(torch.zeros(3, 0, 12)).shape == (3, 0, 30)


def test_channels_cannot_be_removed_from_the_linear_layer():
    with pytest.raises(UnsupportedLayerError, match="TTLinear: channels cannot be removed"):
        TTLinear(12, 6, rank=2).resize_to_stages_()


def test_ranks_and_channels_of_the_conv_are_removed():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))
    net[2] = TTConv2d.from_pretrained_layer(net[2], rank=(8, 8, 8))
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    small = lnn.compress_model(net, x, lnn.Prune(0.25, granularity="filter"), progress=False).model
    assert small[2].config() == net[2].config() | {"in_channels": 6, "out_channels": 9, "rank": (6, 6, 6)}
    assert small(x).shape == net(x).shape


@pytest.mark.parametrize("groups", [1, 2])
def test_the_table_holds_what_the_fits_attain(groups):
    layer = dense_conv(in_channels=16, out_channels=24, kernel_size=3, groups=groups)
    table = problem_of(layer).table()
    assert len(table.ranks) > 50
    for ranks, error in list(zip(table.ranks.tolist(), table.errors, strict=True))[::29]:
        attained = float(change(layer, TTConv2d.from_pretrained_layer(layer, rank=ranks)).square().sum())
        assert attained * (1 - 0.02) <= error + 1e-20 <= 1.12 * attained + 1e-15


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_the_linear_table_holds_what_the_fits_attain(cores):
    layer = dense_linear(64, 36)
    problem = problem_of(layer, cores=cores)
    table = problem.table()
    for ranks, error in list(zip(table.ranks.tolist(), table.errors, strict=True))[::17]:
        attained = float(change(layer, TTLinear.from_pretrained_layer(layer, rank=ranks, cores=cores)).square().sum())
        assert attained * (1 - 0.03) <= error + 1e-20 <= 1.15 * attained + 1e-15


def test_the_table_under_a_metric_is_near_what_fits_attain():
    layer = dense_conv(in_channels=8, out_channels=12, kernel_size=3, bias=False)
    metric = dataclasses.replace(metric_of(layer, images(8)), curvature=random_metric(layer).curvature).with_mean()
    table = problem_of(layer).table(metric)
    inner = [i for i, ranks in enumerate(table.ranks.tolist()) if tuple(ranks) != problem_of(layer).limits]
    for i in inner[:: max(1, len(inner) // 6)]:
        fitted = TTConv2d.from_pretrained_layer(layer, rank=table.ranks[i].tolist(), metric=metric)
        assert metric.error(change(layer, fitted)) == pytest.approx(table.errors[i], rel=0.4)


def test_thin_kernels_are_no_candidates():
    for kernel_size in (1, (3, 1), (1, 3)):
        layer = dense_conv(torch.float32, in_channels=12, out_channels=16, kernel_size=kernel_size)
        site = record(layer, torch.ones(1, 12, 9, 9)).sites[0]
        assert low_rank_candidates(site, layer, [TTConv2d]).note == "no format at any rank is smaller"


def brute_force(layer, rank, metric, starts=3):
    """The least error that scipy finds over all four factors, from random starts."""
    out, inn, height, width = layer.weight.shape
    weight, C, H = layer.weight.detach(), metric.covariance[0], metric.curvature[0]
    sizes = [(rank[0], inn), (rank[1], rank[0], height), (rank[2], rank[1], width), (out, rank[2])]
    ends, random = np.cumsum([math.prod(size) for size in sizes]), np.random.default_rng(0)

    def value(x):
        parts = [torch.from_numpy(p.reshape(s).copy()) for p, s in zip(np.split(x, ends[:-1]), sizes, strict=True)]
        factors = [part.requires_grad_() for part in parts]
        delta = (torch.einsum("ai,bah,cbw,oc->oihw", *factors) - weight).flatten(1)
        loss = (H @ delta @ C * delta).sum()
        loss.backward()
        return float(loss.detach()), np.concatenate([factor.grad.numpy().ravel() for factor in factors])

    found = [
        scipy.optimize.minimize(
            value, random.standard_normal(ends[-1]), jac=True, method="L-BFGS-B", options={"maxiter": 300}
        )
        for _ in range(starts)
    ]
    return min(result.fun for result in found)


@pytest.mark.parametrize("rank", [(1, 1, 1), (2, 3, 2)])
def test_the_fit_under_a_metric_is_near_that_of_brute_force(rank):
    layer = dense_conv(in_channels=3, out_channels=4, kernel_size=(3, 2), bias=False)
    metric = dataclasses.replace(metric_of(layer, images(3)), curvature=random_metric(layer).curvature).with_mean()
    compressed = TTConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
    assert metric.error(change(layer, compressed)) <= 1.1 * brute_force(layer, rank, metric)


def test_a_metric_of_white_inputs_is_the_frobenius_norm():
    layer = dense_conv(in_channels=6, kernel_size=3, groups=2, bias=False)
    metric = Metric(torch.eye(27, dtype=torch.float64).expand(2, -1, -1), torch.zeros(2, 27, dtype=torch.float64))
    under = TTConv2d.from_pretrained_layer(layer, rank=(2, 3, 3), metric=metric)
    plain = TTConv2d.from_pretrained_layer(layer, rank=(2, 3, 3))
    assert metric.error(change(layer, under)) <= float(change(layer, plain).square().sum())
    assert metric.error(change(layer, under)) >= 0.97 * float(change(layer, plain).square().sum())


@pytest.mark.parametrize("on_data", [False, True])
def test_networks_are_compressed_saved_and_loaded(on_data, tmp_path):
    torch.manual_seed(0)
    net, x = LeNet5().eval(), torch.randn(8, 1, 28, 28)
    result = lnn.compress_model(
        net,
        x,
        lnn.LowRank(formats=[TTConv2d, TTLinear]),
        budget=lnn.Budget(params=0.3),
        calibration=[x] if on_data else None,
        progress=False,
    )
    kinds = {type(module) for module in result.model.modules()}
    assert TTLinear in kinds
    assert sum(p.numel() for p in result.model.parameters()) <= 0.3 * sum(p.numel() for p in net.parameters())
    lnn.save(result.model, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", LeNet5()).eval()
    assert torch.equal(loaded(x), result.model.eval()(x))
