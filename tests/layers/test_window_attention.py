"""NarrowWindowAttention against attention over all pixels at once, with the same heads held at zero."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank_nn.layers import NarrowWindowAttention, NarrowWindowAttentionV2
from tests.zoo.swin import WindowAttention, WindowAttentionV2

DIM, HEADS, WIDTH = 12, 3, 4
KEPT = [0, 2]
FORMS = [(WindowAttention, NarrowWindowAttention), (WindowAttentionV2, NarrowWindowAttentionV2)]


def rows(heads, parts=1):
    return [part * DIM + head * WIDTH + i for part in range(parts) for head in heads for i in range(WIDTH)]


def make(cls, window=(4, 4), shift=(2, 2), **options):
    torch.manual_seed(0)
    layer = cls(DIM, list(window), list(shift), HEADS, **options).double()
    if layer.qkv.bias is not None:
        nn.init.normal_(layer.qkv.bias)
    return layer.eval()


def cut_(parameter, kept, dim=0):
    parameter.data = parameter.data.index_select(dim, torch.tensor(kept))


def without_head(layer, form):
    """Head 1 zero in one copy, cut out of the other."""
    masked, narrow = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        masked.proj.weight[:, rows([1])] = 0
    for parameter in narrow.qkv.parameters():
        cut_(parameter, rows(KEPT, 3))
    cut_(narrow.proj.weight, rows(KEPT), 1)
    if isinstance(layer, WindowAttentionV2):
        cut_(narrow.logit_scale, KEPT)
        cut_(narrow.cpb_mlp[2].weight, KEPT)
    else:
        cut_(narrow.relative_position_bias_table, KEPT, 1)
    narrow.num_heads = len(KEPT)
    narrow.qkv.out_features, narrow.proj.in_features = 3 * WIDTH * len(KEPT), WIDTH * len(KEPT)
    form.narrow_(narrow)
    return masked, narrow


@pytest.mark.parametrize(("cls", "form"), FORMS)
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 8), (4, 4), (2, 2)),
        ((8, 8), (4, 4), (0, 0)),
        ((9, 6), (4, 2), (2, 1)),
        ((4, 8), (4, 4), (2, 2)),
        ((3, 3), (4, 4), (2, 2)),
        ((8, 8), (4, 4), (0, 1)),
    ],
)
def test_same_as_heads_of_zeros(cls, form, size, window, shift):
    masked, narrow = without_head(make(cls, window, shift), form)
    x = torch.randn(2, *size, DIM, dtype=torch.float64)
    assert type(narrow) is form
    assert narrow.head_dim == WIDTH
    torch.testing.assert_close(narrow(x), masked(x))


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_gradients_and_no_bias(cls, form):
    masked, narrow = without_head(make(cls, bias=False), form)
    x = torch.randn(2, 8, 8, DIM, dtype=torch.float64)
    for layer in (masked, narrow):
        layer(x).square().sum().backward()
    torch.testing.assert_close(narrow.qkv.weight.grad, masked.qkv.weight.grad[rows(KEPT, 3)])
    torch.testing.assert_close(narrow.proj.weight.grad, masked.proj.weight.grad[:, rows(KEPT)])


def test_keys_of_the_second_version_have_no_bias():
    _, narrow = without_head(make(WindowAttentionV2), NarrowWindowAttentionV2)
    narrow(torch.randn(1, 8, 8, DIM, dtype=torch.float64)).square().sum().backward()
    _, keys, values = narrow.qkv.bias.grad.chunk(3)
    assert not keys.any()
    assert values.all()


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_whose_heads_fill_its_channels_keeps_its_class(cls, form):
    layer = make(cls)
    form.narrow_(layer)
    assert type(layer) is cls


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_dropouts_pickle_and_export(cls, form):
    _, narrow = without_head(make(cls).float(), form)
    x = torch.randn(2, 7, 8, DIM)
    assert torch.equal(pickle.loads(pickle.dumps(narrow))(x), narrow(x))
    torch.testing.assert_close(torch.export.export(narrow, (x,)).module()(x), narrow(x))
    for name in ("attention_dropout", "dropout"):
        dropping = copy.deepcopy(narrow)
        setattr(dropping, name, 0.5)
        assert torch.equal(dropping(x), narrow(x))
        assert not torch.equal(dropping.train()(x), narrow(x))
