"""All solutions of a LASSO problem, from the least-squares solution to zero."""

from __future__ import annotations

import torch
from torch import Tensor

_EVENTS = 20
"""Most changes of the active set per coefficient, a guard against cycles of rounding errors."""


def lasso_path(products: Tensor, targets: Tensor) -> Tensor:
    r"""Return for each coefficient the largest lambda with which it is not zero.

    .. math:: \beta(\lambda) = \arg\min_\beta \; \tfrac{1}{2} \beta^T A \beta - b^T \beta + \lambda \| \beta \|_1

    is piecewise linear in lambda. It is followed from lambda = 0, where beta = A^-1 b, up to the lambda where all of it
    is zero: on the active set S with signs s, beta_S = A_SS^-1 (b_S - lambda s). It bends where a coefficient of S
    reaches zero, and where the correlation b_j - A_jS beta_S of another one reaches +-lambda.

    Args:
        products: A, (n, n), positive definite, float64.
        targets: b, (n,).

    References:
        Osborne et al. 2000, "A New Approach to Variable Selection in Least Squares Problems"; Efron et al. 2004, "Least
        Angle Regression".
    """
    scores = torch.zeros_like(targets)
    signs = torch.linalg.solve(products, targets).sign()
    level = targets.new_zeros(())
    for _ in range(_EVENTS * len(targets)):
        active = signs.nonzero()[:, 0]
        if not len(active):
            break
        leaving, entering, new_signs = _bends(products, targets, signs, active)
        if bool(leaving.min() <= entering.min()):
            unit, sign = int(leaving.argmin()), leaving.new_zeros(())
            level = torch.maximum(level, leaving[unit])  # lest a rounding error takes it back
            scores[unit] = level
        else:
            unit = int(entering.argmin())
            sign = new_signs[unit]
            level = torch.maximum(level, entering[unit])
        signs[unit] = sign
    return scores


def _bends(products: Tensor, targets: Tensor, signs: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each coefficient leaves or joins the active set, infinite where it does not, and its new sign."""
    factor = torch.linalg.cholesky(products[active[:, None], active])
    both = torch.stack([targets[active], signs[active]], dim=1)
    start, slope = torch.cholesky_solve(both, factor).unbind(1)  # beta = start - lambda slope
    leaving = torch.full_like(targets, torch.inf)
    leaving[active] = torch.where(slope * signs[active] > 0, start / slope, torch.inf)
    # The correlation of another coefficient is fixed + lambda growth; it outgrows lambda only where it grows faster.
    fixed, growth = targets - products[:, active] @ start, products[:, active] @ slope
    above = torch.where(growth > 1, fixed / (1 - growth), torch.inf)
    below = torch.where(growth < -1, -fixed / (1 + growth), torch.inf)
    entering = torch.minimum(above, below)
    entering[active] = torch.inf
    return leaving, entering, torch.where(growth > 0, 1.0, -1.0).to(targets)
