"""Deferred tensors: the same as ordinary ones whatever is done with them, integers where that can be."""

import copy
import io
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.layers import QuantConv2d, QuantLinear
from lowrank_nn.layers._deferred import Deferred, rounded_tensors
from lowrank_nn.layers._deferred_sources import Floats
from lowrank_nn.layers._onednn import CodeGrid, PackedWeight, is_exact
from tests.layers.geometries import dense_conv

pytestmark = pytest.mark.skipif(not is_exact(255, 127), reason="no exact integer kernels on this machine")

GRID = CodeGrid(0.05, 40, 255)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(seed=0, **options):
    dense = dense_conv(torch.float32, **{"kernel_size": 3, "padding": 1} | options)
    dense.weight.copy_(0.2 * randn(*dense.weight.shape, seed=seed))
    x = randn(2, 4, 12, 10)
    return QuantConv2d.from_pretrained_layer(dense, activation_bits=8, inputs=x).eval()


def deferred_and_plain(seed=0, x=None, **options):
    """A layer's output as a deferred tensor, and the same computed."""
    x = randn(2, 4, 12, 10) if x is None else x
    one = layer(seed, **options)
    plain = one(x)
    one.chained = True
    later = one(x)
    assert type(plain) is torch.Tensor
    assert type(later) is Deferred
    return later, plain


def codes_of(plain, grid=GRID):
    return (torch.round(plain.double() / grid.scale) + grid.zero_point).clamp(0, grid.top)


def assert_bytes(later, plain, grid=GRID, ties=1e-3):
    """The bytes of a deferred tensor are those of the plain one, up to a step where it is half-way between two."""
    found, expected = later.source.codes(grid).double(), codes_of(plain, grid)
    assert found.shape == plain.shape
    differs = found != expected
    assert float((found - expected).abs().max()) <= 1
    assert not bool((((plain.double() / grid.scale) % 1 - 0.5).abs()[differs] > ties).any())


NOTED = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "torch.relu": torch.relu,
    "method relu": lambda x: x.relu(),
    "module relu, in place": nn.ReLU(inplace=True),
    "relu_": lambda x: x.relu_(),
    "relu6": nn.ReLU6(),
    "relu6, in place": nn.ReLU6(inplace=True),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "max-pool": lambda x: F.max_pool2d(x, 2),
    "padded max-pool": nn.MaxPool2d(3, 2, 1),
    "uneven max-pool": lambda x: torch.max_pool2d(x, (3, 2), (1, 2), (1, 0)),
    "max-pool, then relu": lambda x: F.relu(F.max_pool2d(x, 3, 2)),
    "relu, then max-pool": lambda x: F.max_pool2d(F.relu(x), 2),
    "dropout": nn.Dropout().eval(),
    "slice": lambda x: x[:, :, ::2, ::2],
    "slice of few": lambda x: x[:1, 2:-1, 1:9:3],
    "padded channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)),
    "padded rows": nn.ZeroPad2d((1, 0, 2, 1)),
    "slice, padded, with an activation": lambda x: F.relu6(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)),
    "activation, slice of a slice": lambda x: x.relu()[:, 1:][:, :, ::2],
    "max-pool of a slice": lambda x: F.max_pool2d(x[:, :, 1::2], 2),
}


@pytest.mark.parametrize("function", NOTED.values(), ids=NOTED)
def test_noted_functions_are_part_of_the_kernel(function):
    later, plain = deferred_and_plain()
    y, expected = function(later), function(plain.clone())
    assert type(y) is Deferred
    assert not isinstance(y.source, Floats)
    assert y.shape == expected.shape
    # Activations with curves are computed by the kernels' own approximations.
    assert_bytes(y, expected, ties=2e-2)
    later, _ = deferred_and_plain()
    torch.testing.assert_close(function(later) + 0, expected, rtol=1e-5, atol=1e-5)


FUNCTIONS = {
    "mean": lambda x: x.mean((2, 3)),
    "view": lambda x: x.view(2, -1),
    "flatten": lambda x: torch.flatten(x, 1),
    "index": lambda x: x[:, 1:3, 0],
    "ellipsis": lambda x: x[..., ::2],
    "new dim": lambda x: x[None, :, ::2],
    "mask": lambda x: x[x > 0],
    "nothing left": lambda x: x[:, 5:5],
    "padded with ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "cropped": lambda x: F.pad(x, (-1, -1)),
    "mirrored": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "plus number": lambda x: 1 - x,
    "plus plain": lambda x: x + torch.ones(2, 8, 12, 10),
    "plain plus": lambda x: torch.ones(8, 1, 1).add(x),
    "plus itself": lambda x: x + x,
    "added with alpha": lambda x: torch.add(x, x, alpha=2),
    "cat with plain": lambda x: torch.cat([x, torch.ones(2, 1, 12, 10)], 1),
    "cat of rows": lambda x: torch.cat([x, x], 2),
    "relu by keyword": lambda x: torch.relu(input=x),
    "max-pool by keyword": lambda x: torch.max_pool2d(input=x, kernel_size=2),
    "added by keyword": lambda x: torch.add(input=x, other=x),
    "added to x2": lambda x: torch.add(x, x2=x.relu()),
    "cat along an axis": lambda x: torch.cat([x, x], axis=1),
    "cat into a tensor": lambda x: torch.cat([x, x], 1, out=torch.empty(0)),
    "gelu": F.gelu,
    "tanh_": lambda x: x.tanh_(),
    "hardtanh": F.hardtanh,
    "relu of hardswish": lambda x: F.relu(F.hardswish(x)),
    "ceil pool": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "dropout": lambda x: F.dropout(x, 0.0, training=True),
    "conv": lambda x: F.conv2d(x, torch.ones(3, 8, 1, 1)),
    "batch norm": nn.BatchNorm2d(8).eval(),
    "numpy": lambda x: torch.from_numpy(np.asarray(x.numpy())),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "double": lambda x: x.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "unbind": lambda x: x.unbind(0)[1],
    "item": lambda x: torch.tensor(x.sum().item()),
    "iteration": lambda x: next(iter(x)),
    "operator": lambda x: torch.ops.aten.neg.default(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_other_function_gets_ordinary_floats(name):
    later, plain = deferred_and_plain()
    y = FUNCTIONS[name](later)
    torch.testing.assert_close(y, FUNCTIONS[name](plain), rtol=1e-5, atol=1e-5)
    assert not isinstance(y, Deferred)


def test_looks_compute_nothing():
    later, plain = deferred_and_plain()
    assert isinstance(later, torch.Tensor)
    assert (later.shape, later.dtype, later.device, later.ndim) == (plain.shape, plain.dtype, plain.device, 4)
    assert (later.size(1), later.dim(), later.numel(), len(later)) == (8, 4, plain.numel(), 2)
    assert later.is_floating_point()
    assert not later.requires_grad
    assert not isinstance(later.source, Floats)
    assert later.is_contiguous()
    assert repr(later) == repr(later.plain())


def test_it_is_saved_as_an_ordinary_tensor():
    later, plain = deferred_and_plain()
    file = io.BytesIO()
    torch.save(later, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), plain)


def test_changes_in_place_are_seen_by_everybody():
    later, plain = deferred_and_plain()
    view = later.view(2, -1)
    later.mul_(2)
    later[0] = 1
    expected = plain * 2
    expected[0] = 1
    torch.testing.assert_close(view, expected.view(2, -1))
    assert_bytes(later, expected)
    later.add_(1)
    assert_bytes(later, expected + 1)
    F.relu_(later)
    torch.testing.assert_close(later + 0, (expected + 1).relu())


def test_what_was_noted_before_a_change_in_place_stays():
    (later, plain), (other, _) = deferred_and_plain(), deferred_and_plain(seed=5)
    sum_of, activated = other + later, later.relu()
    later.mul_(-3)
    torch.testing.assert_close(sum_of + 0, other.plain() + plain)
    torch.testing.assert_close(activated + 0, plain.relu())
    torch.testing.assert_close(later + 0, -3 * plain)


def test_slices_and_padding_move_the_bytes_that_are_there():
    later, _ = deferred_and_plain()
    y = F.relu(later)
    codes = y.source.codes(GRID).numpy()
    moved = F.pad(y[:, :, ::2, 1::2], (0, 0, 0, 0, 3, 1))
    expected = np.pad(codes[:, :, ::2, 1::2], ((0, 0), (3, 1), (0, 0), (0, 0)), constant_values=GRID.zero_point)
    assert moved.source.grid == GRID
    np.testing.assert_array_equal(moved.source.codes(GRID), expected)
    np.testing.assert_allclose(moved.plain(), (expected - 40.0) * 0.05, rtol=1e-6)


def test_slices_show_later_changes_and_changes_of_slices_show():
    (later, plain), expected = deferred_and_plain(), deferred_and_plain()[1].clone()
    part = later[:, :, ::2]
    later.relu_()  # noted
    torch.testing.assert_close(part + 0, plain.relu()[:, :, ::2])
    later.mul_(2)  # not noted
    expected = 2 * plain.relu()
    assert_bytes(part, expected[:, :, ::2])
    part.sub_(3)
    expected[:, :, ::2] -= 3
    torch.testing.assert_close(later + 0, expected)
    F.relu_(part)
    expected[:, :, ::2].relu_()
    torch.testing.assert_close(later + 0, expected)
    other, plain = deferred_and_plain()
    part = other[:, :, ::2]
    part.relu_()
    plain[:, :, ::2].relu_()
    assert_bytes(other, plain)


@pytest.mark.parametrize("use", [lambda x: F.pad(x, (1, 1, 0, 0)), lambda x: F.max_pool2d(x, 2), lambda x: x.clone()])
def test_what_was_computed_of_a_slice_does_not_change_with_it(use):
    later, plain = deferred_and_plain()
    result = use(later[:, :4])
    later.mul_(-1)
    torch.testing.assert_close(result + 0, use(plain[:, :4]))
    result = use(later[:, :4])
    later.mul_(-1)
    torch.testing.assert_close(result + 0, use(-plain[:, :4]))


def test_a_sum_with_floats_does_not_change_with_them():
    (y, plain), (shortcut, other) = deferred_and_plain(), deferred_and_plain(seed=5)
    shortcut.mul_(2)
    total, joined = y + shortcut, torch.cat([y, shortcut], 1)
    shortcut.zero_()
    torch.testing.assert_close(total + 0, plain + 2 * other)
    torch.testing.assert_close(joined + 0, torch.cat([plain, 2 * other], 1))


def test_a_shortcut_of_option_a_is_added_in_integers():
    def shortened(x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))

    (y, plain), (shortcut, other) = deferred_and_plain(out_channels=12, stride=2), deferred_and_plain(seed=5)
    beside = CodeGrid(0.03, 100, 255)
    shortcut = shortcut.relu()
    rounded = (codes_of(other.relu(), beside) - 100) * 0.03
    assert_bytes(shortcut, other.relu(), beside)  # another layer has asked for it
    total = F.relu(shortened(shortcut) + y)
    assert type(total) is Deferred
    assert_bytes(total, F.relu(plain + shortened(rounded)), ties=2e-2)


@pytest.mark.parametrize("in_place", [False, True])
def test_shortcuts_are_added_in_integers(in_place):
    (y, plain), (shortcut, other) = deferred_and_plain(), deferred_and_plain(seed=5)
    beside = CodeGrid(0.03, 100, 255)
    rounded = (codes_of(other.relu(), beside) - 100) * 0.03
    shortcut = shortcut.relu()
    assert_bytes(shortcut, other.relu(), beside)  # another layer has asked for it
    if in_place:
        y += shortcut
    else:
        y = y + shortcut
    assert type(y) is Deferred
    assert_bytes(F.relu(y), F.relu(plain + rounded), ties=2e-2)


def test_two_outputs_that_nobody_rounded_are_added_in_floating_point():
    (y, plain), (shortcut, other) = deferred_and_plain(), deferred_and_plain(seed=5)
    total = (y + shortcut).relu()
    assert type(total) is Deferred
    assert_bytes(total, (plain + other).relu())
    (y, _), (shortcut, _) = deferred_and_plain(), deferred_and_plain(seed=5)
    torch.testing.assert_close((shortcut.relu() + y).relu() + 0, (plain + other.relu()).relu())


def test_a_shortcut_of_changed_floats_is_added_as_it_is():
    (y, plain), (shortcut, other) = deferred_and_plain(), deferred_and_plain(seed=5)
    shortcut.mul_(2)
    assert_bytes((y + shortcut), plain + 2 * other)
    torch.testing.assert_close(shortcut + 0, 2 * other)


def test_branches_are_joined_in_integers():
    (a, first), (b, second) = deferred_and_plain(), deferred_and_plain(seed=5, out_channels=3)
    joined = torch.cat([a.relu(), b], 1)
    assert type(joined) is Deferred
    assert_bytes(joined, torch.cat([first.relu(), second], 1))


def test_bytes_then_floats_are_what_the_bytes_stand_for():
    later, plain = deferred_and_plain()
    codes = later.source.codes(GRID)
    with rounded_tensors() as makers:
        torch.testing.assert_close(later + 0, (codes.float() - 40) * 0.05)
        assert len(makers) == 1
    other_grid = CodeGrid(0.2, 3, 15)
    expected = codes_of((codes.double() - 40) * 0.05, other_grid)
    assert float((later.source.codes(other_grid).double() - expected).abs().max()) <= 1
    assert later.shape == plain.shape


def test_layers_take_bytes_over_from_layers():
    x = randn(2, 4, 12, 10)
    dense = [dense_conv(torch.float32, 4, 8, kernel_size=1), dense_conv(torch.float32, 8, 6, kernel_size=3, padding=1)]
    first = QuantConv2d.from_pretrained_layer(dense[0], activation_bits=8, inputs=x).eval()
    second = QuantConv2d.from_pretrained_layer(dense[1], activation_bits=8, inputs=first(x)).eval()
    expected = second(first(x))
    first.chained = True
    torch.testing.assert_close(second(first(x)), expected, rtol=0, atol=2 * float(second.input_scale) * 2)
    assert float((second(first(x)) - expected).abs().mean()) < 1e-4
    head = QuantLinear(6 * 12 * 10, 5, activation_bits=8).eval()
    head.chained = second.chained = True
    assert type(F.relu(head(second(first(x)).flatten(1)))) is Deferred


def test_layers_wait_until_floats_are_wanted(monkeypatch):
    one, other, x = layer(), layer(seed=5, in_channels=8, out_channels=4), randn(2, 4, 12, 10)
    expected = one(other(one(x).relu()))
    runs = []
    run = PackedWeight.run
    monkeypatch.setattr(PackedWeight, "run", lambda self, *args: (runs.append(self), run(self, *args))[1])
    one.chained = other.chained = True
    y = one(other(one(x).relu()))
    assert not runs
    assert float((y + 0 - expected).abs().max()) <= 4 * float(one.input_scale)  # of bytes that were half-way
    assert len(runs) == 3
    assert runs[0] is runs[2]


def test_long_chains_are_computed_in_parts():
    one = layer(out_channels=4)
    one.chained = True
    grid = CodeGrid(float(one.input_scale), int(one.input_zero_point), 255)
    y = at_once = randn(2, 4, 5, 6)
    for _ in range(sys.getrecursionlimit() // 2):
        y, at_once = one(y), one(at_once)
        at_once.source.codes(grid)
    assert y.source.depth <= 65
    assert torch.equal(grid.decode(y.source.codes(grid)), at_once.plain())


@pytest.mark.parametrize("part", [slice(None), slice(None, None, 2)])
def test_what_a_layer_was_given_does_not_change_with_its_input(part):
    one = layer(seed=5, in_channels=8)
    later, plain = deferred_and_plain()
    later.mul_(0.1)
    expected = one(0.1 * plain[:, :, part])
    one.chained = True
    y = one(later[:, :, part])
    later.zero_()
    torch.testing.assert_close(y + 0, expected)


def test_floats_that_are_added_stay_floats_whoever_asks_for_bytes_later():
    (y, plain), (shortcut, other) = deferred_and_plain(), deferred_and_plain(seed=5)
    total = (y + shortcut).relu()
    total.source.settle(GRID)  # as the next layer does
    shortcut.source.codes(CodeGrid(0.7, 3, 15))
    assert_bytes(total, (plain + other).relu())


def test_layers_are_simulated_on_a_deferred_tensor_where_they_must_be():
    later, plain = deferred_and_plain()
    second = QuantConv2d(8, 3, 1, activation_bits=8)
    torch.testing.assert_close(second.train()(later), second.train()(plain))
    with torch.enable_grad():
        assert second.eval()(later).requires_grad


def test_unbatched_inputs_give_ordinary_tensors():
    one, x = layer(), randn(4, 12, 10)
    expected = one(x)
    one.chained = True
    assert type(one(x)) is torch.Tensor
    assert torch.equal(one(x), expected)
