"""Two runs count as the same if every tensor is, up to rounding, and none is missing on either side."""

import pytest
import torch

from lowrank_nn.graph.attributes import Cut
from lowrank_nn.graph.proof_comparison import BUFFERS, GRADIENTS, KINDS, OUTPUTS, Comparison


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_have_no_problem(kind):
    comparison = Comparison({})
    comparison.keep(kind, "a", torch.ones(3))
    comparison.compare(kind, "a", torch.ones(3))
    assert comparison.problem() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_only_the_smaller_network_gives_is_a_problem(kind):
    comparison = Comparison({})
    comparison.keep(kind, "a", torch.ones(3))
    assert comparison.problem() == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_only_the_masked_network_gives_is_a_problem(kind):
    comparison = Comparison({})
    comparison.compare(kind, "a", torch.ones(3))
    assert comparison.problem() == kind


@pytest.mark.parametrize(
    "got",
    [torch.tensor([1.0, 1.01]), torch.tensor([1.0, torch.nan]), torch.ones(3), torch.ones(2, dtype=torch.float64)],
    ids=["value", "nan", "shape", "dtype"],
)
def test_a_tensor_that_differs_is_a_problem(got):
    comparison = Comparison({})
    comparison.keep(OUTPUTS, "0", got)
    comparison.compare(OUTPUTS, "0", torch.ones(2))
    assert comparison.problem() == OUTPUTS


def test_infinite_values_in_the_same_places_are_equal():
    comparison = Comparison({})
    comparison.keep(OUTPUTS, "0", torch.tensor([1.0, torch.inf, torch.nan]))
    comparison.compare(OUTPUTS, "0", torch.tensor([1.0, torch.inf, torch.nan]))
    assert comparison.problem() == ""


def test_gradients_and_buffers_are_compared_where_the_smaller_network_has_them():
    comparison = Comparison({"weight": {0: Cut(size=3, removed=(0,))}})
    for kind in (GRADIENTS, BUFFERS):
        comparison.keep(kind, "weight", torch.tensor([1.0, 2.0]))
        comparison.compare(kind, "weight", torch.tensor([7.0, 1.0, 2.0]))
    assert comparison.problem() == ""


def test_the_first_kind_that_differs_is_named():
    comparison = Comparison({})
    for kind in (BUFFERS, GRADIENTS):
        comparison.keep(kind, "a", torch.zeros(1))
        comparison.compare(kind, "a", torch.ones(1))
    assert comparison.problem() == GRADIENTS
