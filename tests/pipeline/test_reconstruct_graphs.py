"""Reconstruction on models of all shapes: reused, tied, forked and unreached layers, dtypes, errors."""

import copy

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph import Link, find_links, replace_module
from lowrank_nn.layers import SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.pipeline.reconstruct import reconstruct
from lowrank_nn.planning import collect_metrics
from tests.pipeline.reconstruction import Residual, chain, compressed, error, images
from tests.zoo import ZOO
from tests.zoo.control_flow import EarlyExit


def usual(model, batches):
    """One-shot data-aware fits of all layers that have a place in the order, at a third to a half of their ranks."""
    links = find_links(model, batches[0])
    layers = {path: model.get_submodule(path) for path in links}
    layers = {path: layer for path, layer in layers.items() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    paths = [
        path for path, layer in layers.items() if getattr(layer, "groups", 1) == 1 and min(layer.weight.shape[:2]) > 2
    ]
    metrics = collect_metrics(model, batches, paths, curvature=False)
    small = copy.deepcopy(model)
    for path in paths:
        layer, metric = layers[path], metrics[path]
        rank = -(-min(layer.weight.shape[:2]) // 3)
        if isinstance(layer, nn.Linear):
            new = SVDLinear.from_pretrained_layer(layer, rank=rank, metric=metric)
        elif layer.kernel_size == (1, 1):
            new = SVDConv2d.from_pretrained_layer(layer, rank=rank, metric=metric)
        else:
            new = TuckerConv2d.from_pretrained_layer(layer, rank=(rank, rank), metric=metric)
        norm = links[path].norm
        if norm is not None and layer.bias is None:
            mean = small.get_buffer(f"{norm}.running_mean")
            mean += metric.mean_output(new.weight - layer.weight).detach().to(mean)
        small = replace_module(small, path, new)
    return small, paths, links


ZOO_BATCHES = {
    "lenet5": lambda: images(32, 1, 28).split(8),
    "resnet20": lambda: images(32, 3, 32).split(16),
    "vgg16": lambda: images(64, 3, 32).split(16),
    "inception": lambda: images(48, 3, 32).split(16),
    "mobilenet_v2": lambda: images(64, 3, 32).split(16),
    "unet": lambda: images(32, 3, 16).split(8),
    "vit": lambda: images(64, 3, 32).split(16),
    "crnn": lambda: images(32, 1, 24).split(8),
    "control_flow": lambda: [{"image": 1 + x, "options": {"settled": 0.3}} for x in images(96, 3, 8).split(16)],
}


@pytest.mark.parametrize("name", ZOO_BATCHES)
def test_the_zoo_gets_nearer_to_the_original_on_the_calibration_data(name):
    dense, inputs = ZOO[name]()
    batches = ZOO_BATCHES[name]()
    if name == "crnn":
        batches = [x[:, :, :16] for x in batches]
    assert type(batches[0]) is type(inputs)
    small, paths, links = usual(dense, batches)
    before, state = error(dense, small, batches), copy.deepcopy(dense.state_dict())
    notes = reconstruct(dense, small, batches, paths, links=links)
    assert notes == {}
    assert error(dense, small, batches) < before
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())


class Dense(nn.Module):
    """DenseNet's way (Huang et al. 2017): each layer sees all before it, by concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 * (i + 1), 8, 3, padding=1, bias=False) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for i in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.cat([x, norm(layer(x.relu()))], 1)
        return self.head(x.relu().mean((2, 3)))


class Reused(nn.Module):
    """One block run three times between layers of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.tail(x)


def test_concatenations():
    torch.manual_seed(0)
    dense, batches = Dense().eval(), images(48, 3, 8).split(16)
    small, paths, links = usual(dense, batches)
    before = error(dense, small, batches)
    assert reconstruct(dense, small, batches, paths, links=links) == {}
    assert error(dense, small, batches) < before


def test_layers_called_several_times_stay_as_they_are():
    torch.manual_seed(0)
    dense, batches = Reused().eval(), images(48, 3, 8).split(16)
    small = compressed(dense, dict.fromkeys(("block.0", "tail"), (TuckerConv2d, (3, 3))))
    before, block = error(dense, small, batches), copy.deepcopy(small.block.state_dict())
    notes = reconstruct(dense, small, batches, ["block.0", "tail"], links=find_links(dense, batches[0]))
    assert notes == {"block.0": "not refitted: not called exactly once in a forward"}
    assert error(dense, small, batches) < before
    assert all(torch.equal(value, block[key]) for key, value in small.block.state_dict().items())


def test_tied_weights_and_integer_inputs():
    dense, inputs = ZOO["tied"]()
    small = compressed(dense, {"mix": (SVDLinear, 4)})
    notes = reconstruct(dense, small, [inputs], ["mix"], links=find_links(dense, inputs))
    assert list(notes) == ["mix"]


def test_layers_that_no_batch_reaches():
    torch.manual_seed(0)
    dense = EarlyExit().eval()
    image, options = images(16, 3, 8), {"settled": 1e9}
    links = find_links(dense, {"image": image + 1, "options": options}) | {"dark": Link()}
    small = compressed(dense, {"bright": (SVDLinear, 2), "dark": (SVDLinear, 2)})
    batch = {"image": image - image.mean() + 1, "options": options}
    notes = reconstruct(dense, small, batch, ["bright", "dark"], links=links)
    assert notes == {"dark": "not refitted: no batch reaches it"}


class Forks(nn.Module):
    """Which head is called depends on a value that compression changes."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))
        self.limit = 0.0

    def forward(self, x):
        x = self.stem(x)
        return self.one(x) if self.limit > 0 else self.two(x)


def test_layers_that_only_one_of_the_networks_calls():
    torch.manual_seed(0)
    dense, x = Forks().eval(), torch.randn(16, 4)
    links = find_links(dense, x) | {"one": Link()}
    small = compressed(dense, {"one": (SVDLinear, 2), "two": (SVDLinear, 2)})
    small.limit = 1.0
    notes = reconstruct(dense, small, [x], ["one", "two"], links=links)
    assert notes == dict.fromkeys(("one", "two"), "not refitted: no batch reaches it in both networks")


def test_values_that_are_not_finite():
    torch.manual_seed(0)
    dense, x = chain(), torch.randn(16, 12)
    small = compressed(dense, {"1": (SVDLinear, 4)})
    before = copy.deepcopy(small.state_dict())
    x[3, 2] = torch.nan
    notes = reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
    assert notes == {"1": "not refitted: NaN or infinite values reach it"}
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_activations_that_all_but_vanish():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*widths, bias=False) for widths in ((12, 16), (16, 16), (16, 16), (16, 8))))
    with torch.no_grad():
        model[0].weight *= 1e-20
        model[1].weight *= 1e-22
    batches = list(torch.randn(6, 20, 12))
    budget = lnn.Budget(params=0.6)
    small = lnn.compress_model(model, batches[0], budget=budget, calibration=batches, progress=False).model
    assert all(tensor.isfinite().all() for tensor in small.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    dense, x = Residual().eval().to(dtype), images(32, 3, 8).to(dtype)
    small = compressed(dense, dict.fromkeys(("one", "two"), (TuckerConv2d, (3, 3))))
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["one", "two"], links=find_links(dense, x))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert error(dense, small, [x]) < before


def test_errors_and_interrupts(monkeypatch):
    dense, x = chain(), torch.randn(8, 12)
    small, links = compressed(dense, {"1": (SVDLinear, 4)}), find_links(dense, x)
    with pytest.raises(CalibrationError, match="no batches"):
        reconstruct(dense, small, [], ["1"], links=links)
    with pytest.raises(CalibrationError, match="failed on batch 2"):
        reconstruct(dense, small, [x, x[:, :3]], ["1"], links=links)

    def interrupt(layer, weight, metric):
        raise KeyboardInterrupt

    monkeypatch.setattr(SVDLinear, "refit_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(dense, small, [x], ["1"], links=links)
    assert small(x).shape == (8, 5)


@pytest.mark.cuda
def test_on_cuda(device):
    torch.manual_seed(0)
    dense, x = Residual().eval().to(device), images(32, 3, 8).to(device)
    small = compressed(dense, dict.fromkeys(("one", "two"), (TuckerConv2d, (3, 3))))
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["one", "two"], links=find_links(dense, x))
    assert error(dense, small, [x]) < before
