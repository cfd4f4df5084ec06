"""The counter of operations, on those that torch's own does not know."""

import math

import pytest
import torch

from lowrank_nn.cost.flops import FlopCounter


def counted(function, *tensors):
    with FlopCounter() as counter:
        function(*tensors)
    return counter.flops


def test_a_product_of_complex_numbers_is_four_real_ones():
    left, right = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    real = counted(torch.bmm, left, right)
    assert real == 2 * 3 * 4 * 5 * 6
    assert counted(torch.bmm, left.to(torch.complex64), right.to(torch.complex64)) == 4 * real


@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 12), (5, 1)])
def test_transforms_of_real_numbers_are_half_of_complex_ones(shape):
    size = shape[-1]
    expected = math.prod(shape) * 2.5 * math.log2(size)
    x = torch.randn(shape)
    assert counted(torch.fft.rfft, x) == pytest.approx(expected, rel=0.02)
    assert counted(lambda x: torch.fft.irfft(x, n=size), torch.fft.rfft(x)) == pytest.approx(expected, rel=0.02)
    assert counted(torch.fft.fft, x.to(torch.complex64)) == pytest.approx(2 * expected, rel=0.02)


def test_transforms_of_several_dims_are_one_of_all_numbers():
    assert counted(torch.fft.rfft2, torch.randn(3, 8, 8)) == pytest.approx(3 * 64 * 2.5 * 6)
