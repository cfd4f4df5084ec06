"""SplitMultiheadAttention against torch's own attention with the same weights."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_nn.errors import OptionError, UnsupportedLayerError
from lowrank_nn.layers import NarrowMultiheadAttention, QuantLinear, SplitMultiheadAttention, SVDLinear

E, HEADS, LENGTH = 12, 3, 5


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(E, HEADS, **options)
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
    return layer.eval()


def split(layer):
    new = copy.deepcopy(layer)
    SplitMultiheadAttention.split_(new)
    return new


def inputs(layer, length=LENGTH, batch=2):
    torch.manual_seed(1)
    lengths = (length, length + 1, length + 1)
    tensors = [torch.randn(n, batch, size) for n, size in zip(lengths, (E, layer.kdim, layer.vdim), strict=True)]
    return [x.transpose(0, 1) for x in tensors] if layer.batch_first else tensors


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 7, "vdim": 6},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "kdim": 9},
    {"dtype": torch.float64},
]
BIAS = torch.full((LENGTH, LENGTH + 1), -torch.inf).triu(2)
PADDING = torch.tensor([[False] * LENGTH + [True], [False] * (LENGTH + 1)])
CALLS = [
    {},
    {"average_attn_weights": False},
    {"need_weights": False},
    {"attn_mask": BIAS},
    {"attn_mask": BIAS.isinf(), "need_weights": False},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": PADDING, "attn_mask": BIAS.isinf(), "need_weights": False},
    {"attn_mask": torch.randn(2 * HEADS, LENGTH, LENGTH + 1, generator=torch.Generator().manual_seed(2))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(call) or "plain")
def test_same_as_torch(options, call):
    layer = make(**options)
    dtype = options.get("dtype", torch.float32)
    q, k, v = (x.to(dtype) for x in inputs(layer))
    call = {name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in call.items()}
    expected, expected_weights = layer(q, k, v, **call)
    got, weights = split(layer)(q, k, v, **call)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype is torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(weights, expected_weights, **tolerance)


@pytest.mark.parametrize("masks", ["none", "matrix", "heads", "padding"])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_batches_and_sequences(batch, queries, keys, masks):
    layer = make(batch_first=True)
    q, k, v = torch.randn(batch, queries, E), torch.randn(batch, keys, E), torch.randn(batch, keys, E)
    call = {
        "none": {},
        "matrix": {"attn_mask": torch.randn(queries, keys)},
        "heads": {"attn_mask": torch.randn(batch * HEADS, queries, keys)},
        "padding": {"key_padding_mask": torch.zeros(batch, keys, dtype=torch.bool)},
    }[masks]
    torch.testing.assert_close(split(layer)(q, k, v, **call), layer(q, k, v, **call))


@pytest.mark.parametrize("call", [{}, {"key_padding_mask": PADDING[0]}, {"attn_mask": BIAS, "need_weights": False}])
def test_unbatched(call):
    layer = make()
    q, k, v = (x[:, 0] for x in inputs(layer))
    torch.testing.assert_close(split(layer)(q, k, v, **call), layer(q, k, v, **call), atol=1e-6, rtol=1e-5)


def test_causal_hint():
    layer = make(batch_first=True)
    x = torch.randn(2, LENGTH, E)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    call = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(split(layer)(x, x, x, **call)[0], layer(x, x, x, **call)[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(OptionError, match="is_causal is a hint about attn_mask, which is missing"):
        split(layer)(x, x, x, is_causal=True)


def test_gradients_are_those_of_torch():
    layer = make(add_bias_kv=True, dtype=torch.float64).train()
    twin = split(layer)
    q, k, v = (x.double() for x in inputs(layer))
    for module in (layer, twin):
        module(q, k, v)[0].square().sum().backward()
    joined = torch.cat([twin.q_proj.weight.grad, twin.k_proj.weight.grad, twin.v_proj.weight.grad])
    torch.testing.assert_close(joined, layer.in_proj_weight.grad)
    biases = torch.cat([twin.q_proj.bias.grad, twin.k_proj.bias.grad, twin.v_proj.bias.grad])
    torch.testing.assert_close(biases, layer.in_proj_bias.grad, atol=1e-9, rtol=1e-9)
    for name in ("bias_k", "bias_v", "out_proj.weight", "out_proj.bias"):
        torch.testing.assert_close(twin.get_parameter(name).grad, layer.get_parameter(name).grad)


def test_dropout_only_in_training():
    twin = split(make(dropout=0.5)).train()
    q, k, v = inputs(twin)
    for need_weights in (False, True):
        torch.manual_seed(0)
        first = twin(q, k, v, need_weights=need_weights)[0]
        assert not torch.equal(first, twin(q, k, v, need_weights=need_weights)[0])
        assert torch.equal(*(twin.eval()(q, k, v, need_weights=need_weights)[0] for _ in range(2)))
        twin.train()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_from_scratch_as_torch_draws(options):
    layer = make(3, **options)
    torch.manual_seed(3)
    fresh = SplitMultiheadAttention(E, HEADS, **options).eval()
    expected = split(layer).state_dict()
    assert list(fresh.state_dict()) == list(expected)
    for key, value in fresh.state_dict().items():
        if not key.endswith(".bias"):
            assert torch.equal(value, expected[key])
    if options.get("bias", True):
        assert not torch.cat([fresh.q_proj.bias, fresh.v_proj.bias, fresh.out_proj.bias]).any()


def test_splitting_draws_nothing_and_keeps_flags():
    layer = make().train()
    layer.in_proj_weight.requires_grad_(False)
    layer.out_proj.weight.requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = torch.get_rng_state()
    SplitMultiheadAttention.split_(layer)
    projection = layer.q_proj
    SplitMultiheadAttention.split_(layer)
    assert layer.q_proj is projection
    assert torch.equal(torch.get_rng_state(), before)
    flags = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert flags == {f"{part}.weight": False for part in parts} | {f"{part}.bias": True for part in parts}
    assert all(module.training for module in layer.modules())
    layer(*inputs(layer))
    assert calls == [1]


def test_pickle_copy_and_state():
    twin = split(make(kdim=7, vdim=6))
    x = inputs(twin)
    for again in (pickle.loads(pickle.dumps(twin)), copy.deepcopy(twin)):
        assert torch.equal(again(*x)[0], twin(*x)[0])
    other = SplitMultiheadAttention(E, HEADS, kdim=7, vdim=6).eval()
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(*x)[0], twin(*x)[0])
    assert isinstance(twin, nn.MultiheadAttention)


def test_on_meta():
    with torch.device("meta"):
        layer = nn.MultiheadAttention(E, HEADS)
    SplitMultiheadAttention.split_(layer)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    x = torch.empty(LENGTH, 2, E, device="meta")
    assert layer(x, x, x)[0].shape == x.shape


def test_one_with_fewer_heads():
    narrow = make()
    keep = [0, 1, 2, 3, 8, 9, 10, 11]
    rows = [part * E + i for part in range(3) for i in keep]
    for tensor in (narrow.in_proj_weight, narrow.in_proj_bias):
        tensor.data = tensor.data[rows]
    narrow.out_proj.weight.data = narrow.out_proj.weight.data[:, keep]
    NarrowMultiheadAttention.narrow_(narrow)
    twin, x = split(narrow), inputs(narrow)
    torch.testing.assert_close(twin(*x), narrow(*x), atol=1e-6, rtol=1e-5)
    assert (twin.num_heads, twin.q_proj.weight.shape, twin.embed_dim) == (2, (8, E), E)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_projections_are_compressed_like_any_layer(name):
    twin = split(make(batch_first=True))
    x = inputs(twin)
    expected = twin(*x)[0]
    setattr(twin, name, SVDLinear.from_pretrained_layer(twin.get_submodule(name), rank=E))
    torch.testing.assert_close(twin(*x)[0], expected, atol=1e-5, rtol=1e-5)
    setattr(twin, name, SVDLinear.from_pretrained_layer(twin.get_submodule(name).to_dense_layer(), rank=2))
    assert (twin(*x)[0] - expected).norm() > 1e-2 * expected.norm()
    twin.get_submodule(name).expand = QuantLinear.from_pretrained_layer(twin.get_submodule(name).expand, bits=8)
    assert torch.isfinite(twin(*x)[0]).all()


def _overriding(layer):
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)[0]

    layer.__class__ = Doubled
    return layer


def _patched(layer):
    layer.forward = lambda *args: args
    return layer


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (_overriding, "Doubled overrides"),
        (_patched, "MultiheadAttention overrides"),
        (lambda layer: parametrizations.weight_norm(layer, "in_proj_weight"), "computed before each call"),
        (lambda layer: prune.identity(layer, "in_proj_weight") and layer, "computed before each call"),
    ],
)
def test_altered_ones_are_refused(alter, reason):
    layer = alter(make())
    kind, state = type(layer), list(layer.state_dict())
    with pytest.raises(UnsupportedLayerError, match=rf"SplitMultiheadAttention: .*{reason}"):
        SplitMultiheadAttention.split_(layer)
    assert (type(layer), list(layer.state_dict())) == (kind, state)


def test_exports():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = split(make())

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(5, 2, E)
    program = torch.export.export(Net(), (x,)).module()
    torch.testing.assert_close(program(x), Net()(x))


@pytest.mark.cuda
def test_on_cuda(device):
    layer = make(add_bias_kv=True, add_zero_attn=True)
    twin, x = split(layer).to(device), inputs(layer)
    expected = layer(*x, key_padding_mask=PADDING)[0]
    torch.testing.assert_close(
        twin(*(t.to(device) for t in x), key_padding_mask=PADDING.to(device))[0].cpu(), expected, atol=1e-4, rtol=1e-4
    )
