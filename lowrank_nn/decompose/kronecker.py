"""Sums of Kronecker products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_nn.decompose.svd import truncated_svd


def rearranged(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    r"""Return the matrix whose rank is the number of Kronecker products that sum to a weight.

    With o = o1 O2 + o2 and i = i1 I2 + i2, entry (o1 I1 + i1, (o2 I2 + i2) K + t) is W[o, i, t]: each row holds one
    block of the weight, so that A (x) B is the outer product of vec A and vec B.

    Args:
        weight: Shape (O, I, \*taps).
        shape: (O1, I1), which divide O and I.

    Returns:
        Shape (O1 I1, O2 I2 K), K the number of taps.

    References:
        Van Loan, Pitsianis 1993, "Approximation with Kronecker Products".
    """
    out, inn = shape
    blocks = weight.reshape(out, weight.shape[0] // out, inn, weight.shape[1] // inn, -1)
    return blocks.transpose(1, 2).reshape(out * inn, -1)


def kronecker(weight: Tensor, rank: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    r"""Return the sum of Kronecker products that is nearest to a weight in Frobenius norm.

    .. math:: W[o_1 O_2 + o_2, i_1 I_2 + i_2, t] \approx \sum_{r=1}^R A_r[o_1, i_1] B_r[o_2, i_2, t]

    which for a matrix is W = sum_r A_r (x) B_r. By the truncated SVD of the :func:`rearranged` weight, hence the
    optimum; the A_r are orthogonal to each other, the B_r too, and ||A_r|| = ||B_r||.

    Args:
        weight: Shape (O, I, \*taps), any floating dtype.
        rank: R, from 1 to min(O1 I1, O2 I2 K), K the number of taps.
        shape: (O1, I1), which divide O and I.

    Returns:
        A of shape (R, O1, I1) and B of shape (R, O2, I2, K), in the dtype of ``weight``.

    References:
        Van Loan, Pitsianis 1993, "Approximation with Kronecker Products"; Hameed et al. 2022, "Convolutional Neural
        Network Compression through Generalized Kronecker Product Decomposition".
    """
    left, right = truncated_svd(rearranged(weight, shape), rank)
    out, inn = weight.shape[0] // shape[0], weight.shape[1] // shape[1]
    return left.T.reshape(rank, *shape), right.reshape(rank, out, inn, -1)


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    r"""Return the weight that pairs of factors stand for; differentiable.

    Args:
        A: Shape (\*, R, O1, I1).
        B: Shape (\*, R, O2, I2, K).

    Returns:
        Shape (\*, O1 O2, I1 I2, K).
    """
    return torch.einsum("...rab,...rcdt->...acbdt", A, B).flatten(-5, -4).flatten(-3, -2)


def balanced_shape(out: int, inn: int, taps: int = 1) -> tuple[int, int]:
    """Return the shape (O1, I1) of A at which A and B together have the fewest entries: both are about equally large.

    Of several such shapes a convolution takes that with the largest O1: B gives R O2 channels for each of I1 slices of
    the input, so that a small O2 is cheap. With a single tap that would be the SVD, A a column and B a row: there it is
    the shape at which A (x) B may have the largest rank, then the largest O1.

    Args:
        out: O.
        inn: I.
        taps: Entries of B for each pair of channels.
    """

    def preference(shape: tuple[int, int]) -> tuple[int, int, int]:
        first, rest = shape, (out // shape[0], inn // shape[1])
        entries = math.prod(first) + math.prod(rest) * taps
        return entries, -min(first) * min(rest) if taps == 1 else 0, -first[0]

    return min(((o, i) for o in divisors(out) for i in divisors(inn)), key=preference)


def divisors(number: int) -> list[int]:
    """Return the divisors of a whole number from 1 up, in ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
