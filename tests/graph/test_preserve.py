"""Recording leaves no trace: not in the model, not in the process."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_nn.errors import PlanError
from lowrank_nn.graph import record
from tests.zoo import ZOO


class Restless(nn.Module):
    """Does to itself and to the process everything that a forward can, then ends in ``error``."""

    def __init__(self, error=None, device="cpu"):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.register_buffer("counter", torch.zeros(3))
        self.register_buffer("cache", torch.full((2,), float("nan")), persistent=False)
        self.register_buffer("late", None)
        self.calls = 0
        self.cached = {"x": None}
        self.seen = [0, 1]
        self.error = error
        self.to(device)

    def forward(self, x):
        self.counter += 1
        self.cache = torch.zeros(5)
        self.late = torch.ones(2)
        self.calls += 1
        self.cached["y"] = self.cached.pop("x")
        self.seen[0] = x
        self.trace = x
        self.inner.train()
        y = self.inner(x) + torch.rand_like(x)
        y = y + random.random() + np.random.rand()  # noqa: NPY002
        self.inner[0].register_forward_hook(lambda *_: None)
        self.inner.append(nn.ReLU())
        self.inner[0].bias.requires_grad_(False)
        warnings.simplefilter("ignore")
        torch.set_grad_enabled(True)
        if self.error is not None:
            raise self.error
        return y


def bits(tensor):
    return None if tensor is None else (id(tensor), tensor.dtype, tensor.detach().cpu().numpy().tobytes())


def fingerprint(model):
    """Everything that must stay, by value and by identity."""
    modules = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors = {name: bits(t) for name, t in (module._parameters | module._buffers).items()}
        flags = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
        attributes = {key: id(value) for key, value in vars(module).items()}
        hooks = [list(table.items()) for name, table in vars(module).items() if name.endswith("_hooks")]
        own = [repr(value) for value in vars(module).values() if type(value) in (dict, list)]
        modules[path] = (id(module), module.training, tensors, attributes, own, hooks, list(module._modules), flags)
    accelerator_states = [torch.get_device_module().get_rng_state()] if torch.accelerator.is_available() else []
    process = (
        torch.get_rng_state().numpy().tobytes(),
        [bits.tolist() for bits in accelerator_states],
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        list(warnings.filters),
    )
    return modules, process


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("training", [True, False])
def test_the_zoo_is_untouched(name, training):
    model, inputs = ZOO[name]()
    model.train(training)
    leaf = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Embedding)))
    leaf.train(not training)  # a frozen part
    seen = []
    leaf.register_forward_hook(lambda *_: seen.append(1))
    before = fingerprint(model)
    record(model, inputs)
    assert fingerprint(model) == before
    assert seen  # the user's own hooks do run


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt(), SystemExit()])
def test_a_forward_that_changes_everything_is_undone(error):
    model = Restless(error)
    x = torch.randn(3, 4)
    before = fingerprint(model)
    if error is None:
        record(model, x)
    else:
        with pytest.raises(PlanError if isinstance(error, Exception) else type(error)):
            record(model, x)
    assert fingerprint(model) == before


def test_an_interrupt_in_a_layer_restores_its_forward():
    model, inputs = ZOO["lenet5"]()
    before = fingerprint(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.fc2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        record(model, inputs)
    handle.remove()
    assert fingerprint(model) == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_set_on_the_instance_is_kept():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x + 1
    own = layer.forward
    recording = record(layer, torch.zeros(1, 3))
    assert torch.equal(recording.output, torch.ones(1, 3))
    assert layer.forward is own


def test_a_pending_backward_is_not_disturbed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(5, 3)
    loss = model(x).square().sum()
    record(model, x)
    loss.backward()
    assert model[0].weight.grad is not None


def test_the_forward_runs_in_eval_mode_without_gradients():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.training, self.fc.training, torch.is_grad_enabled(), self.fc(x)

    *flags, y = record(Model().train(), torch.zeros(1, 3)).output
    assert flags == [False, False, False]
    assert not y.requires_grad


@pytest.mark.cuda
def test_untouched_on_cuda(device):
    model = Restless(device=device)
    x = torch.randn(3, 4, device=device)
    before = fingerprint(model)
    record(model, x)
    assert fingerprint(model) == before


@pytest.mark.cuda
def test_inputs_on_another_device_say_so(device):
    with pytest.raises(PlanError, match=r"cpu\): RuntimeError"):
        record(nn.Linear(3, 3, device=device), torch.zeros(1, 3))
