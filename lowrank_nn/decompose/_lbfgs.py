"""L-BFGS with a preconditioner that follows the iterate."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

_HALVINGS = 6
_SUFFICIENT = 1e-4  # Armijo: least share of the decrease that the slope promises


class State(Protocol):
    """What is known of the function at one point."""

    @property
    def point(self) -> Tensor:
        """The point, shape (n,)."""

    @property
    def value(self) -> float:
        """Value of the function; infinite where it has none."""

    @property
    def gradient(self) -> Tensor:
        """Gradient of the function, shape (n,)."""

    def precondition(self, vector: Tensor) -> Tensor:
        """Return an approximate inverse Hessian, symmetric and positive definite, times a vector."""


StateT = TypeVar("StateT", bound=State)


class Curvature:
    """What the last few steps showed of the Hessian: pairs of a step and the change of the gradient."""

    def __init__(self, memory: int = 8) -> None:
        self._pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)

    def observe(self, step: Tensor, change: Tensor) -> None:
        """Add a pair, unless the function is not convex along it."""
        inner = float(step @ change)
        if inner > 1e-10 * float(torch.linalg.vector_norm(step) * torch.linalg.vector_norm(change)):
            self._pairs.append((step, change, 1 / inner))

    def direction(self, state: State) -> Tensor:
        """Return the step to take: minus the approximate inverse Hessian times the gradient (two-loop recursion)."""
        q, weights = state.gradient, []
        for step, change, rho in reversed(self._pairs):
            weights.append(rho * (step @ q))
            q = q - weights[-1] * change
        q = state.precondition(q)
        if self._pairs:
            _, change, rho = self._pairs[-1]
            q = q / (rho * (change @ state.precondition(change)))
        for (step, change, rho), weight in zip(self._pairs, reversed(weights), strict=True):
            q = q + (weight - rho * (change @ q)) * step
        return -q


def descend(
    state: StateT,
    evaluate: Callable[[Tensor], StateT],
    curvature: Curvature,
    iterations: int,
    tolerance: float = 1e-6,
) -> tuple[StateT, bool]:
    """Lower the function; the value never rises.

    Args:
        state: Where to start.
        evaluate: Returns the state at a point.
        curvature: Of earlier iterations on this or nearly this function; added to.
        iterations: Largest number of steps.
        tolerance: A step that lowers the value by no more than this share of it is the last.

    Returns:
        The last state, and whether further iterations could lower it.
    """
    for _ in range(iterations):
        step = curvature.direction(state)
        new = _search(state, evaluate, step)
        if new is None:
            return state, False
        curvature.observe(new.point - state.point, new.gradient - state.gradient)
        stagnated = state.value - new.value <= tolerance * abs(state.value)
        state = new
        if stagnated:
            return state, False
    return state, True


def _search(state: StateT, evaluate: Callable[[Tensor], StateT], step: Tensor) -> StateT | None:
    """Return the state after as much of the step as lowers the value; None if nothing does."""
    slope, length = float(step @ state.gradient), 1.0
    if not slope < 0:
        return None
    for _ in range(_HALVINGS):
        new = evaluate(state.point + length * step)
        excess = new.value - state.value - length * slope
        if excess <= (_SUFFICIENT - 1) * length * slope:
            return new
        # The least value of the parabola through what is known, kept from shrinking by too much or too little.
        length *= min(0.5, max(0.1, -slope * length / (2 * excess)))
    return None
