"""Layers refitted in the order of execution: exact where that can be, better than one shot where it cannot."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph import Link, call_model, find_links, replace_module
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.layers import CPConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.pipeline import reconstruct as module
from lowrank_nn.pipeline.reconstruct import reconstruct
from lowrank_nn.planning import collect_metrics
from tests.zoo import ZOO
from tests.zoo.control_flow import EarlyExit


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "lowrank_nn run"]


def images(count, channels, size, seed=0):
    """Smooth random images with some noise: patches of the kind that compression lives on."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, max(2, size // 4), max(2, size // 4), generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear")
    return smooth + 0.2 * torch.randn(count, channels, size, size, generator=generator)


def compressed(model, ranks):
    small = copy.deepcopy(model)
    for path, (cls, rank) in ranks.items():
        small = replace_module(small, path, cls.from_pretrained_layer(model.get_submodule(path), rank=rank))
    return small


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


@torch.no_grad()
def error(dense, small, batches):
    """Mean squared difference of all that the networks return."""
    pairs = zip(*([t for b in batches for t in tensors(call_model(net, b))] for net in (dense, small)), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs)


def chain():
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5))


def test_what_a_linear_network_does_on_a_subspace_is_kept_exactly():
    torch.manual_seed(0)
    dense = chain().double()
    x = torch.randn(64, 4, dtype=torch.float64) @ torch.randn(4, 12, dtype=torch.float64) + 2
    small = compressed(dense, {"0": (SVDLinear, 4), "1": (SVDLinear, 4), "2": (SVDLinear, 4)})
    before = error(dense, small, [x])
    assert reconstruct(dense, small, [x], ["0", "1", "2"], links=find_links(dense, x)) == {}
    assert error(dense, small, [x]) < 1e-6 * before


def test_a_later_layer_repairs_what_an_earlier_one_lost():
    # The first layer returns every value twice; a fit of low rank keeps some of each, and the second layer adds up.
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    x = 0.3 * torch.randn(256, 8)
    small = compressed(dense, {"0": (SVDLinear, 5), "2": (SVDLinear, 7), "3": (SVDLinear, 2)})
    links = find_links(dense, x)
    errors = [error(dense, small, [x])]
    for paths in (["0"], ["0", "2"], ["0", "2", "3"]):
        new = copy.deepcopy(small)
        reconstruct(dense, new, [x], paths, links=links)
        errors.append(error(dense, new, [x]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_the_bias_makes_the_mean_output_right():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1))
    x = images(8, 4, 8)  # as many positions as are looked at
    small = compressed(dense, {"0": (TuckerConv2d, (2, 2)), "1": (SVDConv2d, 2)})
    reconstruct(dense, small, [x[:5], x[5:]], ["0", "1"], links=find_links(dense, x))
    with torch.no_grad():
        for got, want in zip((small[:1](x), small(x)), (dense[:1](x), dense(x)), strict=True):
            torch.testing.assert_close(got.mean((0, 2, 3)), want.mean((0, 2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_running_mean_makes_the_mean_behind_a_norm_right(bias):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        for tensor in (dense[1].running_mean, dense[1].running_var, dense[1].weight, dense[1].bias):
            tensor.uniform_(0.5, 1.5)
    x = images(8, 4, 8) + 1
    small = compressed(dense, {"0": (TuckerConv2d, (2, 2))})
    small[1].running_mean.add_(5)  # what it was set to before does not matter
    original = dense[1].running_mean.clone()
    reconstruct(dense, small, [x], ["0"], links=find_links(dense, x))
    with torch.no_grad():
        torch.testing.assert_close(small[:2](x).mean((0, 2, 3)), dense[:2](x).mean((0, 2, 3)), rtol=0, atol=1e-5)
    assert torch.equal(dense[1].running_mean, original)
    assert not torch.equal(small[1].running_mean, original)


def test_without_bias_and_norm_the_mean_counts():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    x = images(16, 4, 10) + 2
    small = compressed(dense, {"0": (TuckerConv2d, (2, 2)), "2": (TuckerConv2d, (2, 2))})
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["0", "2"], links=find_links(dense, x))
    assert error(dense, small, [x]) < 0.5 * before


class Residual(nn.Module):
    """Two residual branches on one wide sum; the second ends in a normalisation with channels of all scales."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1e-4, 0.1, 0.3, 1, -1, 2, 3, -0.5]))
            self.norm.running_var.uniform_(0.3, 3)
            self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.one(x)
        return x + self.norm(self.two(x.tanh()))


def test_a_branch_repairs_what_the_shortcut_lost():
    torch.manual_seed(0)
    dense = Residual().eval()
    x = images(64, 3, 8)
    small = compressed(dense, {"one": (TuckerConv2d, (2, 2)), "two": (TuckerConv2d, (7, 7))})
    links = find_links(dense, x)
    assert [path for path, link in links.items() if link.shortcut] == ["one", "two"]
    unlinked = {path: Link(link.norm) for path, link in links.items()}
    errors = []
    for known in (unlinked, links):
        new = copy.deepcopy(small)
        reconstruct(dense, new, [x], ["one", "two"], links=known)
        errors.append(error(dense, new, [x]))
    assert errors[1] < 0.7 * errors[0] < 0.7 * error(dense, small, [x])


ZOO_BATCHES = {
    "lenet5": lambda: images(32, 1, 28).split(8),
    "resnet20": lambda: images(32, 3, 32).split(16),
    "vgg16": lambda: images(64, 3, 32).split(16),
    "inception": lambda: images(48, 3, 32).split(16),
    "mobilenet_v2": lambda: images(64, 3, 32).split(16),
    "unet": lambda: images(32, 3, 16).split(8),
    "vit": lambda: images(64, 3, 32).split(16),
    "crnn": lambda: images(32, 1, 24).split(8),
    "control_flow": lambda: [{"image": 1 + x, "options": {"settled": 0.3}} for x in images(48, 3, 8).split(16)],
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


def test_of_very_wide_layers_only_the_mean_is_corrected(monkeypatch):
    monkeypatch.setattr(module, "MAX_FEATURES", 11)
    torch.manual_seed(0)
    dense, x = chain(), torch.randn(64, 12) + 2
    small = compressed(dense, {"1": (SVDLinear, 4)})
    weight = small[1].weight
    notes = reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
    assert notes == {"1": "only its mean output corrected: 12 inputs are too many for a covariance"}
    assert torch.equal(small[1].weight, weight)
    with torch.no_grad():
        torch.testing.assert_close(small[:2](x).mean(0), dense[:2](x).mean(0), rtol=0, atol=1e-5)


def test_a_refit_that_is_worse_is_taken_back(monkeypatch):
    torch.manual_seed(0)
    dense, x = chain(), torch.randn(64, 12)
    small = compressed(dense, {"1": (SVDLinear, 4)})
    weight = small[1].weight

    def ruin(layer, weight, metric):
        layer.reset_parameters()

    monkeypatch.setattr(SVDLinear, "refit_", ruin)
    reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
    assert torch.equal(small[1].weight, weight)


def test_the_curvature_decides_which_outputs_matter():
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), torch.randn(256, 12)
    links, misses = find_links(dense, x), []
    for curvature in (None, torch.diag(torch.tensor([1.0] * 6 + [1e-6] * 6, dtype=torch.float64))[None]):
        small = compressed(dense, {"1": (SVDLinear, 6)})
        reconstruct(dense, small, [x], ["1"], links=links, curvature={"1": curvature})
        with torch.no_grad():
            misses.append((small(x) - dense(x)).square().mean(0)[:6].sum())
    assert misses[1] < 1e-3 * misses[0]


def test_the_same_seed_gives_the_same_bits_and_batches_may_hold_labels():
    dense, _ = ZOO["resnet20"]()
    batches = images(16, 3, 32).split(8)
    links = find_links(dense, batches[0])
    paths = ["layer1.0.conv1", "layer1.0.conv2", "layer2.1.conv2"]
    small = compressed(dense, dict.fromkeys(paths, (CPConv2d, 8)))
    state = torch.get_rng_state()
    results = []
    for data in (batches, [(x, torch.zeros(len(x))) for x in batches]):
        new = copy.deepcopy(small)
        reconstruct(dense, new, data, paths, links=links, seed=3)
        results.append(new.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])
    assert any(not torch.equal(value, results[0][key]) for key, value in small.state_dict().items())


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
def test_on_cuda():
    torch.manual_seed(0)
    dense, x = Residual().eval().cuda(), images(32, 3, 8).cuda()
    small = compressed(dense, dict.fromkeys(("one", "two"), (TuckerConv2d, (3, 3))))
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["one", "two"], links=find_links(dense, x))
    assert error(dense, small, [x]) < before


@torch.no_grad()
def without_channels(dense, producer, norm, reader, gone):
    """A copy in which the channels between two convolutions are fewer."""
    small = copy.deepcopy(dense)
    kept = torch.tensor([i for i in range(dense.get_submodule(producer).out_channels) if i not in gone])
    for path in (producer, norm):
        module = small.get_submodule(path)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensor.data = tensor.data[kept]
    small.get_submodule(producer).out_channels = small.get_submodule(norm).num_features = len(kept)
    layer = small.get_submodule(reader)
    layer.weight.data = layer.weight.data[:, kept]
    layer.in_channels = len(kept)
    return small, kept


def body(bias=False):
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, bias=bias),
        nn.Sequential() if bias else nn.BatchNorm2d(8),
    )
    return dense.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_makes_up_for_removed_inputs_that_the_others_tell(bias):
    dense = body(bias)
    with torch.no_grad():
        dense[0].weight[9:] = dense[0].weight[:3]  # the last three channels say nothing new
        dense[0].bias[9:] = dense[0].bias[:3]
    x = images(12, 4, 8)
    small, _ = without_channels(dense, "0", "1", "3", {9, 10, 11})
    before = error(dense, small, [x])
    assert reconstruct(dense, small, [x[:6], x[6:]], ["3"], links=find_links(dense, x)) == {}
    assert error(dense, small, [x]) < 1e-5 * before


def test_a_removed_constant_channel_goes_into_the_mean():
    dense = body()
    with torch.no_grad():
        dense[1].weight[3], dense[1].bias[3] = 0, 2.0
    x = images(8, 4, 8)
    dense[3].padding = small_padding = (0, 0)  # at a padded border the channel is not constant
    small, _ = without_channels(dense, "0", "1", "3", {3})
    assert small[3].padding == small_padding
    weight = small[3].weight.detach().clone()
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["3"], links=find_links(dense, x))
    assert error(dense, small, [x]) < 1e-8 * before
    torch.testing.assert_close(small[3].weight.detach(), weight, rtol=0, atol=1e-3)


def test_least_squares_of_a_cut_layer_are_numpys():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).double()
    x = torch.randn(500, 6, dtype=torch.float64)
    small = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).double()
    kept = torch.tensor([0, 3, 4, 8])
    with torch.no_grad():
        small[0].weight.copy_(dense[0].weight[kept])
        small[0].bias.copy_(dense[0].bias[kept])
        small[1].weight.copy_(dense[1].weight[:, kept])
        reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
        inputs = torch.cat([small[0](x), torch.ones(500, 1, dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(inputs, dense(x)).solution
        best = float((inputs @ solution - dense(x)).square().mean())
        assert error(dense, small, [x]) == pytest.approx(best, rel=1e-4)


class Joined(nn.Module):
    """A sum whose two sides, and their reader, lose the same channels."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.branch(x))


def test_layers_that_lost_outputs_too_are_refitted_on_those_left_and_repair_the_sum():
    torch.manual_seed(0)
    dense, small = Joined(), Joined(5)
    kept = torch.tensor([0, 2, 3, 5, 7])
    with torch.no_grad():
        for name in ("stem", "branch", "head"):
            old, new = dense.get_submodule(name), small.get_submodule(name)
            weight = old.weight if name == "head" else old.weight[kept]
            new.weight.copy_(weight if name == "stem" else weight[:, kept])
            new.bias.copy_(old.bias if name == "head" else old.bias[kept])
    x = images(12, 4, 8)
    links, before = find_links(dense, x), error(dense, small, [x])
    assert links["branch"].shortcut is not None
    notes = reconstruct(dense, small, [x], ["branch", "head"], links=links, outputs={"branch": kept})
    assert notes == {}
    assert error(dense, small, [x]) < 0.5 * before


def test_a_low_rank_layer_that_lost_inputs_is_refitted():
    dense = body()
    dense[3] = TuckerConv2d.from_pretrained_layer(dense[3], rank=(6, 6))
    x = images(12, 4, 8)
    small = copy.deepcopy(dense)
    kept = torch.arange(10)
    with torch.no_grad():
        for tensor in (small[0].weight, small[0].bias, *small[1].parameters(), *list(small[1].buffers())[:2]):
            tensor.data = tensor.data[kept]
        small[0].out_channels = small[1].num_features = small[3].in_channels = small[3].reduce.in_channels = 10
        small[3].reduce.weight.data = small[3].reduce.weight.data[:, kept]
    before = error(dense, small, [x])
    assert reconstruct(dense, small, [x], ["3"], links=find_links(dense, x)) == {}
    assert error(dense, small, [x]) < 0.6 * before
