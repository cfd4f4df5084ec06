"""Which modules have a narrow form: those of a registered class, and of subclasses with the same forward."""

import pytest
from torch import nn

from lowrank_nn.layers import narrow, narrow_module, register_narrow_form


class Heads(nn.Module):
    def forward(self, x):
        return x


class Same(Heads):
    """Runs the forward of ``Heads``, and may be registered itself."""


class Other(Heads):
    def forward(self, x):
        return 2 * x


@pytest.fixture
def narrowed(monkeypatch):
    monkeypatch.setattr(narrow, "_FORMS", dict(narrow._FORMS))
    return []


@pytest.mark.parametrize("name", [Heads, "tests.layers.test_narrow.Heads"])
def test_classes_that_run_the_same_forward(name, narrowed):
    register_narrow_form(name, narrowed.append)
    modules = [Heads(), Same(), Other(), nn.Linear(2, 2)]
    for module in modules:
        narrow_module(module)
    assert narrowed == modules[:2]


def test_a_subclass_registered_itself(narrowed):
    register_narrow_form(Heads, lambda module: None)
    register_narrow_form(Same, narrowed.append)
    same = Same()
    for module in (Heads(), same):
        narrow_module(module)
    assert narrowed == [same]


def test_the_last_registration_holds(narrowed):
    register_narrow_form(Heads, narrowed.append)
    register_narrow_form(Heads, lambda module: None)
    narrow_module(Heads())
    assert narrowed == []
