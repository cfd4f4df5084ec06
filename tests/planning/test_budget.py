"""Budgets: which shares count, in which order, and what is refused."""

import numpy as np
import pytest

from lowrank_nn.cost import Cost
from lowrank_nn.errors import OptionError
from lowrank_nn.planning import Budget

DENSE = Cost(params=1000, macs=50_000, bytes=4000, nonzeros=1000)


def test_only_given_shares_are_limits_in_a_fixed_order():
    budget = Budget(bytes=0.5, params=0.25)
    assert budget.shares() == {"params": 0.25, "bytes": 0.5}
    np.testing.assert_array_equal(budget.allowed(DENSE), [250, 2000])
    np.testing.assert_array_equal(budget.spent(Cost(params=7, macs=8, bytes=9)), [7, 9])


def test_all_of_the_dense_model_may_remain():
    assert Budget(macs=1).shares() == {"macs": 1}
    assert repr(Budget(macs=0.5, latency=0.8)) == "Budget(macs=0.5, latency=0.8)"


@pytest.mark.parametrize("share", [0, -0.1, 1.0001, float("nan"), float("inf"), 30])
@pytest.mark.parametrize("name", ["params", "macs", "bytes"])
def test_shares_outside_of_zero_to_one_are_refused(name, share):
    with pytest.raises(OptionError, match=f"{name} is the share of the dense model .*, got"):
        Budget(**{name: share})


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(OptionError, match="at least one of params, macs, bytes"):
        Budget()


def test_scaling_stops_at_the_whole_model():
    assert Budget(params=0.3, bytes=0.1).scaled(4) == Budget(params=1.0, bytes=0.4)
    assert Budget(params=0.3).scaled(0.5) == Budget(params=0.15)


def metric(model):
    return 1.0


def test_a_drop_of_accuracy():
    budget = Budget(accuracy_drop=0.5, evaluate=metric, of="macs", bytes=0.4)
    assert budget.shares() == {"bytes": 0.4}
    assert budget.with_share(0.2) == Budget(bytes=0.4, macs=0.2)
    assert Budget(accuracy_drop=0, evaluate=metric).with_share(0.3) == Budget(params=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy_drop": 0.5}, "belong together"),
        ({"evaluate": metric}, "belong together"),
        ({"accuracy_drop": -1, "evaluate": metric}, "accuracy_drop must be a finite number from 0"),
        ({"accuracy_drop": float("nan"), "evaluate": metric}, "accuracy_drop must be a finite number from 0"),
        ({"accuracy_drop": "1", "evaluate": metric}, "accuracy_drop must be a finite number from 0"),
        ({"accuracy_drop": 1, "evaluate": 91.0}, "evaluate must be a function of the model, got 91.0"),
        ({"accuracy_drop": 1, "evaluate": metric, "of": "flops"}, "of must be one of params, macs, bytes, latency"),
        ({"params": 0.5, "of": "macs"}, "and there is none"),
    ],
)
def test_searches_that_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Budget(**options)
