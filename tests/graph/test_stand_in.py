"""Models that only take as long as compressed ones."""

import pytest
import torch
from torch import nn

from lowrank_nn.graph import record, replace_module
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.graph.stand_in import stand_in, with_numbers
from lowrank_nn.layers import (
    HashedConv2d,
    PrunedConv2d,
    QuantConv2d,
    QuantLinear,
    SVDConv2d,
    SVDLinear,
    TransferredConv2d,
    TuckerConv2d,
)
from tests.storage.models import seeded

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def make():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


@pytest.fixture
def net():
    return seeded(make).eval()


def tucker(**options):
    return TuckerConv2d(16, 16, 3, padding=1, rank=(4, 4), device="meta", **options)


def test_layers_are_replaced_and_all_else_is_shared(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = stand_in(net, {"3": tucker(), "5": SVDLinear(1024, 10, rank=3, device="meta")})
    assert [type(layer).__name__ for layer in (model[3], model[5])] == ["TuckerConv2d", "SVDLinear"]
    assert model[0].weight is net[0].weight
    assert model[1].running_mean is not net[1].running_mean
    assert type(net[3]) is nn.Conv2d
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not model[3].training


def test_outputs_keep_their_size(net):
    with torch.no_grad():
        net[3].weight.mul_(100)
        large = stand_in(net, {"3": tucker()})[:4](X).std() / net[:4](X).std()
    assert 0.2 < large < 5


@pytest.mark.parametrize("cls", [HashedConv2d, TransferredConv2d])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_buffers_that_follow_from_the_configuration_are_computed(cls, kernel_size):
    given = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, kernel_size), nn.ReLU())).eval()
    layer = cls.from_pretrained_layer(given[0], share=0.5)
    bare = replace_module(meta_copy(given), "0", meta_copy(layer))
    torch.testing.assert_close(with_numbers(bare, given)[0].weight, layer.weight)
    buffers = dict(layer.named_buffers())
    for name, buffer in stand_in(given, {"0": meta_copy(layer)})[0].named_buffers():
        if name != "indices":  # those of transferred filters are a choice
            assert torch.equal(buffer, buffers[name])
    assert stand_in(given, {"0": meta_copy(layer)})(X).isfinite().all()


def test_every_kind_of_layer_gets_values(net):
    model = meta_copy(net)
    # As a recipe leaves them: factors pruned, or quantized with an input range.
    pruned = PrunedConv2d.from_pretrained_layer(model[0], **PrunedConv2d.usual_options(model[0]))
    core = tucker()
    core.core = QuantConv2d.from_pretrained_layer(core.core, bits=8)
    linear = QuantLinear.from_pretrained_layer(model[5], bits=8, activation_bits=8, input_range=(-1.0, 1.0))
    built = stand_in(net, {"0": pruned, "3": core, "5": linear})
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    with torch.no_grad():
        assert bool(torch.isfinite(built(X)).all())
    kinds = {site.path: type(site.layer).__name__ for site in record(built, X).sites}
    assert kinds["3.core"] == "QuantConv2d"


def test_the_memory_format_is_the_dense_layers(net):
    net = net.to(memory_format=torch.channels_last)
    model = stand_in(net, {"3": SVDConv2d(16, 16, 3, padding=1, rank=4, device="meta")})
    weights = [stage.weight for stage in model[3].stages() if stage.kernel_size != (1, 1)]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_replacement(net, dtype):
    model = stand_in(net.to(dtype), {"3": tucker(dtype=dtype)})
    assert {parameter.dtype for parameter in model[3].parameters()} == {dtype}


def test_the_model_itself_may_be_the_layer():
    layer = nn.Linear(12, 8)
    assert type(stand_in(layer, {"": SVDLinear(12, 8, rank=2, device="meta")})) is SVDLinear
    assert type(stand_in(layer, {})) is nn.Linear


def test_shared_layers_are_replaced_under_all_their_names():
    shared = nn.Linear(6, 6)
    model = stand_in(nn.ModuleDict({"a": shared, "b": shared}), {"a": SVDLinear(6, 6, rank=2, device="meta")})
    assert model["a"] is model["b"]


def test_numbers_of_layers_that_were_to_be_measured_are_finite(net):
    bare = meta_copy(net)
    for path, kind in (("3", QuantConv2d), ("5", QuantLinear)):
        layer = kind.from_pretrained_layer(bare[int(path)], bits=8, activation_bits=8, input_range=(-1.0, 1.0))
        bare = replace_module(bare, path, layer)
    with torch.no_grad():
        assert bool(torch.isfinite(with_numbers(bare, net)(X)).all())
