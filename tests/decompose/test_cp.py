"""CP: closed form, alternating least squares, error-preserving correction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac

from lowrank_nn.decompose import cp, cp_als, cp_epc, cp_full_rank, cp_sensitivity, cp_tensor


def random_tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_factors(shape, rank, *, seed=0):
    return [random_tensor(size, rank, seed=seed + mode) for mode, size in enumerate(shape)]


def rebuild(factors):
    """Sum the rank-one terms one by one, by outer products."""
    total = 0.0
    for r in range(factors[0].shape[1]):
        term = factors[0][:, r].double()
        for factor in factors[1:]:
            term = torch.tensordot(term, factor[:, r].double(), dims=0)
        total = total + term
    return total


def relative_error(factors, tensor):
    return float((rebuild(factors) - tensor.double()).norm() / tensor.double().norm())


def border_rank_two(*, noise=0.0):
    """A rank-3 tensor that rank-2 tensors approach without end, their two terms growing against each other."""
    bases = [torch.linalg.qr(random_tensor(12, 2, seed=mode)).Q for mode in range(3)]
    tensor = torch.zeros(12, 12, 12, dtype=torch.float64)
    for mode in range(3):
        a, b, c = (basis[:, int(other == mode)] for other, basis in enumerate(bases))
        tensor += torch.einsum("i,j,k->ijk", a, b, c)
    return tensor + noise * random_tensor(12, 12, 12, seed=9)


SHAPES = [(20, 16, 9), (12, 10, 3, 3), (8, 9), (1, 7, 9), (5, 4, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_sums_rank_one_terms(shape):
    factors = random_factors(shape, 4)
    torch.testing.assert_close(cp_tensor(factors), rebuild(factors))
    expected = tensorly.cp_to_tensor((None, [factor.numpy() for factor in factors]))
    np.testing.assert_allclose(cp_tensor(factors).numpy(), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), extra=st.integers(0, 3))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_full_rank_is_exact(dtype, bound, shape, extra):
    tensor = random_tensor(*shape, seed=sum(shape), dtype=dtype)
    rank = cp_full_rank(shape) + extra
    factors = cp(tensor, rank)
    assert [tuple(factor.shape) for factor in factors] == [(size, rank) for size in shape]
    assert relative_error(factors, tensor) < bound


def test_full_rank_of_kernels():
    assert cp_full_rank((64, 32, 9)) == cp_full_rank((64, 32, 3, 3)) == 32 * 9
    assert cp_full_rank((8, 20)) == 8


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_closed_form_below_full_rank_where_the_tensor_allows(dtype, bound):
    # Two kernel taps carry everything, their slices are orthogonal and of rank 3: six terms hold the tensor.
    taps = torch.linalg.qr(random_tensor(9, 2, seed=3)).Q
    slices = torch.stack([random_tensor(12, 3, seed=k) @ random_tensor(3, 10, seed=k + 5) for k in range(2)])
    slices[0, :6], slices[1, 6:] = 0, 0
    tensor = torch.einsum("qoi,pq->oip", slices, taps).to(dtype)
    assert relative_error(cp(tensor, 6), tensor) < bound


@pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs:UserWarning")
@pytest.mark.parametrize(("shape", "rank"), [((24, 20, 9), 12), ((16, 12, 3, 3), 8), ((9, 30, 9), 40)])
def test_error_no_worse_than_tensorly(shape, rank):
    tensor = random_tensor(*shape, dtype=torch.float32)
    tensor *= torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) ** -0.5
    start = parafac(tensor.numpy().astype(np.float64), rank=rank, n_iter_max=50, init="svd", tol=0, random_state=0)
    expected = np.linalg.norm(tensorly.cp_to_tensor(start) - tensor.numpy()) / float(tensor.norm())
    assert relative_error(cp_als(tensor, rank), tensor) < expected * 1.02


@pytest.mark.parametrize("shape", SHAPES)
def test_more_sweeps_never_raise_the_error(shape):
    tensor = random_tensor(*shape)
    errors = [relative_error(cp_als(tensor, 3, sweeps=sweeps), tensor) for sweeps in (0, 1, 2, 5, 30)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    if len(shape) > 2 and min(shape) > 1:
        assert errors[-1] < errors[0]


def test_first_terms_of_a_larger_start_are_the_start():
    tensor = random_tensor(14, 12, 9)
    shared = [factor[:, :5] for factor in cp_als(tensor, 20, sweeps=0)]
    for given_start, own_start in zip(cp_als(tensor, 5, start=shared), cp_als(tensor, 5), strict=True):
        torch.testing.assert_close(given_start, own_start)


def test_low_rank_tensor_with_separate_terms_is_found():
    factors = [torch.linalg.qr(random_tensor(size, 5, seed=size)).Q for size in (15, 12, 9)]
    tensor = rebuild(factors)
    assert relative_error(cp_als(tensor, 5, sweeps=500), tensor) < 1e-3


def test_sensitivity_against_monte_carlo():
    factors = random_factors((6, 5, 4), 3)
    generator = torch.Generator().manual_seed(1)
    scale, exact, draws = 1e-4, cp_tensor(factors), []
    for _ in range(3000):
        noisy = [f + scale * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in factors]
        draws.append(float((cp_tensor(noisy) - exact).square().sum()) / scale**2)
    assert cp_sensitivity(factors) == pytest.approx(np.mean(draws), rel=0.03)


def test_sensitivity_of_three_modes_by_its_published_formula():
    A, B, C = random_factors((6, 5, 4), 3)
    expected = sum(
        size * torch.trace((left.T @ left) * (right.T @ right))
        for size, left, right in ((4, A, B), (6, B, C), (5, A, C))
    )
    assert cp_sensitivity([A, B, C]) == pytest.approx(float(expected))


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_alternating_least_squares_diverges_on_a_degenerate_tensor_and_the_correction_bounds_it(noise):
    tensor = border_rank_two(noise=noise)
    runs = [cp_als(tensor, 2, sweeps=sweeps) for sweeps in (5, 20, 50, 200)]
    errors = [relative_error(factors, tensor) for factors in runs]
    sensitivities = [cp_sensitivity(factors) for factors in runs]
    norms = [float(factors[0].norm()) for factors in runs]
    assert errors == sorted(errors, reverse=True)
    assert sensitivities == sorted(sensitivities)
    assert norms == sorted(norms)
    assert sensitivities[-1] > 2 * sensitivities[0]
    previous = sensitivities[-1]
    for tolerance in (1.05, 1.1, 1.5):
        corrected = cp_epc(tensor, runs[-1], tolerance=tolerance, sweeps=200)
        assert relative_error(corrected, tensor) <= tolerance * errors[-1] * (1 + 1e-9)
        assert cp_sensitivity(corrected) < previous
        previous = cp_sensitivity(corrected)
    assert previous < 0.8 * sensitivities[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_correction_keeps_the_bound_and_lowers_the_sensitivity(shape, dtype):
    tensor = random_tensor(*shape, dtype=dtype)
    factors = cp_als(tensor, 3)
    corrected = cp_epc(tensor, factors)
    assert [f.shape for f in corrected] == [f.shape for f in factors]
    assert corrected[0].dtype == dtype
    assert relative_error(corrected, tensor) <= 1.05 * relative_error(factors, tensor) * (1 + 1e-6)
    assert cp_sensitivity(corrected) < cp_sensitivity(factors)


def test_correction_finds_the_least_sensitivity():
    # One term: error bound and optimum are known in closed form, the term shrinks until the bound is met.
    a, b, c = (torch.nn.functional.normalize(random_tensor(n, seed=n), dim=0) for n in (6, 5, 4))
    noise = random_tensor(6, 5, 4, seed=1)
    signal = torch.einsum("i,j,k->ijk", a, b, c)
    noise -= torch.einsum("ijk,i,j,k->", noise, a, b, c) * signal
    tensor = 20 * signal + 1e-3 * noise
    factors = cp_als(tensor, 1)
    error = (rebuild(factors) - tensor).norm()
    corrected = cp_epc(tensor, factors, tolerance=3.0, sweeps=200)
    shrunk = float(rebuild(factors).norm()) - math.sqrt(8) * float(error)
    expected = (6 + 5 + 4) * shrunk ** (4 / 3)
    assert cp_sensitivity(corrected) == pytest.approx(expected, rel=1e-6)


def test_poor_fits_are_not_traded_for_zero():
    tensor = random_tensor(20, 16, 9)
    factors = cp_als(tensor, 1)
    assert relative_error(factors, tensor) * 1.05 > 1
    corrected = cp_epc(tensor, factors)
    explained = 1 - relative_error(corrected, tensor) ** 2
    assert explained > 0.85 * (1 - relative_error(factors, tensor) ** 2)


def test_exact_factors_are_left_alone():
    factors = random_factors((6, 5, 4), 2)
    corrected = cp_epc(rebuild(factors), factors)
    torch.testing.assert_close(rebuild(corrected), rebuild(factors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 16, 9), (12, 10, 3, 3)])
def test_norms_are_balanced_and_epc_can_be_switched_off(shape):
    tensor = random_tensor(*shape)
    for factors in (cp(tensor, 6), cp(tensor, 6, epc=False), cp_als(tensor, 6, sweeps=0)):
        norms = torch.stack([factor.norm(dim=0) for factor in factors])
        torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    plain, als = cp(tensor, 6, epc=False), cp_als(tensor, 6)
    assert all(torch.equal(a, b) for a, b in zip(plain, als, strict=True))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_invariance(scale):
    tensor = random_tensor(14, 12, 9, dtype=torch.float32)
    assert relative_error(cp(tensor * scale, 8), tensor * scale) == pytest.approx(
        relative_error(cp(tensor, 8), tensor), rel=1e-3
    )


def test_dead_channels_and_zero_tensors():
    tensor = random_tensor(10, 8, 3, 3, dtype=torch.float32)
    tensor[3], tensor[:, 2] = 0, 0
    for factors in (cp(tensor, 12), cp(tensor.flatten(2), 70)):
        assert all(factor.isfinite().all() for factor in factors)
        assert rebuild(factors)[3].norm() < 1e-5
    assert not any(factor.any() for factor in cp(torch.zeros(4, 5, 9), 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    tensor = random_tensor(14, 12, 9)
    factors = cp(tensor.to(dtype), 8)
    assert all(factor.dtype == dtype for factor in factors)
    assert relative_error(factors, tensor) == pytest.approx(relative_error(cp(tensor, 8), tensor), rel=0.01)


def test_same_bits_twice_and_no_side_effects():
    tensor = random_tensor(14, 12, 9, dtype=torch.float32).requires_grad_()
    state, copy = torch.get_rng_state(), tensor.detach().clone()
    first, second = cp(tensor, 7), cp(tensor, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tensor, copy)


def test_meta_tensors_give_shapes():
    kernel = torch.empty(64, 32, 3, 3, device="meta", dtype=torch.bfloat16)
    for factors in (cp(kernel, 10), cp_als(kernel, 10)):
        assert [tuple(f.shape) for f in factors] == [(64, 10), (32, 10), (3, 10), (3, 10)]
        assert all(f.is_meta and f.dtype == torch.bfloat16 for f in factors)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(20, 16, 9), (12, 10, 3, 3)])
def test_cuda(shape, device):
    tensor = random_tensor(*shape, dtype=torch.float32)
    factors = [factor.cpu() for factor in cp(tensor.to(device), 6)]
    assert relative_error(factors, tensor) == pytest.approx(relative_error(cp(tensor, 6), tensor), rel=1e-3)
