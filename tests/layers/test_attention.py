"""NarrowMultiheadAttention against torch's attention with the same heads held at zero."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers import NarrowMultiheadAttention

E, HEADS, WIDTH = 12, 3, 4
KEPT = (0, 2)


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(E, HEADS, **options)
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
    return layer.eval()


def rows(heads, parts=1):
    return [part * E + head * WIDTH + i for part in range(parts) for head in heads for i in range(WIDTH)]


def without_head(layer):
    """Head 1 zero in one copy, cut out of the other."""
    masked, narrow = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            tensor = getattr(layer, name)
            if tensor is not None:
                parts = len(tensor) // E
                getattr(masked, name)[rows([1], parts)] = 0
                getattr(narrow, name).data = tensor.data[rows(KEPT, parts)]
        masked.out_proj.weight[:, rows([1])] = 0
        narrow.out_proj.weight.data = layer.out_proj.weight.data[:, rows(KEPT)]
    NarrowMultiheadAttention.narrow_(narrow)
    return masked, narrow


BIAS = torch.full((5, 5), -torch.inf).triu(1)
CALLS = [
    {},
    {"need_weights": False},
    {"attn_mask": BIAS},
    {"attn_mask": BIAS, "is_causal": True, "need_weights": False},
    {"attn_mask": BIAS.isinf(), "need_weights": False},
    {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
    {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5]), "attn_mask": BIAS.isinf()},
]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_same_as_heads_of_zeros(options, call):
    masked, narrow = without_head(make(**options))
    x = torch.randn((2, 5, E) if options.get("batch_first") else (5, 2, E))
    expected, _ = masked(x, x, x, **call)
    got, weights = narrow(x, x, x, **call)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert (weights is None) == (not call.get("need_weights", True))


def test_weights_of_the_heads_left():
    masked, narrow = without_head(make())
    x = torch.randn(5, 2, E)
    _, expected = masked(x, x, x, average_attn_weights=False)
    _, got = narrow(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(got, expected[:, list(KEPT)])
    _, mean = narrow(x, x, x)
    torch.testing.assert_close(mean, got.mean(1))


@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 6}])
def test_cross_attention_unbatched_and_a_mask_for_each_head(options):
    masked, narrow = without_head(make(**options))
    q, k, v = (torch.randn(5, size) for size in (E, options.get("kdim", E), options.get("vdim", E)))
    torch.testing.assert_close(narrow(q, k, v)[0], masked(q, k, v)[0], atol=1e-6, rtol=1e-5)
    assert narrow(q, k, v)[1].shape == (5, 5)
    biases = torch.randn(2 * HEADS, 5, 5)
    q, k, v = (x[:, None].repeat(1, 2, 1) for x in (q, k, v))
    kept = biases.unflatten(0, (2, HEADS))[:, list(KEPT)].flatten(0, 1)
    expected, _ = masked(q, k, v, attn_mask=biases)
    torch.testing.assert_close(narrow(q, k, v, attn_mask=kept)[0], expected, atol=1e-6, rtol=1e-5)


def test_attributes_pickle_and_training():
    _, narrow = without_head(make(dropout=0.5))
    assert (narrow.num_heads, narrow.head_dim, narrow.embed_dim, narrow.out_proj.weight.shape) == (2, 4, 12, (12, 8))
    x = torch.randn(5, 2, E)
    twin = pickle.loads(pickle.dumps(narrow))
    assert torch.equal(twin(x, x, x)[0], narrow(x, x, x)[0])
    for need_weights in (False, True):
        torch.manual_seed(0)
        first = narrow.train()(x, x, x, need_weights=need_weights)[0]
        assert not torch.equal(first, narrow(x, x, x, need_weights=need_weights)[0])
    first.sum().backward()
    assert narrow.in_proj_weight.grad.shape == (24, 12)


def test_whose_heads_fill_its_width_keeps_its_class():
    layer = make()
    layer.in_proj_weight.data = layer.in_proj_weight.data[rows(KEPT, 3)][:, rows(KEPT)]
    layer.in_proj_bias.data = layer.in_proj_bias.data[rows(KEPT, 3)]
    layer.out_proj.weight.data = layer.out_proj.weight.data[rows(KEPT)][:, rows(KEPT)]
    layer.out_proj.bias.data = layer.out_proj.bias.data[rows(KEPT)]
    NarrowMultiheadAttention.narrow_(layer)
    assert (type(layer), layer.num_heads, layer.embed_dim) == (nn.MultiheadAttention, 2, 8)
    narrow = copy.deepcopy(layer)
    narrow.__class__ = NarrowMultiheadAttention
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(layer(x, x, x), narrow(x, x, x))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_of_its_own_are_refused(options):
    with pytest.raises(UnsupportedLayerError, match="heads cannot be removed"):
        without_head(make(**options))


def test_exports():
    _, narrow = without_head(make())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = narrow

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(5, 2, E)
    program = torch.export.export(Net(), (x,)).module()
    torch.testing.assert_close(program(x), Net()(x))
