"""Two networks side by side: each layer stops all batches, and everything is as in ordinary forwards."""

import copy

import pytest
import torch
from torch import nn

from lowrank_nn.graph import call_model, find_links, record
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.lockstep import run_in_lockstep
from tests.zoo import ZOO
from tests.zoo.control_flow import EarlyExit


def nothing(path, pairs):
    pass


def batches_like(inputs, count=3):
    """Different batches of the form of ``inputs``."""
    generator = torch.Generator().manual_seed(0)

    def other(value):
        if isinstance(value, torch.Tensor):
            order = torch.randperm(value.numel(), generator=generator)
            return value.flatten()[order].reshape(value.shape)
        return value

    def batch():
        if isinstance(inputs, dict):
            return {key: other(value) for key, value in inputs.items()}
        return tuple(other(value) for value in inputs) if isinstance(inputs, tuple) else other(inputs)

    return [inputs, *(batch() for _ in range(count - 1))]


def first_calls(model, batch, paths):
    """First tensor in and the output of the first call of each layer, from a plain forward with wrapped layers."""
    model = copy.deepcopy(model).eval()
    seen = {}

    def watch(path, forward):
        def watched(*args, **kwargs):
            x = next(tensors((args, kwargs))).clone()
            y = forward(*args, **kwargs)
            seen.setdefault(path, (x, y.clone() if isinstance(y, torch.Tensor) else y))
            return y

        return watched

    for path in paths:
        layer = model.get_submodule(path)
        layer.forward = watch(path, layer.forward)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            call_model(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return seen


def paths_of(model, inputs):
    called = (site for site in record(model, inputs).sites if site.calls)
    return [site.path for site in called if isinstance(site.layer, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("name", ZOO)
def test_every_run_is_an_ordinary_forward(name):
    model, inputs = ZOO[name]()
    batches = batches_like(inputs)
    paths = paths_of(model, inputs)
    want = [first_calls(model, batch, paths) for batch in batches]
    visited = []

    def visit(path, pairs):
        visited.append(path)
        for expected, (first, second) in zip(want, pairs, strict=True):
            if path not in expected:
                assert first is None
                assert second is None
                continue
            x, y = expected[path]
            assert (first.path, second.path) == (path, path)
            assert torch.equal(first.input, x)
            assert torch.equal(second.input, x)
            assert torch.equal(first.output, y)
            assert second.output is None

    run_in_lockstep(model, copy.deepcopy(model), batches, paths, visit)
    assert visited == paths


@pytest.mark.parametrize("name", ["resnet20", "vit", "unet", "control_flow"])
def test_later_layers_see_what_changed_ahead_of_them(name):
    model, inputs = ZOO[name]()
    small, paths, batches = copy.deepcopy(model), paths_of(model, inputs), batches_like(inputs)
    seen = {}

    def visit(path, pairs):
        seen[path] = [second and second.input.clone() for _, second in pairs]
        with torch.no_grad():
            small.get_submodule(path).weight.mul_(0.9)

    run_in_lockstep(model, small, batches, paths, visit)
    for index, batch in enumerate(batches):
        for path, (x, _) in first_calls(small, batch, paths).items():
            assert torch.equal(seen[path][index], x)


def test_shortcuts():
    model, inputs = ZOO["resnet20"]()
    links = find_links(model, inputs)
    shortcuts = {path: link.shortcut for path, link in links.items() if link.shortcut}
    batches = batches_like(inputs, 2)
    blocks = [path.rpartition(".")[0] for path in shortcuts]
    want = [first_calls(model, batch, blocks) for batch in batches]
    compared = []

    def visit(path, pairs):
        for expected, pair in zip(want, pairs, strict=True):
            for stop in pair:
                if path in shortcuts:  # what the block was called with
                    assert torch.equal(stop.shortcut, expected[path.rpartition(".")[0]][0])
                    compared.append(path)
                else:
                    assert stop.shortcut is None

    run_in_lockstep(model, copy.deepcopy(model), batches, list(links), visit, shortcuts=shortcuts)
    assert len(compared) == 4 * len(shortcuts)


class Keeps(nn.Module):
    """Hands a value from one layer to another through an attribute, a buffer and a counter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.count = 0

    def forward(self, x):
        y = self.first(x)
        self.kept = x
        self.mean.copy_(x.mean(0))
        self.count += 1
        y = self.second(y + self.kept)
        assert torch.equal(self.kept, x)
        assert torch.equal(self.mean, x.mean(0))
        assert self.count == 1
        return y


def test_state_of_a_forward_is_not_mixed_up_and_leaves_no_trace():
    model = Keeps().train()
    attributes = [{**vars(module)} for module in model.modules()]
    run_in_lockstep(model, model, [torch.randn(2, 3) for _ in range(4)], ["first", "second"], nothing)
    assert [vars(module) for module in model.modules()] == attributes
    assert torch.equal(model.mean, torch.zeros(3))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        y = self.first(x + torch.rand(()))
        return self.second(y + torch.rand(()))


def test_random_numbers_are_the_same_in_both_networks_and_differ_between_batches():
    model, seen = Noisy(), []
    x = torch.ones(1, 3)
    state = torch.get_rng_state()

    def visit(path, pairs):
        assert all(torch.equal(first.input, second.input) for first, second in pairs)
        torch.rand(3)  # does not matter to the runs
        seen.append(torch.cat([first.input for first, _ in pairs]))

    for _ in range(2):
        run_in_lockstep(model, copy.deepcopy(model), [x, x], ["first", "second"], visit, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(seen[:2], seen[2:], strict=True))
    assert not any(torch.equal(*inputs) for inputs in seen)


def test_batches_that_take_different_ways():
    torch.manual_seed(0)
    model = EarlyExit().eval()
    options = {"settled": 1e9}
    batches = [{"image": shift + torch.randn(2, 3, 8, 8), "options": options} for shift in (3, -3, 3)]
    visits = []

    def visit(path, pairs):
        visits.append((path, [first is not None for first, _ in pairs], [second is not None for _, second in pairs]))

    run_in_lockstep(model, copy.deepcopy(model), batches, ["stem", "step", "bright", "dark"], visit)
    bright = [True, False, True]
    dark = [not way for way in bright]
    assert visits == [("stem", [True] * 3, [True] * 3), ("bright", bright, bright), ("dark", dark, dark)]


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.one(self.two(x)) if x.sum() > 0 else self.two(self.one(x))


def test_a_layer_is_visited_once_also_where_orders_differ():
    visits = []

    def visit(path, pairs):
        visits.append((path, [first is not None for first, _ in pairs]))

    run_in_lockstep(Swapped(), Swapped(), [torch.ones(1, 3), -torch.ones(1, 3)], ["one", "two"], visit)
    assert visits == [("one", [False, True]), ("two", [True, True])]


def test_shared_buffers():
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    dense, x, inputs = copy.deepcopy(small), torch.randn(4, 3), []

    def visit(path, pairs):
        inputs.extend(second.input.clone() for _, second in pairs)
        small[1].running_mean.fill_(1.0)

    run_in_lockstep(dense, small, [x], ["0", "2"], visit, shared=[small[1].running_mean])
    assert torch.equal(inputs[1], small[1](small[0](x)))
    assert torch.equal(small[1].running_mean, torch.ones(3))
    assert torch.equal(dense[1].running_mean, torch.zeros(3))


def test_the_model_itself_is_the_layer():
    layer, seen = nn.Linear(3, 2), []
    run_in_lockstep(layer, layer, [torch.ones(1, 3)], [""], lambda path, pairs: seen.append((path, pairs)))
    ((path, (pair,)),) = seen
    assert path == ""
    assert torch.equal(pair.first.output, layer(pair.second.input))
