"""Putting another layer in a layer's place, and the fused kernels that would pass it by."""

import copy

import pytest
import torch
from torch import nn

from lowrank_nn.errors import PlanError
from lowrank_nn.graph import call_model, record, release_fast_path, replace_module
from lowrank_nn.layers import SVDLinear
from tests.zoo import ZOO


def full_rank(layer):
    return SVDLinear.from_pretrained_layer(layer, rank=min(layer.in_features, layer.out_features))


@pytest.mark.parametrize("name", ZOO)
def test_every_site_of_the_zoo_can_be_replaced(name):
    model, inputs = ZOO[name]()
    model.requires_grad_(False)
    recording = record(model, inputs)
    for site in recording.sites:
        replace_module(model, site.path, copy.deepcopy(site.layer))
    again = record(model, inputs)
    assert [(s.path, s.aliases, s.calls) for s in again.sites] == [
        (s.path, s.aliases, s.calls) for s in recording.sites
    ]
    assert all(new.layer is not old.layer for new, old in zip(again.sites, recording.sites, strict=True))


@pytest.mark.parametrize("path", ["block1.conv", "block2.conv"])
def test_all_aliases_get_the_same_object(path):
    model, inputs = ZOO["tied"]()
    new = copy.deepcopy(model.block1.conv)
    assert replace_module(model, path, new) is model
    assert model.block1.conv is new
    assert model.block2.conv is new
    assert len(record(model, inputs)["block1.conv"].calls) == 2


def test_a_module_may_hold_a_layer_under_several_names():
    layer, new = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer))
    model.again = layer
    replace_module(model, "2", new)
    assert model[0] is model[2] is model[3][0] is model.again is new
    assert all(module is not layer for module in model.modules())


def test_layers_held_outside_of_the_modules_are_replaced_too():
    layer, other, new = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(layer, other)
    object.__setattr__(model, "hidden", layer)
    model.listed, model.pairs, model.named = [layer, other], [(other, layer)], {"first": [layer], "size": 4}
    model.named["me"] = model.named
    listed, sizes = model.listed, model.sizes = model.listed, (3, (4, 5))
    replace_module(model, "0", new)
    assert model.listed is listed
    assert model.sizes is sizes
    assert model.hidden is model.listed[0] is model.pairs[0][1] is model.named["first"][0] is new
    assert model.listed[1] is model.pairs[0][0] is other


def test_the_root_may_be_replaced():
    layer = nn.Linear(6, 5).eval()
    new = full_rank(layer).train()
    assert replace_module(layer, "", new) is new
    assert not any(module.training for module in new.modules())


def test_order_and_names_stay():
    model, _ = ZOO["lenet5"]()
    names = [name for name, _ in model.named_children()]
    replace_module(model, "fc1", full_rank(model.fc1))
    assert [name for name, _ in model.named_children()] == names
    sequential = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    replace_module(sequential, "0", nn.Identity())
    assert isinstance(sequential[0], nn.Identity)


def test_missing_paths_list_the_ones_there_are():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"no module at 'fc'\. There are: \"\" \(the model itself\), 0\."):
        replace_module(model, "fc", nn.Linear(2, 2))


def test_hooks_move_and_their_handles_work():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    seen = []
    old = model[0]
    handles = [
        old.register_forward_pre_hook(lambda *_: seen.append("pre")),
        old.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre_kwargs"), with_kwargs=True),
        old.register_forward_hook(lambda m, *_: seen.append(type(m).__name__)),
        old.register_forward_hook(lambda m, args, kwargs, out: seen.append("kwargs"), with_kwargs=True),
        old.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
        old.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre")),
        old.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    new = full_rank(old)
    new.register_forward_hook(lambda *_: seen.append("own"))
    replace_module(model, "0", new)
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    forward = ["pre", "pre_kwargs", "SVDLinear", "kwargs", "always", "own"]
    assert seen == [*forward, "backward_pre", "backward"]
    seen.clear()
    old(torch.randn(2, 3))
    assert not seen
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3))
    assert seen == ["own"]


def test_hooks_come_back_when_the_replacement_is_undone():
    model = nn.Sequential(nn.Linear(3, 3))
    seen = []
    model[0].register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    old = model[0]
    replace_module(model, "0", full_rank(old))
    replace_module(model, "0", old)
    replace_module(model, "0", old)
    model(torch.randn(2, 3))
    assert seen == ["Linear"]


def swapped_encoder(which, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options).eval()
    small = copy.deepcopy(dense)
    for i in range(2):
        for name in which:
            path = f"layers.{i}.{name}"
            replace_module(small, path, full_rank(small.get_submodule(path)))
    return dense, small


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, on the dense model
@pytest.mark.parametrize("which", [("linear1",), ("linear2",), ("linear1", "linear2"), ("self_attn.out_proj",)])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
@pytest.mark.parametrize("mode", ["no_grad", "grad", "train"])
@pytest.mark.parametrize("padded", [False, True])
def test_swapped_encoders_compute_the_same_everywhere(which, options, mode, padded):
    dense, small = swapped_encoder(which, **options)
    if mode == "train":
        dense.train()
        small.train()
    x = torch.randn(3, 6, 16)
    padding = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None] if padded else None
    with torch.set_grad_enabled(mode != "no_grad"):
        want, got = dense(x, src_key_padding_mask=padding), small(x, src_key_padding_mask=padding)
    keep = slice(None) if padding is None else ~padding  # the fused path fills padded positions with zeros
    assert torch.allclose(got[keep], want[keep], atol=1e-5)


def test_compressed_layers_really_run_in_eval_mode_without_gradients():
    _, small = swapped_encoder(("linear1", "linear2"))
    runs = []
    for i in range(2):
        for name in ("linear1", "linear2"):
            layer = small.layers[i].get_submodule(name)
            forward = layer.forward
            # Not a hook: any hook would switch the fused path off by itself.
            layer.forward = lambda x, forward=forward, where=(i, name): runs.append(where) or forward(x)
    with torch.no_grad():
        small(torch.randn(3, 6, 16))
    assert runs == [(0, "linear1"), (0, "linear2"), (1, "linear1"), (1, "linear2")]


def test_only_altered_encoder_layers_leave_the_fused_path():
    dense, _ = swapped_encoder(())
    release_fast_path(dense)
    assert dense.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in dense.layers] == [1, 1]
    replace_module(dense, "layers.1.linear2", full_rank(dense.layers[1].linear2))
    for _ in range(2):
        assert [layer.activation_relu_or_gelu for layer in dense.layers] == [1, 0]
        assert not dense.use_nested_tensor
        release_fast_path(dense)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, on the dense model
def test_the_transformer_of_the_zoo_with_padding():
    dense, tokens = ZOO["transformer"]()
    tokens[0, 7:] = 0
    small = copy.deepcopy(dense)
    for site in record(dense, tokens).sites:
        if type(site.layer) is nn.Linear:
            replace_module(small, site.path, full_rank(site.layer))
    inputs = {"tokens": tokens, "mask_padding": True}
    with torch.no_grad():
        assert torch.allclose(call_model(small, inputs), call_model(dense, inputs), atol=1e-5)
