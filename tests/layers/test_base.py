import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_nn.errors import LowRankError, OptionError, RankError, UnsupportedLayerError
from lowrank_nn.layers import (
    LAYERS,
    CompressedLinear,
    QuantConv2d,
    SVDConv2d,
    SVDLinear,
    layer_cost,
    layer_output_shape,
    read_layer,
    register_layer,
)
from lowrank_nn.testing import CASES


class DoublingConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class ShiftingConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) + 1


class RenamedConv(nn.Conv2d):
    """Changes nothing that matters."""


def with_weight(value):
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = value
    return layer


BAD_SOURCES = [
    (lambda: nn.Linear(3, 4), "SVDConv2d: expected an nn.Conv2d, got Linear. Choose the compressed class"),
    (lambda: nn.ConvTranspose2d(3, 4, 3), "SVDConv2d: expected an nn.Conv2d, got ConvTranspose2d"),
    (lambda: nn.Conv1d(3, 4, 3), "SVDConv2d: expected an nn.Conv2d, got Conv1d"),
    (lambda: nn.LazyConv2d(4, 3), "SVDConv2d: LazyConv2d has no weight yet. Run the model once"),
    (lambda: with_weight(float("nan")), "SVDConv2d: the weight holds NaN or infinite values. Look for"),
    (lambda: with_weight(-float("inf")), "SVDConv2d: the weight holds NaN or infinite values"),
    (
        lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64),
        "SVDConv2d: expected a real floating-point weight, got torch.c",
    ),
    (
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        "SVDConv2d: ParametrizedConv2d has a parametrized weight, which would be lost. Call torch.nn.utils",
    ),
    (
        lambda: prune.identity(nn.Conv2d(3, 4, 3), "weight"),
        "SVDConv2d: the weight of Conv2d is computed before each call .* remove_spectral_norm or prune.remove",
    ),
    (lambda: DoublingConv(3, 4, 3), "SVDConv2d: DoublingConv overrides nn.Conv2d.forward, which would be lost. Keep"),
    (lambda: ShiftingConv(3, 4, 3), "SVDConv2d: ShiftingConv overrides nn.Conv2d._conv_forward"),
    (
        lambda: SVDConv2d(3, 4, 3, rank=2),
        "SVDConv2d: the layer is a SVDConv2d already, expected Conv2d. Put low-rank steps first",
    ),
    (lambda: SVDLinear(3, 4, rank=2), "SVDConv2d: the layer is a SVDLinear already"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:Complex modules are a new feature")
@pytest.mark.parametrize(("make", "message"), BAD_SOURCES)
def test_sources_that_cannot_be_carried_over_are_refused(make, message):
    source = make()
    with pytest.raises(UnsupportedLayerError, match=f"^{message}"):
        read_layer(source, SVDConv2d)
    with pytest.raises(TypeError, match=f"^{message}"):
        SVDConv2d.from_pretrained_layer(source, rank=2)


def test_a_forward_set_on_the_instance_is_refused():
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x
    with pytest.raises(UnsupportedLayerError, match=r"^SVDLinear: Linear overrides nn\.Linear\.forward"):
        read_layer(layer, SVDLinear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"^SVDLinear: the weight is empty, shape \(4, 0\)"):
        read_layer(nn.Linear(0, 4), SVDLinear)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_of_a_layer_is_read(case):
    layer = case.layer()
    cls = {nn.Conv2d: SVDConv2d, nn.Linear: SVDLinear}[case.kind]
    source = read_layer(layer, cls)
    assert source.layer is layer
    assert torch.equal(source.weight, layer.weight)
    assert not source.weight.requires_grad
    assert (source.bias is None) == (layer.bias is None)
    rebuilt = case.kind(**source.arguments, dtype=case.dtype)
    assert repr(rebuilt) == repr(layer)


def test_a_subclass_that_changes_nothing_is_read():
    assert read_layer(RenamedConv(3, 4, 3, padding=1), SVDConv2d).arguments["padding"] == (1, 1)


def test_only_the_classes_stacked_on_may_be_compressed_again():
    class OnTop(SVDLinear):
        stacks_on = (SVDLinear,)

    below = SVDLinear(6, 4, rank=2)
    source = read_layer(below, OnTop)
    assert torch.equal(source.weight, below.dense_weight())
    assert source.arguments == {"in_features": 6, "out_features": 4, "bias": True}
    with pytest.raises(UnsupportedLayerError, match="is a SVDConv2d already, expected Linear or SVDLinear"):
        read_layer(SVDConv2d(3, 4, 3, rank=2), OnTop)


def test_flags_of_weight_and_bias_are_kept_apart():
    layer = nn.Linear(6, 4)
    layer.weight.requires_grad_(False)
    new = SVDLinear.from_pretrained_layer(layer, rank=2)
    assert [p.requires_grad for p in new.parameters()] == [False, False, True]


@pytest.fixture
def registry():
    before = dict(LAYERS)
    yield LAYERS
    LAYERS.clear()
    LAYERS.update(before)


def test_a_registered_class_is_found_by_name(registry):
    class Mine(SVDLinear):
        pass

    assert register_layer(Mine) is Mine
    assert registry["Mine"] is Mine
    assert register_layer(Mine) is Mine


def test_two_classes_of_one_name_are_refused(registry):
    other = type("SVDLinear", (SVDLinear,), {})
    with pytest.raises(
        LowRankError, match=re.escape("SVDLinear: a layer of this name is registered already (lowrank_nn")
    ):
        register_layer(other)
    assert registry["SVDLinear"] is SVDLinear


def test_a_class_that_leaves_the_contract_unfilled_cannot_be_built():
    class Unfinished(CompressedLinear):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished(3, 4)


def test_layers_without_a_class_of_their_own_are_counted_by_formula():
    assert layer_cost(nn.Linear(3, 4), (5, 3)).macs == 60
    assert layer_cost(SVDLinear(3, 4, rank=2), (5, 3)).macs == 5 * 2 * (3 + 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_shapes_of_dense_layers_are_torchs(case):
    if "even_kernel" in case.name:
        shape = (*case.input_shape[:-3], 8, *case.input_shape[-2:])
    else:
        shape = tuple(case.layer()(case.input()).shape)
    assert layer_output_shape(case.layer(), case.input_shape) == shape


def test_an_empty_layer_draws_no_random_number():
    before = torch.get_rng_state()
    layer = SVDConv2d.empty(device=None, dtype=torch.float64, in_channels=3, out_channels=4, kernel_size=3, rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.reduce.weight.device.type == "cpu"
    assert layer.reduce.weight.dtype == torch.float64


def test_repr_is_the_constructor_call_without_defaults_that_do_not_matter():
    layer = SVDLinear(6, 4, rank=2)
    assert repr(layer).startswith("SVDLinear(\n  in_features=6, out_features=4, rank=2\n")
    assert repr(SVDLinear(6, 4, bias=False, rank=2)).startswith(
        "SVDLinear(\n  in_features=6, out_features=4, rank=2, bias=False\n"
    )
    strided = QuantConv2d(4, 8, 3, stride=(2, 1), padding=1, bits=4)
    assert repr(strided) == (
        "QuantConv2d(in_channels=4, out_channels=8, kernel_size=(3, 3), stride=(2, 1), padding=(1, 1), bits=4, "
        "activation_bits=None)"
    )
    assert layer.config() == {"in_features": 6, "out_features": 4, "rank": 2, "bias": True}


def test_a_deep_copy_of_a_copy_is_independent():
    layer = SVDLinear(6, 4, rank=2)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.reduce.weight.zero_()
    assert layer.dense_weight().any()


@pytest.mark.parametrize("rank", [0, 5, -1, 2.0, True, "2", None])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(RankError, match=r"^SVDLinear: rank must be"):
        SVDLinear(6, 4, rank=rank)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"padding_mode": "zero"},
            "padding_mode must be one of 'zeros', 'reflect', .*, got 'zero'",
        ),
        ({"padding": "SAME"}, "padding must be 'same', 'valid' or numbers, got 'SAME'"),
        ({"padding": "same", "stride": (1, 2)}, r"padding='same' is for stride 1, got stride=\(1, 2\)"),
        ({"padding": (0, -1)}, "padding must be a whole number from 0, got -1"),
        ({"stride": 0}, "stride must be a whole number from 1, got 0"),
        ({"dilation": 0}, "dilation must be a whole number from 1, got 0"),
        ({"kernel_size": (3, 0)}, "kernel_size must be a whole number from 1, got 0"),
        ({"in_channels": 0}, "in_channels and out_channels must be at least 1, got 0 and 8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [SVDConv2d, QuantConv2d])
def test_what_no_convolution_takes_is_refused(cls, option, message):
    own = {"rank": 1} if cls is SVDConv2d else {}
    with pytest.raises(OptionError, match=f"^{cls.__name__}: {message}"):
        cls(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3} | option, **own)


@pytest.mark.parametrize("cls", [cls for cls in LAYERS.values() if cls.replaces is nn.Linear])
def test_layers_without_features_are_refused(cls):
    dense = nn.Linear(6, 4)
    config = cls.from_pretrained_layer(dense, **cls.usual_options(dense)).config()
    with pytest.raises(OptionError, match=f"^{cls.__name__}: in_features and out_features must be at least 1"):
        cls(**config | {"in_features": 0})


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(OptionError, match=r"^SVDConv2d: groups must divide in_channels and out_channels, got groups=2"):
        SVDConv2d(3, 4, 3, groups=2, rank=1)
