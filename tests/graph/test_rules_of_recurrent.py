"""Recurrent layers and cells: hidden units go from all gates, layers and directions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lowrank_nn as lnn
from lowrank_nn.graph import find_groups
from tests.graph.removal import assert_removable
from tests.zoo._seeded import seeded

X = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, something recurrent over its columns, and a layer that reads it."""

    def __init__(self, inner, width, call):
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv1d(5, 8, 3), inner, nn.Linear(width, 4)
        self.hidden = 6
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.call = call

    def forward(self, x):
        return self.head(self.call(self, F.relu(self.conv(x)).transpose(1, 2)))


def with_cells(net, columns):
    state, outputs = None, []
    for column in columns.unbind(1):
        state = net.inner(column, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, 1)


def packed(net, columns):
    sequence = pack_padded_sequence(columns, [10, 7, 2], batch_first=True)
    output, (last, _) = net.inner(sequence)
    return pad_packed_sequence(output, batch_first=True)[0].mean(1) + last[-1]


def from_parameter(net, columns):
    return net.inner(columns, net.start.expand(1, columns.shape[0], -1))[1][0]


def from_zeros(net, columns):
    start = torch.zeros(1, columns.shape[0], net.hidden, dtype=columns.dtype)
    return net.inner(columns, (start, columns.new_zeros(start.shape)))[0][:, -1]


def first(net, columns):
    return net.inner(columns)[0]


def last_states(net, columns):
    return torch.cat([*net.inner(columns)[1]], -1)


CASES = {
    "LSTM": (lambda: nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), 12, first, 6),
    "LSTM, projected": (lambda: nn.LSTM(8, 6, proj_size=2, bidirectional=True), 4, first, 2),
    "LSTM, packed": (lambda: nn.LSTM(8, 6, batch_first=True), 6, packed, 6),
    "LSTM, zeros": (lambda: nn.LSTM(8, 6, batch_first=True), 6, from_zeros, 6),
    "GRU": (lambda: nn.GRU(8, 6, bidirectional=True, batch_first=True), 12, last_states, 6),
    "GRU, learned start": (lambda: nn.GRU(8, 6, batch_first=True), 6, from_parameter, 6),
    "RNN": (lambda: nn.RNN(8, 6, 2, nonlinearity="relu", bias=False), 6, first, 6),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), 6, with_cells, 6),
    "GRUCell": (lambda: nn.GRUCell(8, 6, bias=False), 6, with_cells, 6),
    "RNNCell": (lambda: nn.RNNCell(8, 6), 6, with_cells, 6),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    inner, width, call, hidden = request.param
    model, _ = seeded(lambda: (Net(inner(), width, call).double().eval(), None))()
    return model, hidden


def test_hidden_units_can_go(case):
    model, hidden = case
    groups = [group for group in find_groups(model, X) if not group.frozen]
    if model.call is not from_zeros:  # by hand nothing lowers ``hidden``
        assert_removable(model, X, groups)
    sizes = {group.name.split(".")[0]: group.size for group in groups}
    assert sizes["conv"] == 8
    assert hidden in {group.size for group in groups if any(m.name.startswith("inner") for m in group.members)}


def test_they_are_removed_proven_and_saved(case, tmp_path):
    model, _ = case
    result = lnn.compress_model(model, X, [lnn.Prune(0.5, granularity="filter")], progress=False)
    assert (result.model.conv.out_channels, result.model.inner.input_size) == (4, 4)
    assert result.model.inner.hidden_size == 3
    assert set(result.report.left) <= {"Prune: reaches the output of the model"}
    row = next(row for row in result.report.rows if row.path == "inner")
    assert row.options == "in=4/8 hidden=3/6"
    assert row.after.macs < row.before.macs / 2
    lnn.save(result.model, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", model)
    assert torch.equal(loaded(X), result.model(X))


def test_states_from_outside_keep_their_width():
    model, _ = seeded(lambda: (nn.Sequential(nn.Linear(5, 8), nn.GRU(8, 6)).eval(), None))()

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, start):
            return self.inner[1](self.inner[0](x), start)[0].sum(-1)

    groups = find_groups(Outside(), (torch.randn(4, 2, 5), torch.randn(1, 2, 6)))
    frozen = {group.name: group.frozen for group in groups}
    assert frozen == {
        "inner.0": "",
        "inner.1.weight_ih_l0": "meets a tensor that has no such channels in gru in inner.1",
    }
