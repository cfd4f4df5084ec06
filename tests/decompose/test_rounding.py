"""round_jointly against GPTQ as published (with the inverse of C, in numpy) and against all roundings there are."""

import itertools

import numpy as np
import pytest
import torch

from lowrank_nn.decompose import round_jointly
from lowrank_nn.decompose.rounding import BLOCK
from lowrank_nn.errors import OptionError
from tests.layers.metrics import random_covariances


def problem(groups, rows, features, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    points = spread * torch.randn(groups, rows, features, generator=generator, dtype=torch.float64)
    return points, random_covariances(groups, features, generator)


def bounds(low, high):
    return torch.tensor(float(low)), torch.tensor(float(high))


def error(points, rounded, covariance):
    change = rounded - points
    return ((change @ covariance) * change).sum(2)


def gptq(points, covariance, low, high):
    """Frantar et al., algorithm 1 for blocks of one column, columns by falling diagonal; one group, in numpy."""
    order = np.argsort(-np.diag(covariance), kind="stable")
    inverse = np.linalg.inv(covariance[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    w, q = points[:, order].copy(), np.empty_like(points)
    for j in range(len(order)):
        q[:, order[j]] = np.clip(np.round(w[:, j]), low, high)
        shift = (w[:, j] - q[:, order[j]]) / upper[j, j]
        w[:, j:] -= shift[:, None] * upper[j, j:]
    return q


@pytest.mark.parametrize("features", [1, 7, 40, BLOCK + 30])
@pytest.mark.parametrize(("low", "high"), [(-127, 127), (-3, 4), (0, 2)])
def test_it_is_the_sweep_of_gptq(features, low, high):
    points, covariance = problem(2, 5, features)
    covariance += 0.1 * torch.eye(features)  # the inverse loses no digits that decide
    rounded = round_jointly(points, covariance, *bounds(low, high))
    for group in range(2):
        expected = gptq(points[group].numpy(), covariance[group].numpy(), low, high)
        np.testing.assert_array_equal(rounded[group], expected)


def test_it_comes_near_the_best_of_all_roundings():
    points, _ = problem(1, 40, 5, spread=1.0)
    covariance = 0.9 ** (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()[None].double()
    every = torch.tensor(list(itertools.product(range(-4, 5), repeat=5)), dtype=torch.float64)
    best = torch.stack([error(row.expand_as(every)[None], every[None], covariance).min() for row in points[0]])
    jointly = error(points, round_jointly(points, covariance, *bounds(-4, 4)), covariance)[0]
    nearest = error(points, points.round().clamp(-4, 4), covariance)[0]
    assert (jointly >= best - 1e-12).all()
    assert jointly.sum() < 1.2 * best.sum()
    assert nearest.sum() > 2 * best.sum()


def test_under_a_diagonal_covariance_it_is_the_nearest():
    points, covariance = problem(2, 5, 9)
    variances = covariance.diagonal(dim1=1, dim2=2)
    nearest = points.round().clamp(-3, 3)
    torch.testing.assert_close(round_jointly(points, variances, *bounds(-3, 3)), nearest)
    torch.testing.assert_close(round_jointly(points, torch.diag_embed(variances), *bounds(-3, 3)), nearest)


def test_rows_have_bounds_of_their_own():
    points, covariance = problem(2, 3, 8)
    low, high = torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([1.0, 0.0, 5.0])
    together = round_jointly(points, covariance, low, high)
    for row in range(3):
        alone = round_jointly(points[:, row : row + 1], covariance, low[row], high[row])
        torch.testing.assert_close(together[:, row : row + 1], alone)


@pytest.mark.parametrize("diagonal", [False, True])
def test_entries_that_are_not_kept_are_zero_and_the_others_make_up_for_them(diagonal):
    points, covariance = problem(1, 50, 12)
    kept = torch.rand(1, 50, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    seen = covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance
    rounded = round_jointly(points, seen, *bounds(-9, 9), kept)
    assert (rounded[~kept] == 0).all()
    if not diagonal:
        nearest = torch.where(kept, points.round().clamp(-9, 9), 0)
        assert error(points, rounded, covariance).sum() < 0.7 * error(points, nearest, covariance).sum()


def test_a_singular_covariance_is_no_obstacle():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 4, 20, generator=generator, dtype=torch.float64)
    covariance = random_covariances(1, 20, generator, rank=2)
    rounded = round_jointly(points, covariance, *bounds(-2, 2))
    assert (rounded == rounded.round()).all()
    assert (rounded.abs() <= 2).all()
    nearest = points.round().clamp(-2, 2)
    assert error(points, rounded, covariance).sum() < 0.1 * error(points, nearest, covariance).sum()


@pytest.mark.parametrize("variance", [0.0, 1e-320, 1e-200])
def test_a_group_whose_inputs_hardly_vary_is_rounded_to_the_nearest(variance):
    points, covariance = problem(2, 4, 20)
    alone = round_jointly(points[:1], covariance[:1], *bounds(-2, 2))
    covariance[1] = variance * torch.eye(20)
    rounded = round_jointly(points, covariance, *bounds(-2, 2))
    torch.testing.assert_close(rounded[:1], alone)
    torch.testing.assert_close(rounded[1], points[1].round().clamp(-2, 2))


def test_negative_eigenvalues_of_sums_in_float32_are_no_obstacle():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator) @ torch.randn(2, 100, generator=generator)
    exact, summed = (x.double().T @ x.double())[None] / 300, (x.T @ x).double()[None] / 300
    assert torch.linalg.cholesky_ex(summed + 1e-8 * torch.eye(100)).info.any()
    points = torch.randn(1, 4, 100, generator=generator, dtype=torch.float64)
    nearest, rounded = points.round().clamp(-2, 2), round_jointly(points, summed, *bounds(-2, 2))
    assert error(points, rounded, exact).sum() < 0.01 * error(points, nearest, exact).sum()
    narrow = round_jointly(points.float(), summed.float(), *bounds(-2, 2)).double()
    assert error(points, narrow, exact).sum() < 0.01 * error(points, nearest, exact).sum()


@pytest.mark.parametrize("wrong", [-0.5, float("nan")])
def test_what_is_no_covariance_is_refused(wrong):
    points, covariance = problem(1, 4, 20)
    covariance[0, 3, 3] = wrong
    with pytest.raises(OptionError, match=r"the covariance is not positive semidefinite\. Collect it again"):
        round_jointly(points, covariance, *bounds(-2, 2))


@pytest.mark.cuda
def test_it_is_the_same_on_cuda(device):
    points, covariance = problem(2, 5, BLOCK + 10)
    rounded = round_jointly(points.to(device), covariance.to(device), *bounds(-3, 3))
    torch.testing.assert_close(rounded.cpu(), round_jointly(points, covariance, *bounds(-3, 3)))
