"""Costs of sites and models, against torch's FlopCounterMode and against counting by hand."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lowrank_nn.cost import Cost, dense_macs
from lowrank_nn.errors import PlanError
from lowrank_nn.graph import call_model, model_cost, record, replace_module, site_cost
from lowrank_nn.layers import LAYERS, SVDConv2d, SVDLinear
from tests.zoo import ZOO


def counted_macs(model, inputs):
    """Multiply-accumulates by torch's own counter, on kernels that it knows (no fused attention, no oneDNN LSTM)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.backends.mkldnn.enabled = False
        stack.callback(setattr, torch.backends.mkldnn, "enabled", True)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        counter = stack.enter_context(FlopCounterMode(display=False))
        call_model(model, inputs)
    return counter.get_total_flops() / 2


CONVOLUTIONS = [
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
]


@given(
    kind=st.sampled_from(CONVOLUTIONS),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    batch=st.sampled_from([None, 1, 3]),
    same=st.booleans(),
)
def test_convolution_formulas(kind, groups, kernel, stride, padding, dilation, batch, same):
    dims = int(kind.__name__[-2])
    assume(not same or (stride == 1 and "Transpose" not in kind.__name__))
    sizes = [8, 7, 9][:dims]
    pad = "same" if same else padding
    layer = kind(4, 8, kernel, stride=stride, padding=pad, dilation=dilation, groups=groups)
    x = torch.zeros(*([] if batch is None else [batch]), 4, *sizes)
    assert dense_macs(layer, x.shape) == counted_macs(layer, x) > 0
    recording = record(layer, x)
    assert recording.other_macs == 0
    assert model_cost(layer, recording).macs == dense_macs(layer, x.shape)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_linear_formula(shape):
    layer = nn.Linear(6, 5)
    assert model_cost(layer, record(layer, torch.zeros(shape))).macs == counted_macs(layer, torch.zeros(shape))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
)
def test_recurrent_formula(kind, shape, options):
    layer = kind(6, 5, **options)
    x = torch.zeros(shape)
    assert model_cost(layer, record(layer, x)).macs == counted_macs(layer, x) > 0


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("layer", [nn.LSTM(6, 5, proj_size=3), nn.LSTMCell(6, 5), nn.GRUCell(6, 5), nn.RNNCell(6, 5)])
def test_recurrent_cells_and_projections(layer):
    x = torch.zeros(4, 6)
    assert model_cost(layer, record(layer, x)).macs == counted_macs(layer, x) > 0


@pytest.mark.parametrize("name", ZOO)
def test_macs_of_the_zoo(name):
    model, inputs = ZOO[name]()
    assert model_cost(model, record(model, inputs)).macs == counted_macs(model, inputs) > 0


@pytest.mark.parametrize("name", ZOO)
def test_storage_of_the_zoo(name):
    model, inputs = ZOO[name]()
    cost = model_cost(model, record(model, inputs))
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    assert cost.params == cost.nonzeros == sum(p.numel() for p in model.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in stored)


def compressed_resnet():
    model, inputs = ZOO["resnet20"]()
    for path in ("layer1.0.conv1", "layer3.1.conv2"):
        replace_module(model, path, SVDConv2d.from_pretrained_layer(model.get_submodule(path), rank=8))
    replace_module(model, "linear", SVDLinear.from_pretrained_layer(model.linear, rank=4))
    return model, inputs


def test_compressed_layers_count_once():
    model, inputs = compressed_resnet()
    recording = record(model, inputs)
    cost = model_cost(model, recording)
    assert cost.macs == counted_macs(model, inputs)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert site_cost(recording["linear"]) == Cost(4 * 74 + 10, 2 * 4 * 74, 4 * (4 * 74 + 10), 4 * 74 + 10)


def test_compressed_layers_inside_compressed_layers():
    model, inputs = compressed_resnet()
    expand = model.layer3[1].conv2.expand
    replace_module(model, "layer3.1.conv2.expand", SVDConv2d.from_pretrained_layer(expand, rank=3))
    cost = model_cost(model, record(model, inputs))
    assert cost.macs == counted_macs(model, inputs)
    assert cost.params == sum(p.numel() for p in model.parameters())


class Packed(SVDLinear):
    """Claims two bytes less and one zero: what masked and quantized layers do."""

    def cost(self, input_shape):
        return super().cost(input_shape) - Cost(bytes=2, nonzeros=1)


def test_a_layer_that_says_its_own_cost_is_believed():
    model = nn.Sequential(Packed(6, 5, rank=2), nn.Linear(5, 5))
    cost = model_cost(model, record(model, torch.zeros(3, 6)))
    params = sum(p.numel() for p in model.parameters())
    assert cost == Cost(params, 3 * (2 * 11 + 25), 4 * params - 2, params - 1)


def test_shared_compressed_layers_count_their_tensors_once_and_every_call():
    layer = SVDLinear(6, 6, rank=2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    cost = model_cost(model, record(model, torch.zeros(3, 6)))
    assert (cost.params, cost.macs) == (30, 2 * 3 * 24)


def test_tensors_tied_between_layers_count_once():
    compressed, dense = SVDLinear(6, 6, rank=6), nn.Linear(6, 6)
    dense.weight = compressed.expand.weight
    other = SVDLinear(6, 6, rank=6)
    other.reduce.weight = compressed.expand.weight
    model = nn.Sequential(dense, compressed, other)
    cost = model_cost(model, record(model, torch.zeros(3, 6)))
    assert cost.params == sum(p.numel() for p in model.parameters()) == 3 * 36 + 3 * 6
    assert cost.bytes == 4 * cost.params


def test_a_layer_inside_a_compressed_layer_that_is_called_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = SVDLinear(6, 5, rank=2)

        def forward(self, x):
            return self.fc(x), self.fc.reduce(x)

    recording = record(Model(), torch.zeros(3, 6))
    assert site_cost(recording["fc"]).macs == 3 * 2 * 11
    assert recording.other_macs == 3 * 2 * 6


@pytest.mark.parametrize("name", LAYERS)
def test_reading_a_weight_counts_what_it_takes(name):
    cls = LAYERS[name]
    sizes = (8, 8) if cls.replaces is nn.Linear else (8, 8, 3)
    dense = cls.replaces(*sizes)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = cls.from_pretrained_layer(dense, **cls.usual_options(dense))

        def forward(self, x):
            return x + self.layer.weight.sum() * self.layer.weight.sum()

    model, x = Model(), torch.zeros(3)
    recording = record(model, x)
    assert (recording["layer"].weight_reads, recording.other_macs) == (2, 0)
    assert model_cost(model, recording).macs == counted_macs(model, x)
    assert vars(model.layer).get("dense_weight") is None


def test_never_called_compressed_layers_count_their_tensors():
    model = nn.ModuleDict({"used": nn.Linear(6, 5), "unused": SVDLinear(6, 5, rank=2)})
    model.forward = lambda x: model["used"](x)
    recording = record(model, torch.zeros(3, 6))
    assert recording["unused"].calls == ()
    assert model_cost(model, recording) == Cost(62, 90, 248, 62)


def test_products_outside_the_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.weight = nn.Linear(4, 4), nn.Parameter(torch.zeros(4, 7))

        def forward(self, x):
            return self.fc(x) @ self.weight

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(7, 2))

        def forward(self, x):
            return x @ self.weight

    model = nn.Sequential(Model(), Leaf())
    recording = record(model, torch.zeros(3, 4))
    assert recording.other_macs == 3 * 4 * 7 + 3 * 7 * 2
    assert model_cost(model, recording).macs == 3 * 16 + recording.other_macs


@pytest.mark.parametrize(
    ("product", "macs"),
    [
        (lambda x: x @ x.T, 3 * 3 * 4),
        (lambda x: x @ x[0], 12),
        (lambda x: torch.addmv(x[:, 0], x, x[0]), 12),
        (lambda x: x[0] @ x[0], 4),
        (lambda x: torch.einsum("ij,kj->ik", x, x), 36),
        (lambda x: nn.functional.conv1d(x[None], x[None]), 12),
        (lambda x: nn.functional.linear(x[0], x), 12),
        (torch.inference_mode()(lambda x: x @ x.T), 3 * 3 * 4),
        (lambda x: x + x, 0),
    ],
)
def test_functional_products(product, macs):
    model = nn.Module()
    model.forward = product
    assert record(model, torch.zeros(3, 4)).other_macs == macs


def test_a_layer_that_does_less_than_its_formula_takes_nothing_from_the_others():
    class Lazy(nn.Linear):
        def forward(self, x):
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lazy = Lazy(4, 4)

        def forward(self, x):
            return self.lazy(x) @ x.T

    assert record(Model(), torch.zeros(3, 4)).other_macs == 3 * 3 * 4


def test_layers_inside_a_linear_layer_count_beside_it():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.down, self.up = nn.Linear(4, 1), nn.Linear(1, 4)

        def forward(self, x):
            return super().forward(x) + self.up(self.down(x))

    model = Adapted()
    x = torch.zeros(3, 4)
    assert model_cost(model, record(model, x)).macs == counted_macs(model, x)


def test_fused_attention_counts_as_its_two_products():
    class Model(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    inputs = (torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8))
    assert record(Model(), inputs).other_macs == counted_macs(Model(), inputs) == 2 * (2 * 3 * 5 * 7 * 8)


def test_the_recording_must_be_of_this_model():
    model, inputs = ZOO["lenet5"]()
    recording = record(model, inputs)
    replace_module(model, "fc1", nn.Linear(400, 120))
    with pytest.raises(PlanError, match=r"at \['fc1'\] are not the recorded ones"):
        model_cost(model, recording)


def test_what_if_a_site_held_another_layer():
    model, inputs = ZOO["lenet5"]()
    site = record(model, inputs)["fc1"]
    planned = dataclasses.replace(site, layer=SVDLinear(400, 120, rank=5, device="meta"))
    assert site_cost(planned).macs == 2 * 5 * 520
