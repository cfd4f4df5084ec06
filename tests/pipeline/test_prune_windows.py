"""Heads of window attentions go, although their own forward cannot do with fewer."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers import NarrowWindowAttention, NarrowWindowAttentionV2, narrow
from tests.zoo.swin import Swin, WindowAttention, WindowAttentionV2

X = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
HALF = lnn.Prune(0.5, granularity="filter", where="*attention*")  # the channels that the attentions read stay
FORMS = [(WindowAttention, NarrowWindowAttention), (WindowAttentionV2, NarrowWindowAttentionV2)]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(narrow, "_FORMS", dict(narrow._FORMS))


def make(cls, seed=0):
    torch.manual_seed(seed)
    return Swin(cls).eval()


def shrink(model, *steps):
    return lnn.compress_model(model, X, list(steps), progress=False)


def attentions(model):
    return [block.attention for block in model.blocks]


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_heads_go_and_a_file_holds_the_rest(cls, form, tmp_path):
    lnn.register_narrow_form(cls, form.narrow_)
    model = make(cls)
    small = shrink(model, HALF).model
    assert [(type(layer), layer.num_heads, layer.head_dim) for layer in attentions(small)] == [(form, 2, 4)] * 2
    assert small.state_dict().keys() == model.state_dict().keys()
    assert [type(layer) for layer in attentions(model)] == [cls] * 2
    lnn.save(small, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", make(cls, seed=1))
    assert [type(layer) for layer in attentions(loaded)] == [form] * 2
    assert torch.equal(loaded(X), small(X))
    again = shrink(loaded, HALF).model
    assert [(type(layer), layer.num_heads) for layer in attentions(again)] == [(form, 1)] * 2
    lnn.save(again, tmp_path / "small.lrnn")
    assert torch.equal(lnn.load(tmp_path / "small.lrnn", make(cls, seed=1))(X), again(X))


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_low_rank_and_integer_layers_inside(cls, form, tmp_path):
    lnn.register_narrow_form(cls, form.narrow_)
    small = shrink(make(cls), HALF, lnn.LowRank(rank=lnn.Energy(0.6)), lnn.Quantize("int8")).model
    assert [type(layer) for layer in attentions(small)] == [form] * 2
    lnn.save(small, tmp_path / "small.lrnn")
    assert torch.equal(lnn.load(tmp_path / "small.lrnn", make(cls, seed=1))(X), small(X))


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_channels_that_it_reads_go_and_all_heads_stay(cls, form, tmp_path):
    """Only the linear layer inside holds a tensor that shrinks; the file still says what the attention became."""

    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), cls(8, [4, 4], [2, 2], 2)).eval()

    lnn.register_narrow_form(cls, form.narrow_)
    x = X.permute(0, 2, 3, 1)
    small = lnn.compress_model(build(0), x, [lnn.Prune(0.5, granularity="filter", where="0")], progress=False).model
    assert (type(small[2]), small[2].num_heads, small[2].qkv.in_features) == (form, 2, 4)
    lnn.save(small, tmp_path / "small.lrnn")
    assert torch.equal(lnn.load(tmp_path / "small.lrnn", build(1))(x), small(x))


def test_without_a_narrow_form_heads_stay():
    result = shrink(make(WindowAttention), HALF)
    assert [(type(layer), layer.num_heads) for layer in attentions(result.model)] == [(WindowAttention, 4)] * 2
    assert any("the forward fails" in reason for reason in result.report.left)


def test_a_wrong_narrow_form_is_rolled_back():
    lnn.register_narrow_form(WindowAttentionV2, NarrowWindowAttention.narrow_)
    result = shrink(make(WindowAttentionV2), HALF)
    assert [(type(layer), layer.num_heads) for layer in attentions(result.model)] == [(WindowAttentionV2, 4)] * 2


@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_torchvisions_classes_are_known_by_name(cls, form):
    name = f"Shifted{cls.__name__}"
    theirs = type(name, (cls,), {"__module__": "torchvision.models.swin_transformer"})
    assert [type(layer) for layer in attentions(shrink(make(theirs), HALF).model)] == [form] * 2
