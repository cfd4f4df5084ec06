import itertools
import math

import numpy as np
import pytest
import torch

from lowrank_nn.decompose import balanced_shape, kronecker, kronecker_sum, rearranged


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_numpy(A, B):
    """The sum of the products by numpy.kron, tap by tap."""
    return np.stack([sum(map(np.kron, A.numpy(), B[..., tap].numpy())) for tap in range(B.shape[-1])], axis=-1)


def test_the_sum_is_that_of_numpy_s_products():
    A, B = random(3, 2, 5), random(3, 4, 3, 6, seed=1)
    np.testing.assert_allclose(kronecker_sum(A, B).numpy(), by_numpy(A, B), rtol=1e-12)
    several = kronecker_sum(torch.stack([A, 2 * A]), torch.stack([B, B]))
    np.testing.assert_allclose(several[1].numpy(), 2 * by_numpy(A, B), rtol=1e-12)


def test_rearranging_turns_a_product_into_an_outer_product():
    A, B = random(1, 2, 5), random(1, 4, 3, 6, seed=1)
    matrix = rearranged(kronecker_sum(A, B), (2, 5))
    np.testing.assert_allclose(matrix.numpy(), np.outer(A.numpy(), B.numpy()), rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 2)])
def test_the_error_is_the_tail_of_the_singular_values(shape):
    weight = random(*shape)
    for inner, rank in itertools.product([(2, 3), (4, 1), (1, 6), (4, 6)], (1, 2, 4)):
        matrix = rearranged(weight, inner)
        if rank > min(matrix.shape):
            continue
        A, B = kronecker(weight, rank, inner)
        assert A.shape == (rank, *inner)
        assert B.shape == (rank, 4 // inner[0], 6 // inner[1], math.prod(shape[2:]))
        tail = float((np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:] ** 2).sum())
        change = kronecker_sum(A, B).reshape(shape) - weight
        assert float(change.square().sum()) == pytest.approx(tail, rel=1e-9, abs=1e-20)


def test_it_is_the_optimum_of_alternating_least_squares():
    """The best of many starts, each factor in turn the least-squares solution given the other."""
    weight, (rank, shape) = random(4, 6, 3), (2, (2, 3))
    target = np.stack([weight.numpy()[2 * o : 2 * o + 2, 2 * i : 2 * i + 2].ravel() for o in (0, 1) for i in range(3)])
    drawn, best = np.random.default_rng(0), math.inf
    for _ in range(5):
        right = drawn.standard_normal((rank, 12))
        for _ in range(200):
            left = np.linalg.lstsq(right.T, target.T, rcond=None)[0].T
            right = np.linalg.lstsq(left, target, rcond=None)[0]
        best = min(best, float(((left @ right - target) ** 2).sum()))
    A, B = kronecker(weight, rank, shape)
    assert float((by_numpy(A, B) - weight.numpy()).__pow__(2).sum()) == pytest.approx(best, rel=1e-6)


def test_factors_are_orthogonal_and_as_long_as_each_other():
    A, B = kronecker(random(8, 6, 3, 3), 5, (4, 2))
    grams = [factor.flatten(1) @ factor.flatten(1).T for factor in (A, B)]
    torch.testing.assert_close(grams[0], grams[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(grams[0], torch.diag(grams[0].diagonal()), rtol=0, atol=1e-12)


def test_half_precision_and_meta_tensors():
    weight = random(8, 6, 3, 3)
    A, B = kronecker(weight.to(torch.bfloat16), 3, (4, 2))
    assert A.dtype == B.dtype == torch.bfloat16
    expected = kronecker_sum(*kronecker(weight, 3, (4, 2)))
    assert float((kronecker_sum(A, B).double() - expected).norm() / expected.norm()) < 0.03
    assert [factor.shape for factor in kronecker(weight.to("meta"), 3, (4, 2))] == [A.shape, B.shape]


def best_by_search(out, inn, taps):
    every = [(o, i) for o in range(1, out + 1) for i in range(1, inn + 1) if out % o == inn % i == 0]
    return min(o * i + out * inn * taps // (o * i) for o, i in every)


@pytest.mark.parametrize(("out", "inn"), [(64, 64), (12, 9), (10, 84), (7, 5), (1, 1), (32, 1)])
@pytest.mark.parametrize("taps", [1, 9])
def test_the_balanced_shape_has_the_fewest_entries(out, inn, taps):
    o, i = balanced_shape(out, inn, taps)
    assert out % o == inn % i == 0
    assert o * i + out * inn * taps // (o * i) == best_by_search(out, inn, taps)


def test_of_shapes_with_as_few_entries_the_cheapest_or_the_one_of_largest_rank():
    assert balanced_shape(64, 64, 9) == (64, 4)  # also (16, 16), of four times the MACs
    assert balanced_shape(64, 64) == (8, 8)  # also (64, 1), which is the SVD
    assert balanced_shape(7, 5) == (7, 1)
