import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.layers._affine import (
    accumulator_dtype,
    affine_parameters,
    dequantize,
    fake_quantize,
    integer_product,
    quantize,
    round_through,
    signed_grid,
    symmetric_grid,
    symmetric_scale,
    to_grid,
    unsigned_grid,
)

BITS = st.integers(2, 8)
GRIDS = {2: [(-1, 1), (-2, 1), (0, 3)], 8: [(-127, 127), (-128, 127), (0, 255)]}


@pytest.mark.parametrize("bits", [2, 8])
def test_grids(bits):
    assert [symmetric_grid(bits), signed_grid(bits), unsigned_grid(bits)] == GRIDS[bits]


def values(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@given(BITS, st.integers(0, 999), st.floats(-18, 18))
def test_symmetric_quantization_is_the_formula_and_errs_by_at_most_half_a_step(bits, seed, exponent):
    w = values(seed, 5, 7, scale=10.0**exponent)
    top = 2 ** (bits - 1) - 1
    scale = symmetric_scale(w, bits)
    expected_scale = np.abs(w.numpy()).max(1) / top
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-12)
    zero = torch.zeros((), dtype=torch.int32)
    codes = quantize(w, scale[:, None], zero, symmetric_grid(bits), torch.int8)
    np.testing.assert_array_equal(codes.numpy(), np.round(w.numpy() / scale.numpy()[:, None]))
    error = (dequantize(codes, scale[:, None], zero) - w).abs()
    assert bool((error <= scale[:, None] / 2 * (1 + 1e-9)).all())


@given(BITS, st.integers(0, 999), st.floats(-9, 9), st.floats(-18, 18))
def test_affine_quantization_errs_by_at_most_half_a_step(bits, seed, shift, exponent):
    x = (values(seed, 40) + shift) * 10.0**exponent
    grid = unsigned_grid(bits)
    scale, zero = affine_parameters(x.min(), x.max(), grid, x.dtype)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    assert float(scale) == pytest.approx((high - low) / (2**bits - 1), rel=1e-12)
    assert grid.low <= int(zero) <= grid.high
    codes = quantize(x, scale, zero, grid, torch.uint8)
    # The form of the literature, with min moved onto the multiple of the scale that the zero point stands for.
    moved = -int(zero) * float(scale)
    np.testing.assert_array_equal(
        codes.numpy(), np.clip(np.round((x.numpy() - moved) / float(scale)), grid.low, grid.high)
    )
    error = (dequantize(codes, scale, zero) - x).abs()
    assert float(error.max()) <= float(scale) / 2 * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_affine_quantization_is_the_formula_of_the_literature_where_zero_is_on_the_grid(bits):
    levels = 2**bits - 1
    low, high = -1.0 * (levels // 3), levels - 1.0 * (levels // 3)  # scale 1, -low is whole, no p is half-way
    p = torch.linspace(low, high, 302, dtype=torch.float64)
    scale, zero = affine_parameters(p.min(), p.max(), unsigned_grid(bits), p.dtype)
    q = quantize(p, scale, zero, unsigned_grid(bits), torch.uint8)
    np.testing.assert_array_equal(q.numpy(), np.round((p.numpy() - low) * levels / (high - low)))
    # The signed grid holds the same integers, shifted.
    scale, zero = affine_parameters(p.min(), p.max(), signed_grid(bits), p.dtype)
    shifted = quantize(p, scale, zero, signed_grid(bits), torch.int8)
    assert torch.equal(shifted.int() + 2 ** (bits - 1), q.int())


@given(BITS, st.floats(-10, 10), st.floats(-10, 10), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_zero_is_exact_in_every_range(bits, a, b, dtype):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    for grid in (unsigned_grid(bits), signed_grid(bits)):
        scale, zero = affine_parameters(low, high, grid, dtype)
        assert float(fake_quantize(torch.zeros((), dtype=dtype), scale, zero, grid)) == 0


def test_empty_ranges_and_weights_of_zeros_get_the_scale_one():
    zero = torch.zeros(())
    assert [float(t) for t in affine_parameters(zero, zero, unsigned_grid(8), torch.float32)] == [1, 0]
    assert symmetric_scale(torch.zeros(2, 2), 2).tolist() == [1.0, 1.0]


def test_small_channels_get_the_scale_of_one_that_is_smaller_by_two_to_the_twelfth():
    weight = torch.tensor([[0.0, 0.0], [2.0, -1.0], [1e-3, 0.0], [1e-9, 0.0]])
    assert symmetric_scale(weight, 2).tolist() == [2.0**-11, 2.0, pytest.approx(1e-3), 2.0**-11]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peak", [1e-7, 1e-6, 3e-5, 1e-3, 1.0, 1000.0])
def test_scales_of_half_precision_do_not_cut_off_small_channels(dtype, peak):
    weight = torch.tensor([[peak, -peak, peak / 3]], dtype=dtype)
    scale = symmetric_scale(weight, 8)
    assert scale.dtype == dtype
    back = fake_quantize(weight, scale, torch.zeros((), dtype=torch.int32), symmetric_grid(8))
    assert float((back[0, :2].float() / weight[0, :2].float() - 1).abs().max()) < 0.01


def test_rounding_is_to_even_and_exact():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 254.5, -3e-9, 1e30])
    assert torch.equal(round_through(x), torch.round(x))


@given(BITS, st.integers(0, 999), st.booleans())
def test_the_gradient_is_straight_through(bits, seed, symmetric):
    x = values(seed, 60, scale=2.0).requires_grad_()
    grid = symmetric_grid(bits) if symmetric else unsigned_grid(bits)
    scale = torch.tensor(1.0 / grid.high, dtype=torch.float64)
    zero = torch.tensor(0 if symmetric else grid.high // 3, dtype=torch.int32)
    incoming = values(seed + 1, 60)
    (gradient,) = torch.autograd.grad(fake_quantize(x, scale, zero, grid), x, incoming)
    integers = torch.round(x.detach() / scale) + zero
    passes = (integers >= grid.low) & (integers <= grid.high)
    assert bool(passes.any())
    assert not bool(passes.all())
    torch.testing.assert_close(gradient, torch.where(passes, incoming, 0), rtol=1e-12, atol=0)
    assert bool((gradient[~passes] == 0).all())


def test_values_beyond_the_grid_are_clipped_and_infinities_too():
    x = torch.tensor([-math.inf, -5.0, 0.2, 5.0, math.inf])
    one, zero = torch.ones(()), torch.tensor(1, dtype=torch.int32)
    assert to_grid(x, one, zero, unsigned_grid(2)).tolist() == [0, 0, 1, 3, 3]
    assert bool(torch.isnan(to_grid(torch.tensor([math.nan]), one, zero, unsigned_grid(2))).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_quantization_keeps_half_precision_and_rounds_in_float32(dtype):
    x = values(3, 1000).to(dtype)
    scale, zero = affine_parameters(x.min(), x.max(), unsigned_grid(8), dtype)
    y = fake_quantize(x, scale, zero, unsigned_grid(8))
    assert y.dtype == scale.dtype == dtype
    wide = np.clip(np.round(x.float().numpy() / np.float32(float(scale))) + int(zero), 0, 255) - int(zero)
    assert torch.equal(y, torch.from_numpy(wide * np.float32(float(scale))).to(dtype))


@given(BITS, BITS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 60), st.integers(1, 4), st.integers(0, 999))
def test_integer_product_is_the_product_of_centred_integers(x_bits, w_bits, groups, rows, terms, channels, seed):
    rng = np.random.default_rng(seed)
    x_grid, w_grid = unsigned_grid(x_bits), signed_grid(w_bits)
    x = rng.integers(x_grid.low, x_grid.high + 1, (groups, rows, terms))
    w = rng.integers(w_grid.low, w_grid.high + 1, (groups, terms, channels))
    zeros = rng.integers(x_grid.low, x_grid.high + 1), rng.integers(w_grid.low, w_grid.high + 1)
    sums = integer_product(
        torch.from_numpy(x).to(torch.uint8),
        torch.from_numpy(w).to(torch.int8),
        torch.tensor(zeros[0], dtype=torch.int32),
        torch.tensor(zeros[1], dtype=torch.int32),
        torch.int32,
    )
    assert sums.dtype == torch.int32
    np.testing.assert_array_equal(sums.numpy(), (x - zeros[0]).astype(np.float64) @ (w - zeros[1]))


def test_accumulators_are_wide_enough():
    grids = unsigned_grid(8), signed_grid(8)
    assert accumulator_dtype(33025, *grids) == torch.int32
    assert accumulator_dtype(33026, *grids) == torch.int64
    for terms in (33025, 33026):
        x = torch.full((1, 1, terms), 255, dtype=torch.uint8)
        w = torch.full((1, terms, 1), 127, dtype=torch.int8)
        x_zero, w_zero = torch.zeros((), dtype=torch.int32), torch.tensor(-128, dtype=torch.int32)
        assert int(integer_product(x, w, x_zero, w_zero, accumulator_dtype(terms, *grids))) == terms * 255 * 255


@pytest.mark.cuda
def test_integer_product_is_exact_on_cuda(device):
    x = torch.randint(0, 256, (2, 9, 300), dtype=torch.uint8)
    w = torch.randint(-128, 128, (2, 300, 5), dtype=torch.int8)
    zeros = torch.tensor(17, dtype=torch.int32), torch.tensor(-5, dtype=torch.int32)
    expected = integer_product(x, w, *zeros, torch.int32)
    actual = integer_product(x.to(device), w.to(device), *(z.to(device) for z in zeros), torch.int32)
    assert torch.equal(actual.cpu(), expected)
