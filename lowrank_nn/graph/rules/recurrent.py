"""Recurrent layers and cells: a hidden unit is a row of every gate, and a column of what reads it at the next step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.labels import Labels, concatenate, contract, merge, split_dim
from lowrank_nn.graph.rules._call import Call, Planes, rule_for
from lowrank_nn.graph.rules.mixing import mix_all
from lowrank_nn.graph.units import OUT


@rule_for("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call) -> list[Planes]:
    """Hidden units go from all layers and directions at once: a module keeps one number of them."""
    packed = isinstance(call.args[3], (list, tuple))  # then the sizes of the batches come second
    states, weights, _, layers, _, _, both_ways = call.args[1 + packed : 8 + packed]
    directions = 1 + both_ways
    own = [call.labels(weight) for weight in weights]
    each = len(own) // (layers * directions)
    inputs, ends = _features(call, call.first), []
    for layer in range(layers):
        firsts = range(layer * directions * each, (layer + 1) * directions * each, each)
        ends += [_cell(call, inputs, own[first : first + each]) for first in firsts]
        outputs = [end for end, _ in ends[-directions:]]
        planes = concatenate(call.units, outputs, 0, call.where)
        inputs = Labels((sum(end.shape[0] for end in outputs),), tuple(planes))
    return _last([list(inputs.planes), *_states(call, ends, states)], call)


@rule_for("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(call: Call) -> list[Planes]:
    """One step of one layer."""
    states, *weights = call.args[1:]
    end = _cell(call, _features(call, call.first), [call.labels(weight) for weight in weights if weight is not None])
    return _last(_states(call, [end], states), call)


@rule_for("_pack_padded_sequence _pad_packed_sequence")
def pack(call: Call) -> list[Planes]:
    """Sequences of different lengths, one after the other or padded; the features stay what they are."""
    return _last([list(_features(call, call.first).planes), []], call)


def _features(call: Call, labels: Labels) -> Labels:
    """Return labels of the last dimension alone; what varies along others stays."""
    planes = mix_all(call, labels, range(len(labels.shape) - 1))
    return Labels(labels.shape[-1:], tuple(plane.reshape(-1) for plane in planes))


def _cell(call: Call, inputs: Labels, weights: Sequence[Labels]) -> tuple[Labels, Labels]:
    """Return the hidden units that a layer gives in one direction, and those of its cells: others if it projects."""
    units, where = call.units, call.where
    of_inputs, of_states, *rest = weights
    biases = [labels for labels in rest if len(labels.shape) == 1]
    projections = [labels for labels in rest if len(labels.shape) == 2]
    rows = contract(units, [(inputs, "i"), (of_inputs, "oi")], "o", where, weight=1)
    size = (projections or [of_states])[0].shape[1]
    cells = Labels((size,), tuple(plane[:size] for plane in rows))
    hidden = cells
    for projection in projections:
        planes = contract(units, [(cells, "i"), (projection, "oi")], "o", where, weight=1)
        hidden = Labels(projection.shape[:1], tuple(planes))
    again = contract(units, [(hidden, "i"), (of_states, "oi")], "o", where, weight=1)
    for bias in biases:
        units.mark(bias.ids(), OUT)
    gates = of_inputs.shape[:1]
    for plane in merge(units, [Labels(gates, tuple(rows)), Labels(gates, tuple(again)), *biases], where):
        parts = split_dim(plane, 0, size)
        units.unite(parts, parts[:1], f"meets what stays in {where}")
    return hidden, cells


def _states(call: Call, ends: Sequence[tuple[Labels, Labels]], given: Tensor | Sequence[Tensor]) -> list[Planes]:
    """Return the planes of the last states, after they met the first ones."""
    starts = [_features(call, call.labels(tensor)) for tensor in tensors(given)]
    return [
        merge(call.units, [*labels, start], call.where)
        for labels, start in zip(zip(*ends, strict=True), starts, strict=False)
    ]


def _last(results: list[Planes], call: Call) -> list[Planes]:
    """Return planes of features as those of the results, whose last dimension they are."""
    dims = [len(shape) for shape in call.shapes]
    return [[p.reshape(*(1,) * (n - 1), -1) for p in planes] for n, planes in zip(dims, results, strict=True)]
