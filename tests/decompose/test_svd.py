"""Truncated SVD and singular values, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_nn.decompose import singular_values, svd, truncated_svd


def random_matrix(rows, columns, *, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank_matrix(rows, columns, spectrum, *, dtype):
    U = torch.linalg.qr(random_matrix(rows, len(spectrum), seed=1)).Q
    V = torch.linalg.qr(random_matrix(columns, len(spectrum), seed=2)).Q
    return ((U * torch.as_tensor(spectrum, dtype=torch.float64)) @ V.T).to(dtype)


def relative_error(approximation, target):
    return float((approximation.double() - target.double()).norm() / target.double().norm())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), data=st.data())
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_error_is_the_tail_of_the_spectrum(dtype, slack, rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = random_matrix(rows, columns, seed=rows * 31 + columns, dtype=dtype)
    left, right = truncated_svd(matrix, rank)
    assert left.shape == (rows, rank)
    assert right.shape == (rank, columns)
    assert left.dtype == right.dtype == dtype
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    expected = np.sqrt(np.square(values[rank:]).sum())
    error = float((matrix.double() - left.double() @ right.double()).norm())
    assert abs(error - expected) <= slack * np.linalg.norm(values)


def test_factors_are_balanced():
    matrix = random_matrix(12, 20, dtype=torch.float32)
    left, right = truncated_svd(matrix, 5)
    values = torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False)[:5].copy())
    torch.testing.assert_close(left.norm(dim=0), values.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(right.norm(dim=1), values.sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_low_rank_matrices_are_recovered(shape, dtype, bound):
    # float32 Gram matrices lose the directions under 3e-4 of the largest; float64 ones those under 1e-8.
    matrix = low_rank_matrix(*shape, np.logspace(0, -5 if dtype == torch.float32 else -11, 12), dtype=dtype)
    left, right = truncated_svd(matrix, 12)
    assert relative_error(left @ right, matrix) < bound


def test_large_matrices_by_subspace_iteration(monkeypatch):
    monkeypatch.setattr(svd, "_EXACT_LIMIT", 100)
    matrix = low_rank_matrix(160, 300, np.arange(1, 161) ** -0.5, dtype=torch.float32)
    left, right = truncated_svd(matrix, 40)
    best = np.linalg.norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[40:])
    assert float((matrix.double() - left.double() @ right.double()).norm()) <= 1.002 * best
    exact = low_rank_matrix(160, 300, np.logspace(0, -5, 30), dtype=torch.float32)
    left, right = truncated_svd(exact, 30)
    assert relative_error(left.double() @ right.double(), exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    matrix = random_matrix(20, 30).to(dtype)
    left, right = truncated_svd(matrix, 20)
    assert left.dtype == dtype
    assert relative_error(left.double() @ right.double(), matrix) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(25, 60), (60, 25), (1, 7), (7, 1)])
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-7), (torch.float64, 1e-14)])
def test_singular_values(shape, dtype, slack):
    matrix = random_matrix(*shape, dtype=dtype)
    values = singular_values(matrix)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=slack * expected[0])


def test_singular_values_tell_the_numerical_rank():
    matrix = low_rank_matrix(50, 200, np.logspace(0, -5, 20), dtype=torch.float32)
    assert int((singular_values(matrix) > 2e-6).sum()) == 20


def test_zero_matrix():
    left, right = truncated_svd(torch.zeros(4, 6), 2)
    assert not left.any()
    assert not right.any()
    assert not singular_values(torch.zeros(4, 6)).any()


def test_same_bits_twice_and_no_side_effects():
    matrix = random_matrix(30, 50, dtype=torch.float32).requires_grad_()
    state, copy = torch.get_rng_state(), matrix.detach().clone()
    first, second = truncated_svd(matrix, 6), truncated_svd(matrix, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(matrix, copy)
    assert not first[0].requires_grad


def test_meta_tensors_give_shapes():
    left, right = truncated_svd(torch.empty(5000, 90, device="meta", dtype=torch.bfloat16), 4)
    assert (left.shape, right.shape) == ((5000, 4), (4, 90))
    assert left.is_meta
    assert left.dtype == torch.bfloat16
    assert singular_values(torch.empty(50, 90, device="meta")).shape == (50,)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_cuda(dtype, bound, device):
    matrix = low_rank_matrix(40, 90, np.logspace(0, -4, 12), dtype=dtype).to(device)
    left, right = truncated_svd(matrix, 12)
    assert left.device == device
    assert relative_error(left.double() @ right.double(), matrix) < bound
