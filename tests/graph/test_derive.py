"""Recordings that are derived, against recordings of the changed model itself."""

import copy

import pytest
import torch
from torch import nn

from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import model_cost, record, replace_module
from lowrank_nn.graph.derive import derive_recording, meta_copy
from lowrank_nn.layers import CPConv2d, QuantConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from tests.storage.models import SmallNet, seeded
from tests.zoo import ZOO


@pytest.mark.parametrize("name", list(ZOO))
def test_a_meta_copy_has_the_structure_and_no_numbers(name):
    model, _ = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ghost = meta_copy(model)
    assert [(p, type(m)) for p, m in ghost.named_modules(remove_duplicate=False)] == [
        (p, type(m)) for p, m in model.named_modules(remove_duplicate=False)
    ]
    assert all(tensor.is_meta for tensor in (*ghost.parameters(), *ghost.buffers()))
    signature = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in ghost.state_dict().items()} == signature
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_meta_copy_keeps_ties_flags_and_modes():
    model, _ = ZOO["tied"]()
    model.mix.weight.requires_grad_(False)
    model.block1.norm.train()
    ghost = meta_copy(model)
    assert ghost.output.weight is ghost.embed.weight
    assert ghost.block1.conv is ghost.block2.conv
    assert [p.requires_grad for p in ghost.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in ghost.modules()] == [m.training for m in model.modules()]


def test_a_model_that_cannot_be_copied_is_an_error_of_ours():
    model = SmallNet()
    model.feature = model.conv1(torch.ones(1, 3, 4, 4))  # a tensor with a graph
    with pytest.raises(LowRankError, match=r"copyable|deepcopy"):
        meta_copy(model)


def replaced(model):
    model.conv2 = TuckerConv2d.from_pretrained_layer(model.conv2, rank=(4, 3))
    model.fc = SVDLinear.from_pretrained_layer(model.fc, rank=5)
    return model


def comparable(recording):
    return sorted((s.path, type(s.layer), s.aliases, s.calls, s.inside) for s in recording.sites if s.calls)


def test_derived_calls_are_those_of_a_recording():
    model, inputs = seeded(SmallNet), torch.ones(2, 3, 9, 8)
    before = record(model, inputs)
    small = replaced(copy.deepcopy(model))
    derived, recorded = derive_recording(before, small), record(small, inputs)
    assert comparable(derived) == comparable(recorded)
    assert model_cost(small, derived) == model_cost(small, recorded)


@pytest.mark.parametrize(
    "make",
    [
        lambda conv: SVDConv2d.from_pretrained_layer(conv, rank=3),
        lambda conv: CPConv2d.from_pretrained_layer(conv, rank=4, factors=4),
        lambda conv: QuantConv2d.from_pretrained_layer(conv),
    ],
)
def test_stages_with_strides_and_padding(make):
    conv, inputs = seeded(lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 0))), torch.ones(2, 8, 11, 13)
    before, small = record(conv, inputs), make(conv)
    derived, recorded = derive_recording(before, small), record(small, inputs)
    assert comparable(derived) == comparable(recorded)
    assert model_cost(small, derived) == model_cost(small, recorded)


def test_layers_inside_of_layers():
    model, inputs = seeded(SmallNet), torch.ones(2, 3, 9, 8)
    before = record(model, inputs)
    small = replaced(copy.deepcopy(model))
    small = replace_module(small, "conv2.core", QuantConv2d.from_pretrained_layer(small.conv2.core))
    derived = derive_recording(before, small)
    assert derived["conv2.core"].inside == "conv2"
    assert comparable(derived) == comparable(record(small, inputs))


def test_shared_layers_keep_their_names():
    model, tokens = ZOO["tied"]()
    before = record(model, tokens)
    small = copy.deepcopy(model)
    small = replace_module(small, "mix", SVDLinear.from_pretrained_layer(small.mix, rank=4))
    derived = derive_recording(before, small)
    assert derived["block2.conv"].path == "block1.conv"
    assert len(derived["mix.reduce"].calls) == 2
    assert comparable(derived) == comparable(record(small, tokens))
