"""Fixed-point numbers and training on them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import lowrank_nn as lnn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(0, 18),
)
def test_nearest_is_numpys_rounding(values, integer_bits, fraction_bits):
    x = np.array(values)
    limit = 2.0 ** (integer_bits - 1)
    expected = np.clip(np.rint(x * 2.0**fraction_bits) / 2.0**fraction_bits, -limit, limit - 2.0**-fraction_bits)
    numbers = lnn.FixedPoint(integer_bits, fraction_bits)
    found = numbers.round(torch.tensor(values, dtype=torch.float32))
    assert found.tolist() == expected.tolist()
    codes = numbers.to_integers(torch.tensor(values))
    assert torch.equal(numbers.from_integers(codes), found)
    assert codes.dtype == (torch.int8 if numbers.bits <= 8 else torch.int16 if numbers.bits <= 16 else torch.int32)


def test_stochastic_rounding_is_unbiased():
    numbers = lnn.FixedPoint(2, 3, rounding="stochastic")
    x = torch.tensor(0.65).expand(40_000)  # 5.2 steps of 1/8
    found = numbers.round(x, generator())
    assert set(found.tolist()) == {5 / 8, 6 / 8}
    up = int((found == 6 / 8).sum())
    assert stats.binomtest(up, 40_000, 0.2).pvalue > 1e-3


def test_numbers_on_the_grid_stay_and_the_rest_is_clipped():
    numbers = lnn.FixedPoint(2, 4, rounding="stochastic")
    grid = torch.arange(-32, 32) / 16
    assert torch.equal(numbers.round(grid, generator()), grid)
    assert numbers.round(torch.tensor([-9.0, 9.0, math.inf, -math.inf])).tolist() == [-2.0, 1.9375, 1.9375, -2.0]


def test_gradients_are_straight_through():
    x = torch.tensor([-5.0, 0.3, 1.0, 5.0], requires_grad=True)
    lnn.FixedPoint(2, 2).round(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0, 2, 3, 0]


def test_the_generator_decides_and_the_global_state_stays():
    numbers, x, state = lnn.FixedPoint(2, 4, rounding="stochastic"), torch.linspace(-1, 1, 100), torch.get_rng_state()
    first = numbers.round(x, generator(1))
    assert torch.equal(first, numbers.round(x, generator(1)))
    assert not torch.equal(first, numbers.round(x, generator(2)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_updates_are_lost_by_nearest_rounding_alone(rounding):
    """The paper's finding: steps of the optimizer below half a step of the grid stall training."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x @ torch.linspace(-1, 1, 8)[:, None]
    model = nn.Linear(8, 1, bias=False)
    numbers = lnn.FixedPoint(4, 6, rounding=rounding)
    optimizer = numbers.round_after(torch.optim.SGD(model.parameters(), lr=2e-3), generator())
    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    weight = model.weight.detach()
    assert torch.equal((weight * 64).round(), weight * 64)
    stalled = sum(losses[-50:]) / 50 > 0.1 * losses[0]
    assert stalled == (rounding == "nearest")


def test_fine_tuning_ends_on_the_grid():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    numbers = lnn.FixedPoint(2, 10, rounding="stochastic")
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(3)]
    step = lnn.FineTune(batches, 2, optimizer=lambda ps: numbers.round_after(torch.optim.SGD(ps, lr=0.1)))
    trained = lnn.compress_model(model, batches[0][0], [step], progress=False).model
    assert not torch.equal(trained.weight, model.weight)
    for parameter in trained.parameters():
        assert torch.equal(numbers.from_integers(numbers.to_integers(parameter)), parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"integer_bits": 0}, "integer_bits must be a whole number from 1 to 24, got 0"),
        ({"fraction_bits": -1}, "fraction_bits must be a whole number from 0 to 22, got -1"),
        ({"integer_bits": 9, "fraction_bits": 16}, "fraction_bits must be a whole number from 0 to 15, got 16"),
        ({"integer_bits": 2.5}, "integer_bits must be a whole number from 1 to 24, got 2.5"),
        ({"fraction_bits": "14"}, "fraction_bits must be a whole number from 0 to 22, got '14'"),
        ({"rounding": "up"}, "'nearest' or 'stochastic', got 'up'"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(lnn.OptionError, match=message):
        lnn.FixedPoint(**options)


@pytest.mark.parametrize(("dtype", "held"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.int32, 0)])
def test_dtypes_too_narrow_for_the_numbers_are_refused(dtype, held):
    with pytest.raises(lnn.OptionError, match=f"holds {held} significant bits, and these numbers have 16"):
        lnn.FixedPoint().round(torch.ones(2, dtype=dtype))
    if held:
        assert lnn.FixedPoint(2, 6).round(torch.tensor([0.51], dtype=dtype)).tolist() == [33 / 64]
