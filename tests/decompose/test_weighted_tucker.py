"""Tucker under a metric against brute force, and against its formula written out with dense matrices in numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.decompose import (
    Metric,
    TuckerFactors,
    tucker2,
    weighted_svd_errors,
    weighted_tucker1,
    weighted_tucker1_errors,
    weighted_tucker2,
    weighted_tucker2_errors,
)
from lowrank_nn.decompose._regression import Point, Regression
from tests.layers.geometries import dense_conv
from tests.layers.metrics import images, metric_of, random_metric

RANKS = [(3, 2), (2, 3), (4, 4), (None, 2), (3, None)]


def problem(seed=0, *, channels=(5, 6), kernel_size=(3, 2), groups=1, diagonal=False, curvature=True):
    """A kernel, and a metric as a network has it: correlated channels and neighbours."""
    layer = dense_conv(
        in_channels=channels[0] * groups, out_channels=channels[1] * groups, kernel_size=kernel_size, groups=groups
    )
    weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    metric = metric_of(layer, images(channels[0] * groups, seed))
    if curvature:
        metric = dataclasses.replace(metric, curvature=random_metric(layer, seed).curvature)
    if diagonal:
        metric = dataclasses.replace(metric, covariance=metric.covariance.diagonal(dim1=1, dim2=2))
    return weight, metric


def dense(factors):
    """The kernel that factors with a leading group dim stand for, one axis at a time."""
    core, out_factor, in_factor = factors
    if in_factor is not None:
        core = torch.einsum("gab...,gib->gai...", core, in_factor)
    if out_factor is not None:
        core = torch.einsum("gab...,goa->gob...", core, out_factor)
    return core.flatten(0, 1)


def plain(weight, groups, rank):
    """The data-free decomposition, group by group."""
    parts = [tucker2(kernel, rank) for kernel in weight.chunk(groups)]
    stacked = [None if parts[0][k] is None else torch.stack([part[k] for part in parts]) for k in range(3)]
    return TuckerFactors(*stacked)


def brute_force(weight, metric, rank, starts=4):
    """The least error that scipy's BFGS over all factors finds from random starts; one group."""
    out, inn, taps = metric.curvature.shape[1], weight.shape[1], weight[0, 0].numel()
    shapes = [((rank[0] or out), (rank[1] or inn), taps), (out, rank[0] or out), (inn, rank[1] or inn)]
    splits = np.cumsum([np.prod(shape) for shape in shapes])
    W, C, H = weight.flatten(1).numpy(), metric.covariance[0].numpy(), metric.curvature[0].numpy()

    def error_and_gradient(flat):
        core, out_factor, in_factor = (
            part.reshape(shape) for part, shape in zip(np.split(flat, splits[:-1]), shapes, strict=True)
        )
        delta = np.einsum("abt,oa,ib->oit", core, out_factor, in_factor, optimize=True).reshape(W.shape) - W
        slope = H @ delta @ C
        gradient = 2 * slope.reshape(out, inn, taps)
        parts = [
            np.einsum("oit,oa,ib->abt", gradient, out_factor, in_factor, optimize=True),
            np.einsum("oit,abt,ib->oa", gradient, core, in_factor, optimize=True),
            np.einsum("oit,abt,oa->ib", gradient, core, out_factor, optimize=True),
        ]
        return (slope * delta).sum(), np.concatenate([part.ravel() for part in parts])

    rng = np.random.default_rng(0)
    found = [
        scipy.optimize.minimize(
            error_and_gradient, rng.standard_normal(splits[-1]), jac=True, options={"maxiter": 1500, "gtol": 1e-9}
        ).fun
        for _ in range(starts)
    ]
    return min(found)


@pytest.mark.parametrize(("rank", "seed"), [((3, 2), 0), ((2, 3), 1), ((4, 3), 2), ((None, 2), 3), ((3, None), 4)])
def test_it_is_the_optimum_that_brute_force_finds(rank, seed):
    weight, metric = problem(seed, channels=(4, 5), kernel_size=(2, 2))
    best = brute_force(weight, metric, rank)
    converged = weighted_tucker2(weight, metric, rank, iterations=100, tolerance=0)
    assert metric.error(weight - dense(converged)) <= best * (1 + 1e-4)
    assert metric.error(weight - dense(weighted_tucker2(weight, metric, rank))) <= best * 1.02


@given(
    data=st.data(),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel_size=st.sampled_from([(1, 1), (3, 3), (1, 2)]),
    groups=st.integers(1, 3),
    covariance=st.sampled_from(["full", "diagonal", "singular"]),
    curvature=st.booleans(),
    seed=st.integers(0, 5),
)
def test_shapes_orthonormality_and_never_worse_than_without_data(
    data, channels, kernel_size, groups, covariance, curvature, seed
):
    inn, out = channels
    taps = kernel_size[0] * kernel_size[1]
    r_out = data.draw(st.none() | st.integers(1, min(out, inn * taps)))
    r_in = data.draw(st.none() | st.integers(1, inn))
    layer = dense_conv(in_channels=inn * groups, out_channels=out * groups, kernel_size=kernel_size, groups=groups)
    rank = data.draw(st.integers(0, 5)) if covariance == "singular" else None
    metric = random_metric(layer, seed, diagonal=covariance == "diagonal", curvature=curvature, rank=rank)
    weight = layer.weight.detach()
    without = plain(weight, groups, (r_out, r_in))
    factors = weighted_tucker2(weight, metric, (r_out, r_in), start=without.in_factor)
    assert factors.core.shape == (groups, r_out or out, r_in or inn, *kernel_size)
    for factor, rank, size in ((factors.out_factor, r_out, out), (factors.in_factor, r_in, inn)):
        if rank is None:
            assert factor is None
        else:
            assert factor.shape == (groups, size, rank)
            eye = torch.eye(rank, dtype=torch.float64).expand(groups, -1, -1)
            torch.testing.assert_close(factor.mT @ factor, eye)
    error, other = (metric.error(weight - dense(found)) for found in (factors, without))
    # What the data do not show counts 1e-9 of what they show.
    assert error <= other * (1 + 1e-9) + 1e-7 * metric.error(weight)


@pytest.mark.parametrize("rank", [(6, 5), (6, None), (None, 5), (None, None)])
def test_full_rank_is_exact_and_shares_no_memory(rank):
    weight, metric = problem()
    factors = weighted_tucker2(weight, metric, rank)
    torch.testing.assert_close(dense(factors), weight, rtol=0, atol=0)
    assert factors.core.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("rank", [(4, None), (4, 5)])
def test_with_the_input_mode_whole_it_is_the_exact_optimum(rank):
    weight, metric = problem(groups=2)
    error = metric.error(weight - dense(weighted_tucker2(weight, metric, rank)))
    assert error == pytest.approx(float(weighted_svd_errors(weight, metric)[3]), rel=1e-6)


@pytest.mark.parametrize("rank", [(3, 3), (None, 3), (3, None)])
def test_on_a_kernel_of_one_position_it_is_the_exact_optimum(rank):
    weight, metric = problem(kernel_size=(1, 1))
    error = metric.error(weight - dense(weighted_tucker2(weight, metric, rank)))
    assert error == pytest.approx(float(weighted_svd_errors(weight, metric)[2]), rel=1e-6)


def matrix_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def regression_error(weight, metric, in_factor, r_out, group=0):
    """The least error for an input factor: reduced-rank regression on P^T x, with dense matrices in numpy."""
    W, C = metric.unfold(weight)[group].numpy(), metric.covariance[group].numpy()
    C = np.diag(C) if metric.is_diagonal else C
    taps = W.shape[1] // in_factor.shape[0]
    P = np.kron(in_factor, np.eye(taps))
    H = matrix_root(np.eye(len(W)) if metric.curvature is None else metric.curvature[group].numpy())
    # The part of the outputs that P^T x does not explain, and the tail of the spectrum of the part that it does.
    explained = H @ W @ C @ P @ np.linalg.pinv(matrix_root(P.T @ C @ P))
    squares = np.linalg.svd(explained, compute_uv=False) ** 2
    return float(np.trace(H @ W @ C @ W.T @ H) - squares[:r_out].sum())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("curvature", [True, False])
def test_core_and_output_factor_are_the_best_for_their_input_factor(groups, diagonal, curvature):
    weight, metric = problem(groups=groups, diagonal=diagonal, curvature=curvature)
    for rank in ((3, 2), (None, 2), (2, 4)):
        factors = weighted_tucker2(weight, metric, rank)
        least = [regression_error(weight, metric, factors.in_factor[g].numpy(), rank[0], g) for g in range(groups)]
        assert metric.error(weight - dense(factors)) == pytest.approx(sum(least), rel=1e-5)


@pytest.mark.parametrize("rank", RANKS)
def test_a_diagonal_is_treated_as_the_matrix_that_it_stands_for(rank):
    weight, metric = problem(diagonal=True, groups=2)
    matrix = dataclasses.replace(metric, covariance=torch.diag_embed(metric.covariance))
    for options in ({"iterations": 0}, {}):
        first, second = (dense(weighted_tucker2(weight, m, rank, **options)) for m in (metric, matrix))
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*(weighted_tucker2_errors(weight, m, [1, 3]) for m in (metric, matrix)))


@pytest.mark.parametrize("r_out", [None, 3])
@pytest.mark.parametrize("diagonal", [True, False])
def test_the_gradient_is_that_of_the_error(r_out, diagonal):
    weight, metric = problem(diagonal=diagonal, groups=2)
    regression = Regression(weight, metric, r_out)
    generator = torch.Generator().manual_seed(0)
    V, step = (torch.randn(2, 5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    h = 1e-5
    slope = (Point(regression, V + h * step).value - Point(regression, V - h * step).value) / (2 * h)
    assert float(2 * Point(regression, V).gradient @ step.flatten()) == pytest.approx(slope, rel=1e-6)


def test_the_preconditioner_is_the_inverse_second_derivative_where_the_covariance_is_a_product():
    weight, metric = problem(groups=2)
    channels, positions = (m.covariance for m in (random_metric(torch.nn.Linear(n, 1)) for n in (5, 6)))
    product = torch.stack([torch.kron(channels[0], positions[0])] * 2)
    regression = Regression(weight, dataclasses.replace(metric, covariance=product), 3)
    point = Point(regression, torch.eye(5, 2, dtype=torch.float64).expand(2, -1, -1))
    step = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Half the gradient is linear in V while the core stays: its change along a step is half the second derivative.
    moved = Point(regression, point.factor + step)
    moved.basis, moved.core = point.basis, point.core
    change = moved.gradient - point.gradient
    torch.testing.assert_close(point.precondition(change), step.flatten(), rtol=1e-3, atol=1e-3)


def test_dependent_columns_have_no_value():
    weight, metric = problem()
    assert Point(Regression(weight, metric, 3), torch.zeros(1, 5, 2, dtype=torch.float64)).value == np.inf


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("diagonal", [True, False])
def test_tables_hold_the_errors_of_the_start(groups, diagonal):
    weight, metric = problem(groups=groups, diagonal=diagonal)
    table = weighted_tucker2_errors(weight, metric, range(1, 6))
    assert table.shape == (6, 5)
    regression = Regression(weight, metric, None)
    for r_in in range(1, 6):
        V = regression.start(r_in).numpy()
        for r_out in range(1, 7):
            expected = sum(regression_error(weight, metric, V[g], r_out, g) for g in range(groups))
            assert float(table[r_out - 1, r_in - 1]) == pytest.approx(expected, rel=1e-5, abs=1e-7 * regression.total)
    torch.testing.assert_close(weighted_tucker2_errors(weight, metric, [2, 5]), table[:, [1, 4]])
    torch.testing.assert_close(weighted_tucker1_errors(weight, metric), table[-1])
    torch.testing.assert_close(table[:, -1], weighted_svd_errors(weight, metric), rtol=1e-6, atol=1e-8)


def test_tables_are_a_little_above_the_fits():
    weight, metric = problem(channels=(12, 16), kernel_size=(3, 3))
    table = weighted_tucker2_errors(weight, metric, range(1, 13))
    for rank in ((4, 4), (8, 6), (12, 9), (16, 5)):
        error = metric.error(weight - dense(weighted_tucker2(weight, metric, rank)))
        assert error <= float(table[rank[0] - 1, rank[1] - 1]) <= 1.25 * error


@pytest.mark.parametrize("groups", [1, 2])
def test_a_table_is_lowered_to_the_errors_of_fits(groups):
    weight, metric = problem(3, channels=(8, 10), kernel_size=(3, 3), groups=groups)
    fitted = [2, 4, 6]
    errors = weighted_tucker1_errors(weight, metric, fitted)
    start = weighted_tucker1_errors(weight, metric)
    for rank in fitted:
        core, _, in_factor = weighted_tucker2(weight, metric, (None, rank))
        attained = metric.error(weight - dense((core, None, in_factor)))
        assert attained <= float(errors[rank - 1]) <= 1.01 * attained
    share = errors / start
    assert bool((share[1:6] < 1).all())
    between = np.exp(np.interp(np.log(3), np.log(fitted), np.log(share[[1, 3, 5]].numpy())))
    assert float(share[2]) == pytest.approx(between, rel=0.01)


def test_steps_lower_the_error():
    weight, metric = problem(channels=(12, 16), kernel_size=(3, 3))
    errors = [
        metric.error(weight - dense(weighted_tucker2(weight, metric, (6, 4), iterations=n, tolerance=0)))
        for n in (0, 1, 2, 4, 8, 60)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-2] < errors[-1] * 1.002
    assert errors[0] > errors[-1] * 1.005


def test_a_start_is_taken_up():
    weight, metric = problem(channels=(12, 16), kernel_size=(3, 3))
    best = weighted_tucker2(weight, metric, (6, 4), iterations=100, tolerance=0)
    turned = best.in_factor @ torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    again = weighted_tucker2(weight, metric, (6, 4), start=turned.float(), iterations=0)
    error = metric.error(weight - dense(best))
    assert metric.error(weight - dense(again)) == pytest.approx(error, rel=1e-6)
    poor = weighted_tucker2(weight, metric, (6, 4), start=torch.zeros_like(turned), iterations=0)
    alone = weighted_tucker2(weight, metric, (6, 4), iterations=0)
    torch.testing.assert_close(dense(poor), dense(alone))


@pytest.mark.parametrize("rank", RANKS)
def test_without_data_or_weight_nothing_breaks(rank):
    weight, metric = problem(groups=2)
    nothing = Metric(torch.zeros_like(metric.covariance), metric.mean, torch.zeros_like(metric.curvature))
    found, expected = weighted_tucker2(weight, nothing, rank), plain(weight, 2, rank)
    size = [float((weight - dense(factors)).square().sum()) for factors in (found, expected)]
    assert size[0] == pytest.approx(size[1], rel=0.03)
    assert not weighted_tucker2_errors(weight, nothing, [1, 3]).any()
    assert not dense(weighted_tucker2(torch.zeros_like(weight), metric, rank)).any()


@pytest.mark.parametrize("share", [1e-3, 1.0])
def test_one_direction_that_outweighs_all_others(share):
    """Covariances of real activations are close to singular: here of rank 1, or that next to little else."""
    layer = dense_conv(in_channels=32, out_channels=8, kernel_size=3)
    metric = random_metric(layer, rank=1)
    white = torch.eye(288, dtype=torch.float64) * metric.covariance.diagonal(dim1=1, dim2=2).mean()
    metric = dataclasses.replace(metric, covariance=metric.covariance + (1 - share) * 1e-3 * white)
    weight = layer.weight.detach()
    without = plain(weight, 1, (4, 8))
    found = weighted_tucker2(weight, metric, (4, 8), start=without.in_factor)
    assert metric.error(weight - dense(found)) < 0.2 * metric.error(weight - dense(without))
    assert found.core.isfinite().all()


def test_one_mode_as_two_factors_that_share_the_norm():
    weight, metric = problem(groups=2)
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5, 3)))
    left, right = weighted_tucker1(weight, metric, start)
    fitted = dense(weighted_tucker2(weight, metric, (None, 3), start=start))
    for group, kernel in enumerate(fitted.chunk(2)):
        matrix = kernel.transpose(0, 1).flatten(1).numpy()  # inputs by outputs and positions
        np.testing.assert_allclose(left[group] @ right[group], matrix, atol=1e-10)
        norms = np.diag(np.linalg.svd(matrix, compute_uv=False)[:3])
        np.testing.assert_allclose(left[group].mT @ left[group], norms, atol=1e-10)
        np.testing.assert_allclose(right[group] @ right[group].mT, norms, atol=1e-10)


def test_same_bits_twice_and_memory_format_does_not_matter():
    weight, metric = problem()
    first = weighted_tucker2(weight, metric, (3, 2))
    second = weighted_tucker2(weight.contiguous(memory_format=torch.channels_last), metric, (3, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_meta_tensors_give_shapes():
    _, metric = problem(groups=2)
    weight = torch.empty(12, 5, 3, 2, device="meta", dtype=torch.float16)
    core, out_factor, in_factor = weighted_tucker2(weight, metric, (3, 2))
    assert (core.shape, out_factor.shape, in_factor.shape) == ((2, 3, 2, 3, 2), (2, 6, 3), (2, 5, 2))
    assert core.is_meta
    assert weighted_tucker2(weight, metric, (None, 2)).out_factor is None


@pytest.mark.cuda
def test_cuda(device):
    weight, metric = problem(groups=2)
    there = Metric(metric.covariance.to(device), metric.mean.to(device), metric.curvature.to(device))
    factors = weighted_tucker2(weight.to(device), there, (3, 2))
    assert factors.core.device == device
    error = metric.error(weight - dense(factors).cpu())
    assert error == pytest.approx(metric.error(weight - dense(weighted_tucker2(weight, metric, (3, 2)))), rel=1e-3)
    torch.testing.assert_close(
        weighted_tucker2_errors(weight.to(device), there, [1, 3]).cpu(), weighted_tucker2_errors(weight, metric, [1, 3])
    )
