"""Ranges of what layers take and return, against numpy on what forward hooks see."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_nn.errors import CalibrationError, OptionError, PlanError
from lowrank_nn.planning import collect_ranges
from tests.untouched import assert_untouched, snapshot


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Batch norm, dropout, a layer that is used twice, one that is never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout()
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.again(self.again(self.norm(self.conv(x)).relu()))
        return self.head(input=self.drop(x.mean((2, 3))))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().train()


def by_hand(model, batches):
    """Inputs of each layer, by forward hooks on a copy in eval mode."""
    model, seen = copy.deepcopy(model).eval(), {}
    for path, layer in model.named_modules():
        if not list(layer.children()):

            def hook(_, args, kwargs, path=path):
                seen.setdefault(path, []).append((*args, *kwargs.values())[0].detach().flatten())

            layer.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {path: torch.cat(parts).numpy() for path, parts in seen.items()}


PATHS = ["conv", "again", "head"]


def test_ranges_are_those_of_the_inputs_in_eval_mode():
    model, batches = net(), [randn(5, 3, 6, 6, seed=s) * (s + 1) for s in range(3)]
    ranges = collect_ranges(model, batches, PATHS)
    seen = by_hand(model, batches)
    for path in PATHS:
        assert ranges[path].input == (min(seen[path].min(), 0), max(seen[path].max(), 0))
    clipped = collect_ranges(model, batches, PATHS, observer="percentile")
    for path in PATHS:
        width = np.ptp(np.append(seen[path], 0)) / 1023
        assert abs(clipped[path].input[1] - max(np.percentile(seen[path], 99.99, method="higher"), 0)) <= 2 * width


def test_ranges_of_outputs_are_those_of_what_layers_return():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(layer.weight, -2)
    batches = [torch.full((1, 1, 2, 2), value) for value in (1.0, 3.0, -0.5)]
    assert collect_ranges(nn.Sequential(layer, nn.ReLU()), batches, ["0"])["0"].output == (-6, 1)


def test_the_mse_range_depends_on_the_bits():
    model, batches = net(), [randn(8, 3, 16, 16)]
    few = collect_ranges(model, batches, ["conv"], observer="mse", bits=3)
    many = collect_ranges(model, batches, ["conv"], observer="mse", bits=8)
    assert few["conv"].input[1] < 0.8 * many["conv"].input[1]


def test_results_do_not_depend_on_how_the_data_come_in_batches():
    model, x = net(), randn(24, 3, 6, 6)
    for observer in ("minmax", "percentile", "mse"):
        one = collect_ranges(model, x, ["conv"], observer=observer)
        assert one == collect_ranges(model, x.split(7), ["conv"], observer=observer)
        assert one == collect_ranges(model, iter(x.flip(0).split(5)), ["conv"], observer=observer)


def test_labels_are_ignored_and_the_number_of_batches_is_limited():
    model, x = net(), randn(12, 3, 6, 6)
    loader = DataLoader(TensorDataset(x, torch.arange(12)), batch_size=4)
    assert collect_ranges(model, loader, PATHS) == collect_ranges(model, x.split(4), PATHS)
    pulled = []

    def endless():
        while True:
            pulled.append(1)
            yield x[:4], None

    assert collect_ranges(model, endless(), PATHS, max_batches=2) == collect_ranges(model, x[:4], PATHS)
    assert len(pulled) == 2


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, a, b, scale=1.0):
        return self.left(a) + self.right(b) * scale


def test_models_of_two_inputs():
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]])
    expected = {"left": (-2, 1), "right": (0, 3)}
    for batches in (
        [(a, b)],
        [(a, b, 7)],
        [((a, b), 7)],
        [{"a": a, "b": b}],
        {"b": b, "a": a},
        [({"a": a, "b": b}, 7)],
    ):
        ranges = collect_ranges(Two(), batches, ["left", "right"])
        assert {path: found.input for path, found in ranges.items()} == expected


def test_layers_inside_the_fused_encoder_are_seen():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = randn(2, 5, 8)
    ranges = collect_ranges(encoder, [x], ["linear1", "linear2"])
    assert ranges["linear2"].input[0] == 0
    assert torch.backends.mha.get_fastpath_enabled()
    assert "forward" not in vars(encoder.linear1)


def test_the_model_itself_and_shared_layers_have_a_range():
    layer = nn.Linear(2, 2)
    assert collect_ranges(layer, torch.tensor([[1.0, -3.0]]), [""])[""].input == (-3, 1)
    shared = nn.Sequential(layer, layer)
    ranges = collect_ranges(shared, torch.tensor([[1.0, -3.0]]), ["0", "1", "0"])
    assert list(ranges) == ["0", "1"]
    assert ranges["0"] == ranges["1"]


@pytest.mark.parametrize("batch", [randn(2, 3, 6, 6), randn(2, 3, 6, 6) * float("nan"), randn(2, 5)])
def test_the_model_is_left_as_it_was_also_after_an_error(batch):
    model = net()
    model.head.eval()
    model.norm.forward = own = model.norm.forward
    before = snapshot(model)
    try:
        collect_ranges(model, [batch], PATHS)
    except CalibrationError:
        pass
    else:
        assert torch.isfinite(batch).all()
    assert_untouched(model, before)
    assert model.norm.forward is own


BAD_CALLS = [
    ([], PATHS, {}, CalibrationError, "calibration: there are no batches"),
    ([randn(1, 3, 4, 4)], ["conv", "unused"], {}, CalibrationError, "unused: calibration: the layer was never called"),
    ([randn(1, 3, 4, 4)], ["cnv"], {}, PlanError, "calibration: no layer at 'cnv'. There are: conv, norm, again"),
    (
        [randn(1, 3, 4, 4), randn(1, 3, 4, 4) / 0],
        PATHS,
        {},
        CalibrationError,
        "conv: calibration: there are NaN or infinite values",
    ),
    (
        [randn(1, 3, 4, 4), randn(1, 4)],
        PATHS,
        {},
        CalibrationError,
        "calibration: the forward failed on batch 2: RuntimeError",
    ),
    ([randn(1, 3, 4, 4)], PATHS, {"observer": "median"}, OptionError, "observer: must be one of"),
]


@pytest.mark.parametrize(("batches", "paths", "options", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused(batches, paths, options, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        collect_ranges(net(), batches, paths, **options)


def test_a_nan_is_reported_where_it_arises():
    model = net()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"^conv: calibration: there are NaN"):
        collect_ranges(model, [randn(1, 3, 4, 4)], PATHS)
