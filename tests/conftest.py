import os
import threading
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.pretend_device import pretend_device

# The suite must give the same verdict on every run; `--hypothesis-profile=nightly` looks further, at random.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=500)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    about = "run the tests marked cuda on a device that only pretends to be one"
    parser.addoption("--pretend-device", action="store_true", help=about)


def pytest_configure(config):
    if config.getoption("--pretend-device"):
        pretend_device()  # ahead of the first backward, which starts a thread for every device there is


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or config.getoption("--pretend-device"):
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device, and no --pretend-device"))


@pytest.fixture(scope="session")
def device(request):
    """The accelerator of tests marked cuda."""
    return pretend_device() if request.config.getoption("--pretend-device") else torch.device("cuda:0")


@pytest.fixture
def data_dir():
    """The folder with the unpacked real data."""
    folder = os.environ.get("LOWRANK_NN_DATA")
    if not folder:
        pytest.skip("real data: set LOWRANK_NN_DATA to the folder they are unpacked in")
    return Path(folder)


def _settings():
    return {
        "thread count": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True, scope="session")
def _no_timings_on_disk():
    """No test or fixture reads or leaves timings in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_NN_CACHE", "off")
        yield


@pytest.fixture(autouse=True)
def _torch_settings_stay():
    """No test, and nothing it calls, leaves a setting of torch changed."""
    before = _settings()
    yield
    after = _settings()
    torch.set_grad_enabled(before["grad mode"])
    torch.set_default_dtype(before["default dtype"])
    assert after == before


@pytest.fixture(autouse=True)
def _no_thread_stays():
    """No test, and nothing it calls, leaves a thread that runs a forward."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "lowrank_nn run"]
