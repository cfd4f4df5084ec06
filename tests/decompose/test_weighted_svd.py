"""The truncated SVD under a metric against its formula in numpy, and against what the metric itself says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.decompose import Metric, truncated_svd, weighted_svd, weighted_svd_errors
from lowrank_nn.decompose.weighted_svd import balanced
from tests.layers.metrics import random_covariances

SHAPES = {"wide": (6, 11), "tall": (11, 6), "square": (7, 7)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_problem(shape, groups=1, *, curvature=True, diagonal=False, rank=None, seed=0):
    """A weight (groups o, p) and a metric for it, of this rank or far from singular."""
    o, p = shape
    generator = torch.Generator().manual_seed(seed)
    covariance = random_covariances(groups, p, generator, rank=rank)
    if rank is None:
        covariance = covariance + 0.05 * torch.eye(p, dtype=torch.float64)
    if diagonal:
        covariance = covariance.diagonal(dim1=1, dim2=2).contiguous()
    H = random_covariances(groups, o, generator) + 0.05 * torch.eye(o, dtype=torch.float64) if curvature else None
    return draw(groups * o, p, seed=seed), Metric(covariance, draw(groups, p), H)


def matrix_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def whitened(weight, metric):
    """H^{1/2}, W and C^{1/2} of each group, with numpy."""
    for g, W in enumerate(np.split(weight.numpy(), metric.groups)):
        C = metric.covariance[g].numpy()
        H = np.eye(len(W)) if metric.curvature is None else metric.curvature[g].numpy()
        yield matrix_root(H), W, matrix_root(np.diag(C) if metric.is_diagonal else C)


def product(factors):
    left, right = factors
    return (left @ right).flatten(0, 1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_svd_of_the_whitened_weight(shape, diagonal, curvature, groups):
    weight, metric = random_problem(shape, groups, curvature=curvature, diagonal=diagonal)
    for rank in (1, 3, 5):
        expected, tail = [], 0.0
        for H, W, C in whitened(weight, metric):
            U, S, Vh = np.linalg.svd(H @ W @ C, full_matrices=False)
            expected.append(np.linalg.inv(H) @ (U[:, :rank] * S[:rank]) @ Vh[:rank] @ np.linalg.inv(C))
            tail += (S[rank:] ** 2).sum()
        left, right = weighted_svd(weight, metric, rank)
        assert left.shape == (groups, shape[0], rank)
        assert right.shape == (groups, rank, shape[1])
        # A ridge of 1e-9 settles ties.
        np.testing.assert_allclose(product((left, right)).numpy(), np.concatenate(expected), rtol=1e-6, atol=1e-6)
        assert metric.error(weight - product((left, right))) == pytest.approx(tail, rel=1e-6)
        assert float(weighted_svd_errors(weight, metric)[rank - 1]) == pytest.approx(tail, rel=1e-6)


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    groups=st.integers(1, 3),
    rank=st.integers(0, 8),
    curvature=st.booleans(),
    diagonal=st.booleans(),
    seed=st.integers(0, 5),
)
def test_errors_of_all_ranks_are_attained_and_never_above_the_plain_svd(shape, groups, rank, curvature, diagonal, seed):
    weight, metric = random_problem(shape, groups, curvature=curvature, diagonal=diagonal, rank=rank, seed=seed)
    total = metric.error(weight)
    errors = weighted_svd_errors(weight, metric)
    assert errors.shape == (min(shape),)
    assert errors[-1] == 0
    for r, expected in enumerate(errors.tolist(), 1):
        attained = metric.error(weight - product(weighted_svd(weight, metric, r)))
        plain = [torch.matmul(*truncated_svd(W, r)) for W in weight.chunk(groups)]
        # What the data do not show counts 1e-9 of what they show.
        slack = 1e-6 * total + 1e-6 * metric.error(weight - torch.cat(plain))
        assert attained == pytest.approx(expected, rel=1e-6, abs=slack)
        assert attained <= metric.error(weight - torch.cat(plain)) + slack


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full_rank_is_exact_whatever_the_data_show(shape):
    weight, metric = random_problem(shape, rank=2)
    torch.testing.assert_close(product(weighted_svd(weight, metric, min(shape))), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("diagonal", [True, False])
def test_without_data_it_is_the_plain_svd(shape, diagonal):
    weight, metric = random_problem(shape, diagonal=diagonal)
    expected = torch.matmul(*truncated_svd(weight, 3))
    dead = dataclasses.replace(metric, covariance=torch.zeros_like(metric.covariance))
    for nothing in (
        dataclasses.replace(dead, curvature=None),
        dataclasses.replace(dead, curvature=torch.zeros_like(metric.curvature)),
    ):
        torch.testing.assert_close(product(weighted_svd(weight, nothing, 3)), expected)
    white = Metric(torch.eye(shape[1], dtype=torch.float64)[None], metric.mean)
    torch.testing.assert_close(product(weighted_svd(weight, white, 3)), expected)


def test_ranks_beyond_the_data_go_to_what_is_left_of_the_weight():
    """With data of rank 2 two directions explain all outputs; a third then serves the Frobenius norm."""
    weight, metric = random_problem((6, 11), curvature=False, rank=2)
    two, three = (weight - product(weighted_svd(weight, metric, r)) for r in (2, 3))
    assert metric.error(three) < 1e-6 * metric.error(weight)
    assert float(two.square().sum() - three.square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(two)[0] ** 2), rel=1e-3
    )


def test_dead_inputs_and_outputs_do_no_harm():
    weight, metric = random_problem((6, 11))
    metric.covariance[:, 3], metric.covariance[:, :, 3] = 0, 0
    metric.curvature[:, 2], metric.curvature[:, :, 2] = 0, 0
    ((H, W, C),) = whitened(weight, metric)
    tails = np.cumsum(np.linalg.svd(H @ W @ C, compute_uv=False)[::-1] ** 2)[::-1]
    for rank in (1, 3, 5):
        approximation = product(weighted_svd(weight, metric, rank))
        assert approximation.norm() < 10 * weight.norm()
        assert metric.error(weight - approximation) == pytest.approx(tails[rank], rel=1e-5, abs=1e-6 * tails[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_that_were_seen_stand_in_for_a_covariance_that_was_not_kept(shape):
    """Principal components of the outputs: the exact fit, though the metric knows the inputs' variances alone."""
    weight, whole = random_problem(shape, 2, curvature=False)
    metric = Metric(
        whole.covariance.diagonal(dim1=1, dim2=2),
        whole.mean,
        outputs=whole.output_covariance(weight),
    )
    for rank in (2, 4):
        exact = whole.error(weight - product(weighted_svd(weight, whole, rank)))
        assert whole.error(weight - product(weighted_svd(weight, metric, rank))) == pytest.approx(exact, rel=1e-5)
    shares = weighted_svd_errors(weight, whole) / whole.error(weight)
    torch.testing.assert_close(weighted_svd_errors(weight, metric), shares * metric.error(weight), rtol=1e-5, atol=1e-6)


def test_factors_are_balanced_and_ordered():
    left, right = balanced(draw(2, 9, 4), draw(2, 4, 7, seed=1))
    torch.testing.assert_close(left @ right, draw(2, 9, 4) @ draw(2, 4, 7, seed=1))
    norms = torch.linalg.svdvals(left @ right)[:, :4]
    torch.testing.assert_close(left.mT @ left, torch.diag_embed(norms))
    torch.testing.assert_close(right @ right.mT, torch.diag_embed(norms))
    weight, metric = random_problem((6, 11))
    left, right = weighted_svd(weight, metric, 3)
    torch.testing.assert_close(left.mT @ left, right @ right.mT)
    assert not any(factor.any() for factor in balanced(torch.zeros(1, 5, 2), torch.zeros(1, 2, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_are_widened(dtype):
    weight, metric = random_problem((6, 11))
    left, right = weighted_svd(weight.to(dtype), metric, 3)
    assert left.dtype == right.dtype == torch.float64
    torch.testing.assert_close(product((left, right)), product(weighted_svd(weight.to(dtype).double(), metric, 3)))


def test_meta_tensors_give_shapes():
    _, metric = random_problem((6, 11), 2)
    left, right = weighted_svd(torch.empty(12, 11, device="meta"), metric, 3)
    assert left.is_meta
    assert (left.shape, right.shape) == ((2, 6, 3), (2, 3, 11))


@pytest.mark.cuda
def test_cuda(device):
    weight, metric = random_problem((6, 11), 2)
    there = Metric(metric.covariance.to(device), metric.mean.to(device), metric.curvature.to(device))
    on_gpu = product(weighted_svd(weight.to(device), there, 3))
    assert on_gpu.device == device
    torch.testing.assert_close(on_gpu.cpu(), product(weighted_svd(weight, metric, 3)), rtol=1e-6, atol=1e-8)
