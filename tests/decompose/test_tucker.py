"""Tucker-2 against tensorly and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker

from lowrank_nn.decompose import tucker2, tucker2_errors


def random_tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained_like(channels, *, seed=0):
    scale = torch.arange(1, channels + 1, dtype=torch.float64) ** -0.5
    tensor = random_tensor(channels, channels, 3, 3, seed=seed)
    return rotate(
        tensor * scale[:, None, None, None] * scale[:, None, None],
        torch.linalg.qr(random_tensor(channels, channels, seed=seed + 1)).Q,
        torch.linalg.qr(random_tensor(channels, channels, seed=seed + 2)).Q,
    )


def rotate(core, out_factor, in_factor):
    """Multiply both channel modes by matrices, in float64, one axis at a time."""
    result = core.double()
    if out_factor is not None:
        result = torch.tensordot(out_factor.double(), result, dims=([1], [0]))
    if in_factor is not None:
        result = torch.tensordot(in_factor.double(), result, dims=([1], [1])).transpose(0, 1)
    return result


def squared_error(factors, kernel):
    return float((rotate(*factors) - kernel.double()).square().sum())


@pytest.mark.parametrize("spatial", [(), (1,), (3, 3), (2, 3, 2)])
@settings(max_examples=25, deadline=None)
@given(data=st.data(), out_channels=st.integers(1, 12), in_channels=st.integers(1, 12))
def test_shapes_orthonormality_and_energy(spatial, data, out_channels, in_channels):
    r_out = data.draw(st.none() | st.integers(1, out_channels))
    r_in = data.draw(st.none() | st.integers(1, in_channels))
    kernel = random_tensor(out_channels, in_channels, *spatial)
    core, out_factor, in_factor = tucker2(kernel, (r_out, r_in))
    assert core.shape == (r_out or out_channels, r_in or in_channels, *spatial)
    for factor, rank, size in ((out_factor, r_out, out_channels), (in_factor, r_in, in_channels)):
        if rank is None:
            assert factor is None
        else:
            assert factor.shape == (size, rank)
            torch.testing.assert_close(factor.T @ factor, torch.eye(rank, dtype=torch.float64))
    total = float(kernel.square().sum())
    error = squared_error((core, out_factor, in_factor), kernel)
    assert abs(error - (total - float(core.square().sum()))) < 1e-10 * total
    table = tucker2_errors(kernel)
    best_known = float(table[(r_out or out_channels) - 1, (r_in or in_channels) - 1])
    assert error <= best_known * (1 + 1e-9) + 1e-12 * total


@pytest.mark.parametrize("rank", [(16, 16), (8, 20), (30, 4)])
def test_error_no_worse_than_tensorly(rank):
    kernel = trained_like(32).float()
    (core, factors), _ = partial_tucker(kernel.numpy(), rank=list(rank), modes=[0, 1])
    reference = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    expected = float(np.square(reference - kernel.numpy()).sum(dtype=np.float64))
    assert squared_error(tucker2(kernel, rank), kernel) <= expected * 1.0002
    assert squared_error(tucker2(kernel, rank, sweeps=12, tolerance=0), kernel) <= expected * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweeps_go_on_until_they_gain_nothing(dtype):
    # Noise has no spectrum to speak of: here HOOI converges slowly.
    kernel = random_tensor(24, 24, 3, 3, dtype=dtype)
    converged = squared_error(tucker2(kernel, (10, 10), sweeps=300, tolerance=0), kernel)
    default = squared_error(tucker2(kernel, (10, 10)), kernel)
    assert default <= converged * (1 + 5e-3)
    assert default < squared_error(tucker2(kernel, (10, 10), sweeps=3), kernel)
    assert squared_error(tucker2(kernel, (10, 10), tolerance=1e-2), kernel) > default


def test_sweeps_lower_the_error():
    kernel = random_tensor(20, 20, 3, 3)
    errors = [squared_error(tucker2(kernel, (8, 8), sweeps=sweeps, tolerance=0), kernel) for sweeps in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] * 0.999


@pytest.mark.parametrize(("rank", "mode"), [((5, None), 0), ((None, 5), 1)])
def test_one_mode_is_the_svd_of_its_unfolding(rank, mode):
    kernel = random_tensor(12, 9, 3, 3, dtype=torch.float32)
    values = np.linalg.svd(kernel.movedim(mode, 0).flatten(1).double().numpy(), compute_uv=False)
    assert squared_error(tucker2(kernel, rank), kernel) == pytest.approx(np.square(values[5:]).sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "bound", "decay"),
    [(torch.float32, 1e-6, 0), (torch.float32, 1e-6, 5), (torch.float64, 1e-12, 0), (torch.float64, 1e-12, 9)],
)
def test_low_rank_kernels_are_recovered(dtype, bound, decay):
    # The decay is beyond what a Gram matrix of the kernel's own type resolves.
    core = random_tensor(6, 5, 3, 3) * torch.logspace(0, -decay, 6, dtype=torch.float64)[:, None, None, None]
    kernel = rotate(core, random_tensor(24, 6, seed=1), random_tensor(20, 5, seed=2)).to(dtype)
    error = squared_error(tucker2(kernel, (6, 5)), kernel) / float(kernel.double().square().sum())
    assert error**0.5 < bound


@pytest.mark.parametrize("rank", [(12, 9), (12, None), (None, 9), (None, None)])
def test_full_rank_is_exact_and_shares_no_memory(rank):
    kernel = random_tensor(12, 9, 3, 3)
    factors = tucker2(kernel, rank)
    assert squared_error(factors, kernel) == 0.0
    assert factors.core.data_ptr() != kernel.data_ptr()


def test_ranks_beyond_what_the_other_mode_supports():
    # With one input direction and one tap the output mode has rank one at most.
    kernel = random_tensor(6, 4, 1, 1)
    factors = tucker2(kernel, (5, 1))
    values = np.linalg.svd(kernel[:, :, 0, 0].numpy(), compute_uv=False)
    assert squared_error(factors, kernel) == pytest.approx(np.square(values[1:]).sum(), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(out_channels=st.integers(1, 6), in_channels=st.integers(1, 6), points=st.integers(1, 4))
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_error_table_against_brute_force(dtype, slack, out_channels, in_channels, points):
    kernel = random_tensor(out_channels, in_channels, points, seed=points, dtype=dtype)
    X = kernel.double().numpy()
    U = np.linalg.svd(X.reshape(out_channels, -1), full_matrices=True)[0]
    V = np.linalg.svd(X.transpose(1, 0, 2).reshape(in_channels, -1), full_matrices=True)[0]
    table = tucker2_errors(kernel)
    assert table.shape == (out_channels, in_channels)
    assert table.dtype == torch.float64
    total = np.square(X).sum()
    for a in range(1, out_channels + 1):
        for b in range(1, in_channels + 1):
            P, Q = U[:, :a] @ U[:, :a].T, V[:, :b] @ V[:, :b].T
            expected = np.square(X - np.einsum("op,iq,pqk->oik", P, Q, X)).sum()
            # Bases of vanishing directions are arbitrary; ranks beyond the mode's own rank leave nothing there.
            if a <= in_channels * points and b <= out_channels * points:
                assert abs(float(table[a - 1, b - 1]) - expected) <= slack * total


def test_scale_and_half_precision():
    kernel = random_tensor(10, 8, 3, 3, dtype=torch.float32)
    relative = squared_error(tucker2(kernel, (4, 4)), kernel) / float(kernel.double().square().sum())
    for scale in (2.0**-60, 2.0**60):
        scaled = kernel * scale
        error = squared_error(tucker2(scaled, (4, 4)), scaled) / float(scaled.double().square().sum())
        assert error == pytest.approx(relative, rel=1e-5)
    half = tucker2(kernel.bfloat16(), (4, 4))
    assert half.core.dtype == half.in_factor.dtype == torch.bfloat16
    error = squared_error(half, kernel.bfloat16()) / float(kernel.double().square().sum())
    assert error == pytest.approx(relative, rel=0.02)


def test_same_bits_twice_and_memory_format_does_not_matter():
    kernel = random_tensor(10, 8, 3, 3, dtype=torch.float32)
    first = tucker2(kernel, (4, 3))
    second = tucker2(kernel.contiguous(memory_format=torch.channels_last), (4, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_zero_kernel():
    factors = tucker2(torch.zeros(4, 5, 3, 3), (2, 2))
    assert not factors.core.any()
    assert factors.out_factor.isfinite().all()
    assert not tucker2_errors(torch.zeros(4, 5, 3, 3)).any()


def test_meta_tensors_give_shapes():
    kernel = torch.empty(64, 32, 3, 3, device="meta", dtype=torch.float16)
    core, out_factor, in_factor = tucker2(kernel, (16, 8))
    assert (core.shape, out_factor.shape, in_factor.shape) == ((16, 8, 3, 3), (64, 16), (32, 8))
    assert core.is_meta
    assert tucker2(kernel, (None, 8)).out_factor is None
    assert tucker2_errors(kernel).shape == (64, 32)


@pytest.mark.cuda
def test_cuda(device):
    kernel = trained_like(32).float()
    expected = squared_error(tucker2(kernel, (12, 16)), kernel)
    core, out_factor, in_factor = tucker2(kernel.to(device), (12, 16))
    assert core.device == device
    assert squared_error((core.cpu(), out_factor.cpu(), in_factor.cpu()), kernel) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(tucker2_errors(kernel.to(device)).cpu(), tucker2_errors(kernel), rtol=1e-4, atol=1e-6)
