import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker

from lowrank_nn.errors import RankError
from lowrank_nn.layers import RankRule, TuckerConv2d, read_layer
from tests.layers.geometries import assert_costs_agree, convolutions, dense_conv
from tests.layers.metrics import error_of, images, metric_of, output_error, random_metric


def decaying_conv(dtype=torch.float64, **arguments):
    """A convolution whose channel modes have spectra like those of trained kernels."""
    layer = dense_conv(dtype, **arguments)
    with torch.no_grad():
        out, inn = layer.weight.shape[:2]
        layer.weight.mul_(torch.arange(1, out + 1)[:, None, None, None] ** -0.5)
        layer.weight.mul_(torch.arange(1, inn + 1)[None, :, None, None] ** -0.5)
    return layer


def problem_of(layer):
    return TuckerConv2d.rank_problem(read_layer(layer, TuckerConv2d))


def relative_error(layer, rank):
    compressed = TuckerConv2d.from_pretrained_layer(layer, rank=rank)
    return float(((compressed.weight - layer.weight).norm() / layer.weight.norm()).detach())


def hosvd_squared_error(kernel, rank_out, rank_in):
    """The error of projecting onto the leading singular vectors of both unfoldings, with numpy."""
    U = np.linalg.svd(kernel.reshape(kernel.shape[0], -1))[0][:, :rank_out]
    V = np.linalg.svd(kernel.transpose(1, 0, 2, 3).reshape(kernel.shape[1], -1))[0][:, :rank_in]
    projected = np.einsum("oa,pa,ib,jb,pjhw->oihw", U, U, V, V, kernel, optimize=True)
    return float(((kernel - projected) ** 2).sum())


@pytest.mark.parametrize(
    ("rank", "tolerance"),
    # At a few of many nearly equal directions three sweeps are not enough to converge.
    [((8, 8), 1e-4), ((16, 3), 1e-4), ((10, 12), 1e-4), ((3, 2), 5e-3)],
)
def test_error_is_that_of_tensorly(rank, tolerance):
    layer = decaying_conv(in_channels=24, out_channels=32, kernel_size=3)
    kernel = layer.weight.detach().numpy()
    (core, factors), _ = partial_tucker(kernel, rank=list(rank), modes=[0, 1], n_iter_max=200, tol=1e-10)
    theirs = kernel - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    expected = np.linalg.norm(theirs) / np.linalg.norm(kernel)
    assert relative_error(layer, rank) == pytest.approx(expected, rel=tolerance)


def test_every_group_is_decomposed_by_itself():
    layer = decaying_conv(in_channels=16, out_channels=24, kernel_size=3, groups=2)
    compressed = TuckerConv2d.from_pretrained_layer(layer, rank=(5, 4))
    assert compressed.core.weight.shape == (10, 4, 3, 3)
    for kernel, approximation in zip(layer.weight.chunk(2), compressed.weight.chunk(2), strict=True):
        kernel = kernel.detach().numpy()
        (core, factors), _ = partial_tucker(kernel, rank=[5, 4], modes=[0, 1], n_iter_max=200, tol=1e-10)
        theirs = kernel - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
        ours = kernel - approximation.detach().numpy()
        assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=5e-4)


@pytest.mark.parametrize(("rank", "axes"), [((5, None), (0, 1, 2, 3)), ((None, 5), (1, 0, 2, 3))])
def test_one_mode_alone_has_the_error_of_its_singular_values(rank, axes):
    layer = decaying_conv(in_channels=12, out_channels=16, kernel_size=3)
    kernel = layer.weight.detach().numpy().transpose(axes)
    values = np.linalg.svd(kernel.reshape(kernel.shape[0], -1), compute_uv=False)
    expected = np.sqrt((values[5:] ** 2).sum() / (values**2).sum())
    assert relative_error(layer, rank) == pytest.approx(expected, rel=1e-8)


def test_error_falls_as_either_rank_grows():
    layer = decaying_conv(in_channels=16, out_channels=16, kernel_size=3)
    for grow in (lambda r: (r, 6), lambda r: (6, r), lambda r: (r, r), lambda r: (r, None)):
        errors = [relative_error(layer, grow(r)) for r in (2, 4, 8, 16)]
        assert all(after < before for before, after in pairwise(errors))


def test_outer_factors_are_orthonormal():
    compressed = TuckerConv2d.from_pretrained_layer(decaying_conv(in_channels=12, kernel_size=3), rank=(5, 7))
    expand, reduce = compressed.expand.weight.flatten(1), compressed.reduce.weight.flatten(1)
    assert torch.allclose(expand.T @ expand, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(reduce @ reduce.T, torch.eye(7, dtype=torch.float64), atol=1e-12)


@given(convolutions(), st.data())
def test_costs_agree_with_the_layer_and_with_torch(drawn, data):
    layer, input_shape = drawn
    out_limit, in_limit = problem_of(layer).limits
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    out = data.draw(st.integers(1, out_limit))
    inn = data.draw(st.one_of(st.integers(-(-out // taps), min(in_limit, out * taps)), st.just(in_limit)))
    assert_costs_agree(TuckerConv2d, layer, input_shape, (out, inn))


@pytest.mark.parametrize(
    ("rank", "stages"),
    [
        ((3, 2), ["reduce", "core", "expand"]),
        ((3, None), ["core", "expand"]),
        ((None, 2), ["reduce", "core"]),
        ([3, 2], ["reduce", "core", "expand"]),
    ],
)
def test_a_mode_without_rank_has_no_stage_and_the_last_one_holds_the_bias(rank, stages):
    layer = TuckerConv2d(4, 8, 3, rank=rank)
    assert [name for name, _ in layer.named_children() if name in stages] == [n for n, _ in layer.named_children()]
    assert list(layer.stages()) == [getattr(layer, name) for name in stages]
    assert [stage.bias is not None for stage in layer.stages()] == [False] * (len(stages) - 1) + [True]
    assert TuckerConv2d(4, 8, 3, bias=False, rank=rank).bias is None


@pytest.mark.parametrize("rank", [(3, 2), (None, 2), (3, None)])
def test_config_survives_json(rank):
    layer = TuckerConv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), rank=rank)
    again = TuckerConv2d(**json.loads(json.dumps(layer.config())))
    assert again.config() == layer.config()
    assert again.rank == rank
    assert again.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ((9, 2), r"rank_out .* must be from 1 to 8, got 9"),
        ((2, 5), r"rank_in .* must be from 1 to 4, got 5"),
        ((0, 2), r"rank_out .* must be from 1 to 8, got 0"),
        ((7, 1), r"rank_out must be at most 1 \* 3 \* 2 = 6 where the other rank is 1, got 7"),
        ((2.5, 2), r"rank_out .* must be an integer"),
        ((None, None), r"rank must be a pair \(rank_out, rank_in\)"),
        (4, r"rank must be a pair \(rank_out, rank_in\)"),
        ((1, 2, 3), r"rank must be a pair \(rank_out, rank_in\)"),
        ("ab", r"rank must be a pair \(rank_out, rank_in\)"),
    ],
)
def test_ranks_out_of_range_are_refused(rank, message):
    with pytest.raises(RankError, match="^TuckerConv2d: " + message):
        TuckerConv2d(4, 8, (3, 2), rank=rank)


def test_ranks_bound_each_other_both_ways():
    assert problem_of(dense_conv(in_channels=2, out_channels=40, kernel_size=3)).limits == (18, 2)
    assert problem_of(dense_conv(in_channels=40, out_channels=2, kernel_size=(2, 3))).limits == (2, 12)
    with pytest.raises(RankError, match=r"rank_in must be at most 1 \* 1 \* 1 = 1 .* got 2"):
        TuckerConv2d(4, 8, 1, rank=(1, 2))


@pytest.mark.parametrize(
    ("ranks", "limits", "argument"),
    [
        ((3, 2), (8, 4), (3, 2)),
        ((8, 2), (8, 4), (None, 2)),
        ((3, 4), (8, 4), (3, None)),
        ((8, 4), (8, 4), (None, 4)),
        ((4, 8), (4, 8), (4, None)),
    ],
)
def test_a_rank_at_its_limit_leaves_the_mode_whole(ranks, limits, argument):
    assert TuckerConv2d.rank_argument(ranks, limits) == argument


class Given(RankRule):
    def __init__(self, *ranks):
        self.ranks = ranks

    def choose(self, problem):
        return self.ranks


@pytest.mark.parametrize(
    ("chosen", "rank"), [((30, 2), (None, 2)), ((18, 2), (None, 2)), ((17, 2), (17, 2)), ((2, 20), (2, None))]
)
def test_a_rule_may_ask_for_more_than_the_other_mode_leaves(chosen, rank):
    layer = dense_conv(in_channels=32, out_channels=40, kernel_size=3)
    compressed = TuckerConv2d.from_pretrained_layer(layer, rank=Given(*chosen))
    assert compressed.rank == rank


def test_table_holds_the_hosvd_errors():
    layer = decaying_conv(in_channels=10, out_channels=12, kernel_size=3)
    ranks, errors = problem_of(layer).table()
    kernel = layer.weight.detach().numpy()
    for (out, inn), error in zip(ranks.tolist(), errors.tolist(), strict=True):
        assert error == pytest.approx(hosvd_squared_error(kernel, out, inn), rel=1e-8, abs=1e-10)
    assert errors[(ranks == (12, 10)).all(axis=1)] == pytest.approx([0], abs=1e-10)


def test_table_adds_up_the_groups():
    layer = decaying_conv(in_channels=16, out_channels=16, kernel_size=3, groups=2)
    ranks, errors = problem_of(layer).table()
    for (out, inn), error in list(zip(ranks.tolist(), errors.tolist(), strict=True))[::5]:
        halves = [hosvd_squared_error(half.numpy(), out, inn) for half in layer.weight.detach().chunk(2)]
        assert error == pytest.approx(sum(halves), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_table_holds_the_best_pair_for_every_budget(stride):
    """Up to 16 channels the grid is complete, so that exhaustive search finds nothing better."""
    layer = decaying_conv(in_channels=10, out_channels=12, kernel_size=3, stride=stride)
    problem = problem_of(layer)
    ranks, errors = problem.table()
    kernel = layer.weight.detach().numpy()
    every = [(out, inn) for out in range(1, 13) for inn in range(1, 11)]
    pairs = np.array(
        [(out, inn) for out, inn in every if (out <= 9 * inn or out == 12) and (inn <= 9 * out or inn == 10)]
    )
    all_errors = np.array([hosvd_squared_error(kernel, out, inn) for out, inn in pairs])
    positions = problem.typical_positions()
    for which, cost in enumerate((problem.params, lambda *r: problem.macs(positions, *r))):
        for share in (0.1, 0.2, 0.4, 0.7, 0.95):
            budget = share * problem.dense(positions)[which]
            best = all_errors[cost(*pairs.T) <= budget].min()
            assert errors[cost(*ranks.T) <= budget].min() == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 96), (96, 80), (256, 256)])
def test_table_is_small_and_valid(in_channels, out_channels):
    layer = decaying_conv(torch.float32, in_channels=in_channels, out_channels=out_channels, kernel_size=3)
    problem = problem_of(layer)
    ranks, errors = problem.table()
    assert 1 < len(ranks) <= 401
    assert (errors >= 0).all()
    assert tuple(ranks[-1]) == problem.limits
    for pair in ranks.tolist():
        rank = TuckerConv2d.rank_argument(tuple(pair), problem.limits)
        TuckerConv2d(in_channels, out_channels, 3, rank=rank, device="meta")


def test_a_layer_that_tucker_cannot_shrink_has_the_lossless_pair_alone():
    ranks, errors = problem_of(dense_conv(out_channels=4, kernel_size=3, groups=4)).table()
    assert ranks.tolist() == [[1, 1]]
    assert errors.tolist() == [0.0]


PAIRS = [(3, 2), (None, 2), (3, None)]


@pytest.mark.parametrize("rank", PAIRS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_metric_s_error_is_that_of_the_outputs_on_its_data(rank, groups, bias):
    layer = decaying_conv(in_channels=8, kernel_size=3, stride=2, groups=groups, bias=bias)
    x = images(8)
    metric = metric_of(layer, x)
    plain = TuckerConv2d.from_pretrained_layer(layer, rank=rank)
    fitted = TuckerConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
    seen = metric if bias else metric.with_mean()
    assert output_error(fitted, layer, x) == pytest.approx(error_of(fitted, layer, seen), rel=1e-6)
    assert output_error(fitted, layer, x) < 0.9 * output_error(plain, layer, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [(5, 7), (None, 7), (5, None)])
def test_outer_factors_are_orthonormal_under_a_metric_too(rank, dtype):
    layer = decaying_conv(dtype, in_channels=12, kernel_size=3)
    compressed = TuckerConv2d.from_pretrained_layer(layer, rank=rank, metric=random_metric(layer))
    if rank[0] is not None:
        expand = compressed.expand.weight.flatten(1)
        torch.testing.assert_close(expand.T @ expand, torch.eye(5, dtype=dtype))
    if rank[1] is not None:
        reduce = compressed.reduce.weight.flatten(1)
        torch.testing.assert_close(reduce @ reduce.T, torch.eye(7, dtype=dtype))


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_narrow_layers_are_fitted_as_well_as_their_dtype_allows(dtype, slack):
    wide, narrow = (decaying_conv(kind, in_channels=8, kernel_size=3) for kind in (torch.float64, dtype))
    metric = metric_of(wide, images(8))
    expected = error_of(TuckerConv2d.from_pretrained_layer(wide, rank=(4, 3), metric=metric), wide, metric)
    fitted = TuckerConv2d.from_pretrained_layer(narrow, rank=(4, 3), metric=metric)
    assert fitted.weight.dtype == dtype
    assert error_of(fitted.double(), wide, metric) == pytest.approx(expected, rel=slack)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_table_under_a_metric_is_a_little_above_the_fits(groups, diagonal):
    layer = decaying_conv(in_channels=12, out_channels=16, kernel_size=3, groups=groups)
    metric = dataclasses.replace(metric_of(layer, images(12)), curvature=random_metric(layer).curvature)
    if diagonal:
        metric = dataclasses.replace(metric, covariance=metric.covariance.diagonal(dim1=1, dim2=2))
    problem = problem_of(layer)
    ranks, errors = problem.table(metric)
    assert tuple(ranks[-1]) == problem.limits
    assert errors[-1] <= 1e-10 * errors[0]
    for pair, error in list(zip(ranks.tolist(), errors.tolist(), strict=True))[:-1:6]:
        rank = TuckerConv2d.rank_argument(tuple(pair), problem.limits)
        attained = error_of(TuckerConv2d.from_pretrained_layer(layer, rank=rank, metric=metric), layer, metric)
        assert attained * (1 - 1e-5) <= error <= 1.4 * attained


@pytest.mark.parametrize(("in_channels", "out_channels"), [(2, 40), (40, 2)])
def test_the_table_under_a_metric_knows_that_modes_bound_each_other(in_channels, out_channels):
    layer = decaying_conv(in_channels=in_channels, out_channels=out_channels, kernel_size=(3, 2))
    metric = random_metric(layer)
    problem = problem_of(layer)
    ranks, errors = problem.table(metric)
    assert errors[(ranks == problem.limits).all(axis=1)] == pytest.approx([0], abs=1e-6 * metric.error(layer.weight))
    for pair, error in list(zip(ranks.tolist(), errors.tolist(), strict=True))[::4]:
        rank = TuckerConv2d.rank_argument(tuple(pair), problem.limits)
        attained = error_of(TuckerConv2d.from_pretrained_layer(layer, rank=rank, metric=metric), layer, metric)
        assert attained <= error * (1 + 1e-5) + 1e-6 * metric.error(layer.weight)


@pytest.mark.parametrize("rank", PAIRS)
def test_refitting_follows_weight_and_metric(rank):
    layer = decaying_conv(in_channels=8, kernel_size=3)
    compressed = TuckerConv2d.from_pretrained_layer(layer, rank=rank, metric=random_metric(layer))
    with torch.no_grad():
        layer.weight.add_(layer.weight.roll(1, 0), alpha=0.3)
    metric = random_metric(layer, 1)
    anew = TuckerConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
    before = error_of(compressed, layer, metric)
    compressed.refit_(layer.weight.detach(), metric)
    assert error_of(compressed, layer, metric) < 0.9 * before
    assert error_of(compressed, layer, metric) == pytest.approx(error_of(anew, layer, metric), rel=0.05)


@pytest.mark.parametrize("rank", PAIRS)
def test_a_meta_layer_takes_a_metric(rank):
    layer = dense_conv(in_channels=8, kernel_size=3)
    new = TuckerConv2d(8, 8, 3, rank=rank, device="meta")
    new.approximate_(layer.weight.to("meta"), random_metric(layer))
    assert new.weight.is_meta
