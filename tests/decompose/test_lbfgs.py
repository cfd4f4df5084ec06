"""Preconditioned L-BFGS."""

import dataclasses

import pytest
import torch

from lowrank_nn.decompose._lbfgs import Curvature, descend


@dataclasses.dataclass
class Evaluated:
    point: torch.Tensor
    value: float
    gradient: torch.Tensor
    inverse: torch.Tensor

    def precondition(self, vector):
        return self.inverse @ vector


def evaluator(function, size, inverse=None, seen=None):
    inverse = torch.eye(size, dtype=torch.float64) if inverse is None else inverse

    def evaluate(point):
        variable = point.clone().requires_grad_()
        value = function(variable)
        (gradient,) = torch.autograd.grad(value, variable)
        if seen is not None:
            seen.append(float(value.detach()))
        return Evaluated(point, float(value.detach()), gradient, inverse)

    return evaluate


def quadratic(size):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = mixing @ torch.logspace(-1, 1, size, dtype=torch.float64).diag() @ mixing.T
    minimum = torch.randn(size, generator=generator, dtype=torch.float64)
    return (lambda x: 1 + 0.5 * (x - minimum) @ hessian @ (x - minimum)), hessian, minimum


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_the_inverse_hessian_as_preconditioner_takes_one_step():
    function, hessian, minimum = quadratic(12)
    evaluate = evaluator(function, 12, torch.linalg.inv(hessian))
    state, alive = descend(evaluate(torch.zeros(12, dtype=torch.float64)), evaluate, Curvature(), 1)
    assert alive
    torch.testing.assert_close(state.point, minimum, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_rough_preconditioner_does_not_change_the_minimum(preconditioned):
    function, hessian, _ = quadratic(12)
    inverse = (1 / hessian.diagonal()).diag() if preconditioned else None
    evaluate = evaluator(function, 12, inverse)
    state, _ = descend(evaluate(torch.zeros(12, dtype=torch.float64)), evaluate, Curvature(), 500)
    assert state.value == pytest.approx(1, abs=1e-5)


def test_rosenbrock_in_pieces_and_the_value_never_rises():
    values = []
    evaluate, curvature = evaluator(rosenbrock, 6), Curvature()
    state, alive = evaluate(torch.full((6,), -1.0, dtype=torch.float64)), True
    while alive:
        state, alive = descend(state, evaluate, curvature, 5)
        values.append(state.value)
    assert values == sorted(values, reverse=True)
    assert state.value < 1e-6


def test_steps_to_where_the_function_has_no_value_are_shortened():
    evaluate = evaluator(lambda x: torch.where((x > 0).all(), (x - x.clamp(min=1e-9).log()).sum(), torch.inf), 3)
    state, _ = descend(evaluate(torch.full((3,), 30.0, dtype=torch.float64)), evaluate, Curvature(), 100)
    torch.testing.assert_close(state.point, torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_at_the_minimum_nothing_is_left_to_do():
    function, _, minimum = quadratic(5)
    evaluate = evaluator(function, 5)
    state, alive = descend(evaluate(minimum), evaluate, Curvature(), 10)
    assert not alive
    assert state.point is minimum
