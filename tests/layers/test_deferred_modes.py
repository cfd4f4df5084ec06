"""Deferred tensors where gradients are wanted, inference mode begins or ends, and several threads read them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.layers._deferred import Deferred
from lowrank_nn.layers._onednn import is_exact
from tests.layers.test_deferred import deferred_and_plain, layer, randn

pytestmark = pytest.mark.skipif(not is_exact(255, 127), reason="no exact integer kernels on this machine")


def test_what_inference_mode_read_first_can_be_learned_from_and_changed():
    head = nn.Conv2d(8, 3, 1)
    with torch.no_grad():
        later, plain = deferred_and_plain()
    with torch.inference_mode():
        later.mean()
    head(later).sum().backward()
    assert head.weight.grad is not None
    later.add_(1)
    torch.testing.assert_close(later + 0, plain + 1)


USES = {
    "layer": lambda x, layer: layer(x),
    "max-pool": lambda x, layer: layer(F.max_pool2d(x, 2)),
    "slice": lambda x, layer: layer(x[:, :, ::2]),
    "shortcut": lambda x, layer: layer(F.relu(x + x.detach())),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients_of_a_layers_output(use):
    with torch.no_grad():
        later, plain = deferred_and_plain()
        following = layer(seed=5, in_channels=8).requires_grad_(False)
    following.chained = True
    found = []
    for y in (later, plain):
        y.requires_grad_()
        assert y.requires_grad
        use(y, following).square().sum().backward()
        found.append(y.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_threads_may_read_one_tensor_at_once():
    with torch.no_grad():
        following = layer(seed=5, in_channels=8)
    x, found, errors = randn(16, 4, 12, 10), [], []

    def read(later, ready, number):
        try:
            with torch.no_grad():
                ready.wait()
                found.append(following(later).sum() if number % 2 else later.sum())
        except Exception as error:
            errors.append(error)

    for _ in range(100):
        with torch.no_grad():
            later = F.relu(deferred_and_plain(x=x)[0])
        assert type(later) is Deferred
        ready = threading.Barrier(4)
        threads = [threading.Thread(target=read, args=(later, ready, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(found) == 400
