"""What follows a layer: its normalisation, and the addition that its branch ends in; never a guess."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph import Link, find_links
from lowrank_nn.graph.places import Place
from tests.zoo import ZOO

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """A residual branch whose end is written as ``end`` says; its shortcut is what a first layer and a tanh make."""

    def __init__(self, end, norm=None):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=norm is None)
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.end = end

    def forward(self, x):
        return self.end(self, self.first(x).tanh())


def links(end, norm=None):
    return find_links(Branch(end, norm).eval(), X)["conv"]


TANH = Place("", 0, 0, "tanh")


def iadd(net, x):
    y = net.norm(net.conv(x))
    y += x
    return y.relu_()


def iadd_to_shortcut(net, x):
    x += net.norm(net.conv(x))
    return x


def looked_at(net, x):
    y = net.norm(net.conv(x))
    return x + (y if y.is_contiguous() and not y.requires_grad else y.relu())


def inplace_before(net, x):
    x = torch.relu_(x)  # the shortcut is the changed tensor
    return x + net.norm(net.conv(x))


@pytest.mark.parametrize(
    ("end", "place"),
    [
        (lambda net, x: x + net.norm(net.conv(x)), TANH),
        (lambda net, x: net.norm(net.conv(x)) + x, TANH),
        (lambda net, x: torch.add(net.norm(net.conv(x)), x), TANH),
        (lambda net, x: torch.add(input=net.norm(net.conv(x)), other=x), TANH),
        (lambda net, x: net.norm(net.conv(x)).add_(x), TANH),
        (iadd, TANH),
        (iadd_to_shortcut, TANH),
        (inplace_before, Place("", 0, 1, "relu_")),
        (lambda net, x: F.relu(x + F.dropout(net.norm(net.conv(x)), 0.1, net.training), inplace=True), TANH),
        (looked_at, TANH),
        (lambda net, x: net.first(x) + net.norm(net.conv(x)), Place("first", 1, 0, "")),
        (lambda net, x: F.pad(x[..., 1:], (1, 0)) + net.norm(net.conv(x)), Place("", 0, 2, "pad")),
    ],
)
def test_norm_and_addition_in_all_spellings(end, place):
    assert links(end) == Link("norm", place)


def branch_seen_again(net, x):
    y = net.norm(net.conv(x))
    return x + y + y.mean()


def view_kept(net, x):
    y = net.norm(net.conv(x))
    return (x + y) * y.flatten(1).mean()


def returned_too(net, x):
    y = net.norm(net.conv(x))
    return {"sum": x + y, "branch": y}


def shortcut_after(net, x):
    y = net.norm(net.conv(x))
    return x.sin() + y


def shortcut_changed(net, x):
    y = net.norm(net.conv(x))
    return x.relu_() + y


def shortcut_changed_by_view(net, x):
    y = net.norm(net.conv(x))
    x[:, 0].zero_()
    return x + y


def branch_changed_by_out(net, x):
    y = net.norm(net.conv(x))
    torch.add(x, 1, out=y)
    return x + y


def swish(x):
    return x * torch.sigmoid(x)


def used_in_script(net, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, but still found in models
        scripted = torch.jit.script(swish)
    y = net.norm(net.conv(x))
    return x + y + scripted(y).mean()


def used_in_package(net, x):
    y = net.norm(net.conv(x))
    return x + y + float(y.numpy().mean())


@pytest.mark.parametrize(
    "end",
    [
        lambda net, x: x - net.norm(net.conv(x)),
        lambda net, x: x + 2 * net.norm(net.conv(x)),
        lambda net, x: torch.add(x, net.norm(net.conv(x)), alpha=2),
        lambda net, x: x[:1] + net.norm(net.conv(x)),  # broadcast
        lambda net, x: x + net.norm(net.conv(x)).relu(),
        lambda net, x: torch.cat([x, net.norm(net.conv(x))]),
        lambda net, x: X + net.norm(net.conv(x)),  # no layer came before it: the same in every network
        lambda net, x: net.norm(net.conv(x)) + net.norm.weight[:, None, None].expand(4, 6, 6),
        shortcut_after,
        shortcut_changed,
        shortcut_changed_by_view,
        branch_seen_again,
        view_kept,
        returned_too,
        branch_changed_by_out,
        used_in_script,
        used_in_package,
        lambda net, x: net.norm(net.conv(x)),
    ],
)
def test_no_addition_where_it_is_none_or_not_the_only_use(end):
    assert links(end) == Link("norm", None)


def norm_of_relu(net, x):
    return x + net.norm(net.conv(x).relu_())


def seen_besides(net, x):
    y = net.conv(x)
    return net.norm(y) + y.mean()


def norm_twice(net, x):
    return net.norm(net.norm(net.conv(x)) + 1)


def norm_in_functional(net, x):
    return F.batch_norm(net.conv(x), net.norm.running_mean, net.norm.running_var)


class Shifting(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x + 1)


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("end", [norm_of_relu, seen_besides, norm_twice, norm_in_functional])
def test_no_norm_where_it_is_not_the_only_use(end):
    assert links(end) == Link()


@pytest.mark.parametrize(
    ("norm", "found"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4, affine=False), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.BatchNorm2d(4, track_running_stats=False), False),
        (nn.InstanceNorm2d(4), False),
        (nn.GroupNorm(2, 4), False),
        (nn.LayerNorm(6), False),
        (Shifting(4), False),
        (Doubling(4), False),
    ],
)
def test_kinds_of_norms(norm, found):
    link = links(lambda net, x: x + net.norm(net.conv(x)), norm)
    assert link == (Link("norm", TANH) if found else Link())


def test_a_linear_layer_links_to_a_norm_of_its_features_only():
    flat = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    assert find_links(flat.eval(), torch.randn(3, 6))["0"].norm == "1"
    tokens = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))  # normalises over the tokens, of which there are five
    assert find_links(tokens.eval(), torch.randn(3, 5, 6))["0"].norm is None


class Bottleneck(nn.Module):
    """As torchvision's: the projection of the shortcut comes last, so its branch ends in the addition."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def test_a_projected_shortcut():
    found = find_links(Bottleneck().eval(), X)
    assert found == {
        "conv1": Link("bn1"),
        "conv2": Link("bn2"),
        "downsample.0": Link("downsample.1", Place("bn2", 0, 0, "")),
    }


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branch(lambda net, x: x + net.norm(net.conv(x)))
        self.conv = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.again = self.twice
        self.norm = nn.BatchNorm2d(4)
        self.never = nn.Linear(2, 2)

    def forward(self, x):
        x = self.norm(self.conv(x))
        for _ in range(3):
            x = self.norm(x)
        return self.inner(self.again(self.twice(x)))


def test_repeated_layers_have_no_link_and_a_repeated_norm_is_none():
    found = find_links(Repeated().eval(), X)
    assert list(found) == ["conv", "inner.first", "inner.conv"]
    assert found["conv"] == Link()
    assert found["inner.conv"] == Link("inner.norm", Place("inner", 0, 0, "tanh"))


def test_zoo():
    found = {name: find_links(*entry()) for name, entry in ZOO.items()}
    resnet = found["resnet20"]
    assert all(link.norm == path.replace("conv", "bn") for path, link in resnet.items() if path != "linear")
    # The padded shortcut of a block with a stride is made after the branch has run.
    ends = [path for path, link in resnet.items() if link.shortcut]
    assert ends == [f"layer{i}.{j}.conv2" for i, j in ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2))]
    assert resnet["layer1.0.conv2"].shortcut == Place("", 0, 0, "relu")
    mobile = found["mobilenet_v2"]
    assert [p for p, link in mobile.items() if link.norm is None] == ["classifier.1"]
    assert [p for p, link in mobile.items() if link.shortcut] == ["features.3.conv.2", "features.5.conv.2"]
    vit = [path for path, link in found["vit"].items() if link.shortcut]
    assert vit == [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attention.proj", "mlp.2")]
    assert not any(link.norm or link.shortcut for name in ("vgg16", "inception") for link in found[name].values())
    assert list(found["control_flow"]) == ["stem", "bright"]


def test_inference_mode_and_inputs_made_in_it():
    with torch.inference_mode():
        model = Branch(lambda net, x: x + net.norm(net.conv(x))).eval()
        assert find_links(model, X.clone())["conv"] == Link("norm", TANH)


def test_leaves_no_trace():
    model = Branch(iadd).train()
    before = copy.deepcopy(model.state_dict())
    attributes = [dict(vars(module)) for module in model.modules()]
    find_links(model, X)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors():
    with pytest.raises(PlanError, match="the forward failed"):
        find_links(Branch(iadd), torch.zeros(3))
    with pytest.raises(UnsupportedLayerError, match="no weight yet"):
        find_links(nn.LazyLinear(3), X)
