"""Tensor trains, against tensorly, numpy's unfoldings and brute force."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize
import tensorly.decomposition
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.decompose import (
    Metric,
    mode_roots,
    reachable_ranks,
    tensor_train,
    tensor_train_errors,
    tt_limits,
    tt_tensor,
    weighted_tensor_train,
)
from tests.layers.metrics import random_covariances

SHAPES = [((6, 7), (3,)), ((5, 6, 7), (3, 4)), ((6, 3, 4, 8), (3, 5, 4)), ((4, 3, 2, 3, 4), (2, 3, 3, 2))]


def random_tensor(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unfolding_tails(tensor, ranks):
    """The squared error of the best approximation of each unfolding at its rank, with numpy."""
    array = tensor.double().numpy()
    matrices = [array.reshape(int(np.prod(array.shape[:k])), -1) for k in range(1, array.ndim)]
    return [
        float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())
        for matrix, rank in zip(matrices, ranks, strict=True)
    ]


def squared_error(tensor, cores):
    return float((tensor.double() - tt_tensor([core.double() for core in cores])).square().sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_tt_svd_is_that_of_tensorly(shape, ranks, dtype, tolerance):
    tensor = random_tensor(shape, dtype=dtype)
    cores = tensor_train(tensor, ranks, sweeps=0)
    bonds = (1, *ranks, 1)
    assert [tuple(core.shape) for core in cores] == [(bonds[k], n, bonds[k + 1]) for k, n in enumerate(shape)]
    expected = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(tensor.double().numpy(), list(bonds)))
    np.testing.assert_allclose(
        tt_tensor(cores).double().numpy(), expected, rtol=0, atol=tolerance * abs(expected).max()
    )


@pytest.mark.parametrize("sweeps", [0, 10])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_error_lies_between_its_bounds(shape, ranks, sweeps):
    """No train loses less than the worst unfolding, and TT-SVD no more than all of them (Oseledets 2011)."""
    for seed in range(3):
        tensor = random_tensor(shape, seed)
        tails = unfolding_tails(tensor, ranks)
        error = squared_error(tensor, tensor_train(tensor, ranks, sweeps=sweeps))
        assert max(tails) * (1 - 1e-12) <= error <= sum(tails) * (1 + 1e-12)


def best_known(tensor, ranks, starts=6):
    """The least squared error that scipy's L-BFGS finds over all cores, from random starts."""
    array, bonds = tensor.numpy(), (1, *ranks, 1)
    sizes = [(bonds[k], n, bonds[k + 1]) for k, n in enumerate(array.shape)]
    ends = np.cumsum([np.prod(size) for size in sizes])
    random = np.random.default_rng(0)

    def value(x):
        cores = [part.reshape(size) for part, size in zip(np.split(x, ends[:-1]), sizes, strict=True)]
        torch_cores = [torch.from_numpy(core.copy()).requires_grad_() for core in cores]
        product = torch.einsum("aib,bjc,ckd->ijk", *torch_cores)
        loss = (product - tensor).square().sum()
        loss.backward()
        return float(loss.detach()), np.concatenate([core.grad.numpy().ravel() for core in torch_cores])

    found = [
        scipy.optimize.minimize(value, random.standard_normal(ends[-1]), jac=True, method="L-BFGS-B")
        for _ in range(starts)
    ]
    return min(result.fun for result in found)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tt_svd_is_quasi_optimal_and_sweeps_come_near_the_optimum(seed):
    tensor, ranks = random_tensor((3, 4, 3), seed), (2, 2)
    best = best_known(tensor, ranks)
    assert squared_error(tensor, tensor_train(tensor, ranks, sweeps=0)) <= 2 * best * (1 + 1e-9)  # sqrt(d - 1), squared
    swept = squared_error(tensor, tensor_train(tensor, ranks, sweeps=200, tolerance=1e-9))
    assert best * (1 - 1e-6) <= swept <= 1.1 * best


@pytest.mark.parametrize(("shape", "ranks"), SHAPES[1:])
def test_sweeps_lower_the_error_and_keep_cores_orthonormal(shape, ranks):
    tensor = random_tensor(shape)
    errors = [squared_error(tensor, tensor_train(tensor, ranks, sweeps=n, tolerance=0)) for n in (0, 1, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.99 * errors[0]
    for core in tensor_train(tensor, ranks)[:-1]:
        columns = core.flatten(0, 1)
        torch.testing.assert_close(
            columns.T @ columns, torch.eye(core.shape[2], dtype=torch.float64), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_a_train_of_these_ranks_is_found_again(shape, ranks, dtype, tolerance):
    planted = tt_tensor([random_tensor((a, n, b)) for a, n, b in zip((1, *ranks), shape, (*ranks, 1), strict=True)])
    tensor = (planted / planted.std()).to(dtype)
    for wanted in (ranks, tt_limits(shape)):
        cores = tensor_train(tensor, wanted)
        assert {core.dtype for core in cores} == {dtype}
        error = (tt_tensor([core.double() for core in cores]) - tensor.double()).norm() / tensor.double().norm()
        assert error < tolerance


def test_a_tensor_of_zeros_and_one_without_numbers():
    assert all(torch.isfinite(core).all() for core in tensor_train(torch.zeros(4, 3, 5), (2, 2)))
    cores = tensor_train(torch.empty(4, 3, 5, device="meta"), (9, 2))
    assert [tuple(core.shape) for core in cores] == [(1, 4, 4), (4, 3, 2), (2, 5, 1)]
    assert tensor_train_errors(torch.empty(4, 3, 5, device="meta"), [[1, 2], [1, 2, 3]]).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_errors_of_a_grid_are_those_of_tt_svd(shape, ranks, dtype):
    tensor = random_tensor(shape, dtype=dtype)
    grid = [sorted({1, rank, limit}) for rank, limit in zip(ranks, tt_limits(shape), strict=True)]
    errors = tensor_train_errors(tensor, grid)
    assert errors.dtype == torch.float64
    for place in np.ndindex(*errors.shape):
        chosen = [ranks[i] for ranks, i in zip(grid, place, strict=True)]
        expected = squared_error(tensor, tensor_train(tensor.double(), chosen, sweeps=0))
        noise = 1e-6 * float(tensor.square().sum())
        assert expected <= float(errors[place]) * (1 + 1e-5) + noise
        if reachable_ranks(shape, chosen) == tuple(chosen):
            assert float(errors[place]) == pytest.approx(expected, rel=1e-5, abs=noise)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_reachable_ranks_are_the_ranks_of_a_generic_train(shape, data):
    """A train of random cores has unfoldings of exactly these ranks."""
    ranks = [data.draw(st.integers(1, 12)) for _ in shape[1:]]
    sizes = zip((1, *ranks), shape, (*ranks, 1), strict=True)
    tensor = tt_tensor([random_tensor(size, seed) for seed, size in enumerate(sizes)])
    found = [np.linalg.matrix_rank(tensor.reshape(int(np.prod(shape[:k])), -1)) for k in range(1, len(shape))]
    assert reachable_ranks(shape, ranks) == tuple(found)
    arrays = reachable_ranks(shape, tuple(np.array([rank, 1]) for rank in ranks))
    assert [array.tolist() for array in arrays] == [[rank, 1] for rank in found]


def product_metric(inputs, outputs, seed=0):
    """A metric that is a product over the modes, by numpy's own Kronecker products."""
    generator = torch.Generator().manual_seed(seed)
    C, H = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for size in inputs:
        C = torch.kron(C, random_covariances(1, size, generator)[0])
    for size in outputs:
        H = torch.kron(H, random_covariances(1, size, generator)[0])
    return Metric(C[None], torch.zeros(1, len(C), dtype=torch.float64), H[None])


def test_roots_of_a_product_metric_are_those_of_its_modes():
    metric = product_metric((3, 2, 4), (2, 5))
    roots = mode_roots(metric, (3, 2, 4), (2, 5))
    C, H = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for root in roots.inputs:
        C = torch.kron(C, root.root[0] @ root.root[0])
    for root in roots.outputs:
        H = torch.kron(H, root.root[0] @ root.root[0])
    together = torch.kron(H, C) * roots.scale
    expected = torch.kron(metric.curvature[0], metric.covariance[0])
    assert float((together - expected).norm() / expected.norm()) < 1e-6  # the floor of the roots


@pytest.mark.parametrize("curvature", [False, True])
def test_of_a_diagonal_only_its_sums_are_seen(curvature):
    metric = product_metric((3, 4), (5,))
    diagonal = dataclasses.replace(
        metric,
        covariance=metric.covariance.diagonal(dim1=1, dim2=2),
        curvature=metric.curvature if curvature else None,
    )
    whole = dataclasses.replace(diagonal, covariance=torch.diag_embed(diagonal.covariance))
    for found, expected in zip(
        mode_roots(diagonal, (3, 4), (5,))[:2], mode_roots(whole, (3, 4), (5,))[:2], strict=True
    ):
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left.root, right.root)


def test_inputs_that_never_change_weigh_alike():
    metric = Metric(torch.zeros(2, 6, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))
    roots = mode_roots(metric, (3, 2), (4,))
    assert roots.scale.tolist() == [0, 0]
    assert all(
        torch.equal(root.root, torch.eye(root.root.shape[1]).double().expand(2, -1, -1)) for root in roots.inputs
    )


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_under_a_product_metric_one_bond_has_a_closed_form(rank):
    """With two cores of (output, input) each: the truncated SVD of the weighted and rearranged weight, by numpy."""
    outputs, inputs = (2, 3), (4, 3)
    metric = product_metric(inputs, outputs)
    weight = random_tensor((6, 12))
    roots = mode_roots(metric, inputs, outputs)
    of_cores = [[type(r)(r.root[0], r.inverse[0]) for r in (roots.outputs[k], roots.inputs[k])] for k in range(2)]
    tensor = weight.reshape(*outputs, *inputs).permute(0, 2, 1, 3)
    cores = weighted_tensor_train(tensor, of_cores, (rank,))
    approximation = tt_tensor(cores).reshape(2, 4, 3, 3).permute(0, 2, 1, 3).reshape(6, 12)
    L_out, L_in = (np.linalg.cholesky(matrix[0].numpy()) for matrix in (metric.curvature, metric.covariance))
    weighted = (L_out.T @ weight.numpy() @ L_in).reshape(2, 3, 4, 3).transpose(0, 2, 1, 3).reshape(8, 9)
    # Factors of the Kronecker products are triangular themselves, so that rearranging commutes with weighting.
    expected = float((np.linalg.svd(weighted, compute_uv=False)[rank:] ** 2).sum())
    assert metric.error(weight - approximation) == pytest.approx(expected, rel=1e-5)


@pytest.mark.cuda
def test_on_a_gpu(device):
    tensor = random_tensor((6, 3, 4, 8), dtype=torch.float32)
    on_gpu, on_cpu = tensor_train(tensor.to(device), (3, 5, 4)), tensor_train(tensor, (3, 5, 4))
    assert all(core.device == device for core in on_gpu)
    torch.testing.assert_close(tt_tensor(on_gpu).cpu(), tt_tensor(on_cpu), rtol=0, atol=1e-3)
    errors = tensor_train_errors(tensor.to(device), [[1, 3], [2], [1, 4]])
    torch.testing.assert_close(errors.cpu(), tensor_train_errors(tensor, [[1, 3], [2], [1, 4]]), rtol=1e-4, atol=0)
