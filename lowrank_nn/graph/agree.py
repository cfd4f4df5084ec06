"""Whether two models that should compute the same do, on given inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import PlanError
from lowrank_nn.graph.inputs import run_model, tensors
from lowrank_nn.graph.preserve import evaluating

TOLERANCES = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4, torch.complex64: 1e-4}
"""Relative error up to which two outputs agree; of narrower dtypes, 16 units of rounding."""


def outputs_of(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Return the tensors that ``model`` returns in eval mode; model and process are left as they were.

    Models compared in one state of the process draw the same random numbers.

    Raises:
        PlanError: The forward failed; the error it raised is chained.
    """
    with evaluating(model):
        return [tensor.detach().clone() for tensor in tensors(run_model(model, example_inputs))]


def outputs_agree(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors have the same shapes and dtypes, and ||got - expected|| <= tol ||expected||.

    Values that are not finite must be so in both. Integers are compared by shape only: the index of a maximum may
    change where two values tie.
    """
    return len(expected) == len(got) and all(map(_agree, expected, got))


def keeps_outputs(model: nn.Module, example_inputs: Any, expected: Sequence[Tensor]) -> bool:
    """Whether ``model``, changed by now, still runs and returns what :func:`outputs_of` returned before."""
    try:
        return outputs_agree(expected, outputs_of(model, example_inputs))
    except PlanError:  # it checks its values
        return False


def _agree(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return True
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    tolerance = TOLERANCES.get(expected.dtype, 16 * torch.finfo(expected.dtype).eps)
    wide = torch.promote_types(expected.dtype, torch.float64)
    a, b = expected[finite].to(wide), got[finite].to(wide)
    return bool(torch.linalg.vector_norm(b - a) <= tolerance * torch.linalg.vector_norm(a) + torch.finfo(wide).tiny)
