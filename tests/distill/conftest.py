"""Fixtures of the tests of distillation."""

import pytest

from tests.distill.tapped import Net


@pytest.fixture
def models():
    return Net(seed=0), Net(seed=1)
