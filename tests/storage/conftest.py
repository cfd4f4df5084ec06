"""A compressed network and a whole file of it."""

import pytest

from lowrank_nn.storage import save
from tests.storage.models import compressed_net


@pytest.fixture(scope="module")
def net():
    """A network with layers of several kinds, compressed."""
    return compressed_net()


@pytest.fixture(scope="module")
def good(net, tmp_path_factory):
    """The bytes of a whole file."""
    path = tmp_path_factory.mktemp("good") / "a.lrnn"
    save(net, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Where a bad file may be written."""
    return tmp_path_factory.mktemp("scratch") / "bad.lrnn"
