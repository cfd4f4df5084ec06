"""Gram matrices and the bases found through them, against dense numpy in float64."""

import numpy as np
import pytest
import torch

from lowrank_nn.decompose._gram import gram, improved_left_vectors, leading_left_vectors, whole_gram


def matrix_of(spectrum, columns, *, seed=0):
    """Return a matrix of the given singular values, and its left singular vectors."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(spectrum))))[0]
    return torch.from_numpy(left * spectrum @ right.T), torch.from_numpy(left)


@pytest.mark.parametrize("rows", [1, 100, 128, 129, 300])
def test_products_of_blocks(rows):
    matrix = torch.randn(rows, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    expected = matrix.numpy() @ matrix.numpy().T
    np.testing.assert_allclose(gram(matrix, torch.float64).tril().numpy(), np.tril(expected), atol=1e-12)
    np.testing.assert_allclose(whole_gram(matrix, torch.float64).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(whole_gram(matrix.float(), torch.float64).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_leading_vectors_and_their_energy(exact):
    spectrum = np.geomspace(1, 1e-2, 12)
    matrix, left = matrix_of(spectrum, 40)
    basis, kept = leading_left_vectors(matrix, 5, exact=exact)
    torch.testing.assert_close(basis @ basis.T, left[:, :5] @ left[:, :5].T)
    assert kept == pytest.approx((spectrum[:5] ** 2).sum(), rel=1e-12)


def test_improvement_never_loses_energy_and_converges():
    spectrum = np.linspace(1, 0.2, 30)
    matrix, left = matrix_of(spectrum, 90)
    basis = torch.linalg.qr(torch.randn(30, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    kept = [float((basis.T @ matrix).square().sum())]
    for _ in range(150):
        basis, energy = improved_left_vectors(matrix, basis)
        assert energy == pytest.approx(float((basis.T @ matrix).square().sum()), rel=1e-12)
        kept.append(energy)
    assert np.all(np.diff(kept) >= -1e-12)
    torch.testing.assert_close(basis @ basis.T, left[:, :10] @ left[:, :10].T)


def test_improvement_keeps_weak_directions_in_float32():
    # The singular values kept span a factor of 100, the eigenvalues of their Gram matrix one of 10^4.
    spectrum = np.concatenate([np.geomspace(1, 1e-2, 8), np.full(8, 1e-3)])
    matrix, left = matrix_of(spectrum, 60)
    near = torch.linalg.qr(
        left[:, :8] + 0.03 * torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ).Q
    basis, _ = improved_left_vectors(matrix.float(), near.float())
    outside = left[:, 8:].T @ basis.double()
    assert float(outside.abs().max()) < 2e-3
