"""Loading what must be refused."""

import copy

import pytest

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage import load
from tests.storage.models import assert_same_state


def refusal(path, data, fresh):
    """The message with which `data` is refused; the model stays as it was."""
    path.write_bytes(data)
    before, modules = copy.deepcopy(fresh), [*fresh.modules()]
    with pytest.raises(FileFormatError) as caught:
        load(path, fresh)
    assert all(a is b for a, b in zip(fresh.modules(), modules, strict=True))
    assert_same_state(fresh, before)
    return str(caught.value)
