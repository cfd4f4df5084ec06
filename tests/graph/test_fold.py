"""Batch norms go into the layers in front of them, where that is proven to change nothing, and nowhere else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lowrank_nn as lnn
from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph import find_links
from lowrank_nn.graph.agree import outputs_agree
from lowrank_nn.graph.fold import Fold, find_folds, fold_batchnorm, fold_proven
from tests.zoo import ZOO
from tests.zoo._seeded import seeded

GENERATOR = torch.Generator().manual_seed(0)


def settled(model):
    """Give norms statistics and weights as after training; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.3, 0.5, generator=GENERATOR)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.2, 2.0, generator=GENERATOR)
    return model.eval()


def norms(model):
    return [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def assert_same_function(model, folded, x, tolerance):
    with torch.no_grad():
        expected, got = model.eval()(x), folded.eval()(x)
    assert (got - expected).norm() <= tolerance * expected.norm()


LAYERS = {
    "conv1d": (lambda b: nn.Conv1d(4, 6, 3, padding=1, groups=2, bias=b), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda b: nn.Conv2d(4, 6, 3, stride=(1, 2), padding_mode="reflect", padding=1, bias=b), None, None),
    "depthwise": (lambda b: nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=b), None, None),
    "conv3d": (lambda b: nn.Conv3d(4, 6, 3, dilation=2, bias=b), nn.BatchNorm3d, (2, 4, 6, 6, 6)),
    "transposed1d": (lambda b: nn.ConvTranspose1d(4, 6, 3, stride=2, bias=b), nn.BatchNorm1d, (2, 4, 9)),
    "transposed2d": (lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=b), None, None),
    "linear": (lambda b: nn.Linear(5, 6, bias=b), nn.BatchNorm1d, (7, 5)),
    "tucker": (lambda b: lnn.TuckerConv2d(4, 6, 3, bias=b, rank=(3, 2)), None, None),
    "tucker-1": (lambda b: lnn.TuckerConv2d(4, 6, 3, bias=b, rank=(None, 2)), None, None),
    "cp": (lambda b: lnn.CPConv2d(4, 6, 3, bias=b, rank=5), None, None),
    "svd": (lambda b: lnn.SVDConv2d(4, 6, 3, bias=b, rank=2), None, None),
    "spatial": (lambda b: lnn.SpatialSVDConv2d(4, 6, 3, bias=b, rank=2), None, None),
    "tensor train": (lambda b: lnn.TTConv2d(4, 6, 3, bias=b, rank=(2, 3, 2)), None, None),
    "svd linear": (lambda b: lnn.SVDLinear(5, 6, bias=b, rank=2), nn.BatchNorm1d, (7, 5)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", list(LAYERS))
def test_every_kind_of_layer_takes_up_a_norm(name, affine, bias):
    make, norm, shape = LAYERS[name]
    layer = make(bias)
    x = torch.randn(shape or (2, 4, 7, 7), generator=GENERATOR, dtype=torch.float64)
    channels = layer.out_features if isinstance(layer, nn.Linear | lnn.SVDLinear) else layer.out_channels
    model = settled(nn.Sequential(layer, (norm or nn.BatchNorm2d)(channels, affine=affine)).double())
    folded = fold_batchnorm(model, x)
    assert norms(folded) == []
    assert isinstance(folded[1], nn.Identity)
    assert_same_function(model, folded, x, 1e-10)


@pytest.mark.parametrize("cls", [lnn.TTLinear, lnn.KroneckerLinear])
def test_layers_that_rearrange_between_their_stages_take_up_no_norm(cls):
    model = settled(nn.Sequential(cls(6, 6, rank=2), nn.BatchNorm1d(6)))
    result = lnn.compress_model(model, torch.randn(5, 6), lnn.FoldBatchNorm(), progress=False)
    assert norms(result.model)
    assert f"no stage of {cls.__name__} has its outputs as channels" in " ".join(str(result.report).split())


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "unet"])
def test_zoo(name):
    model, x = ZOO[name]()
    assert norms(model)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model, x)
    assert norms(folded) == []
    assert_same_function(model, folded, x, 1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_folded_weight_is_the_formula():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = settled(nn.Sequential(conv, norm))
    folded = fold_batchnorm(model, torch.randn(1, 3, 5, 5, generator=GENERATOR))
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = (conv.bias.detach().double() - norm.running_mean) * scale + norm.bias.detach()
    torch.testing.assert_close(folded[0].weight.double(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(folded[0].bias.double(), bias, rtol=1e-6, atol=1e-6)


def test_keeps_what_the_layer_was():
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).train()
    model.to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    model[0].requires_grad_(False)
    folded = fold_batchnorm(model, torch.randn(2, 3, 6, 6, generator=GENERATOR).bfloat16())
    assert folded.training
    assert folded[0].training
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.bfloat16
    assert not folded[0].bias.requires_grad


class Seen(nn.Module):
    """A convolution and a norm whose forward is written as ``way`` says."""

    def __init__(self, way, conv=None, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1) if conv is None else conv
        self.norm = nn.BatchNorm2d(3) if norm is None else norm
        self.way = way

    def forward(self, x):
        return self.way(self, x)


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifting(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x + 1)


def straight(net, x):
    return net.norm(net.conv(x))


NOT_ALONE = "not called once"
X = torch.randn(2, 3, 6, 6, generator=GENERATOR)


@pytest.mark.parametrize(
    ("way", "conv", "norm", "reason"),
    [
        (lambda net, x: net.conv(net.norm(x)), None, None, NOT_ALONE),  # ahead of a padded convolution
        (lambda net, x: net.norm(net.conv(x).relu()), None, None, NOT_ALONE),
        (lambda net, x: net.norm(y := net.conv(x)) + y, None, None, NOT_ALONE),
        (lambda net, x: net.norm(net.norm(net.conv(x))), None, None, NOT_ALONE),
        (lambda net, x: net.norm(net.conv(net.conv(x))), None, None, NOT_ALONE),
        (straight, None, Shifting(3), "Shifting overrides forward"),
        (straight, None, nn.BatchNorm2d(3, track_running_stats=False), "no running statistics"),
        (straight, Doubling(3, 3, 3), None, "the layer ahead cannot take it up: Doubling overrides forward"),
        (straight, parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), None, "computed before each call"),
        (straight, lnn.PrunedConv2d.from_pretrained_layer(nn.Conv2d(3, 3, 1), sparsity=0.5), None, "fold before"),
        (straight, lnn.QuantConv2d.from_pretrained_layer(nn.Conv2d(3, 3, 1)), None, "fold before"),
    ],
)
def test_what_stays_and_why(way, conv, norm, reason):
    model = settled(Seen(way, conv, norm))
    folds, left = find_folds(model, find_links(model, X))
    assert folds == []
    assert list(left) == ["norm"]
    assert reason in left["norm"]
    assert_same_function(model, fold_batchnorm(model, X), X, 1e-6)


def test_shared_layers_tensors_and_hooked_ones_stay():
    shared = Seen(straight)
    shared.again = shared.conv
    tied = Seen(straight)
    tied.other = nn.Conv2d(3, 3, 3)
    tied.other.weight = tied.conv.weight
    hooked = Seen(straight)
    hooked.conv.register_forward_hook(lambda module, args, output: None)
    watched = Seen(straight)
    watched.norm.register_forward_hook(lambda module, args, output: None)
    for model, reason in ((shared, "shared"), (tied, "shared"), (hooked, "hooks"), (watched, "hooks")):
        folds, left = find_folds(model, find_links(settled(model), X))
        assert folds == []
        assert reason in left["norm"]


def test_a_fold_that_changes_the_output_is_rolled_back_alone():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Seen(straight), Seen(straight)

        def forward(self, x):
            return self.second(self.first(x)) * self.first.conv.weight.square().sum()

    model = settled(Reads())
    before = copy.deepcopy(model)
    folds, _ = find_folds(model, find_links(model, X))
    assert folds == [Fold("first.conv", "first.norm"), Fold("second.conv", "second.norm")]
    left = fold_proven(model, folds, X)
    assert list(left) == ["first.norm"]
    assert "first.conv" in left["first.norm"]
    assert norms(model) == ["first.norm"]
    assert torch.equal(model.first.conv.weight, before.first.conv.weight)
    assert_same_function(before, model, X, 1e-5)


def test_the_model_and_the_process_are_left_as_they_were():
    model = settled(Seen(straight)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    folded = fold_batchnorm(model, X)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_errors():
    with pytest.raises(PlanError, match="the forward failed"):
        fold_batchnorm(Seen(straight), torch.zeros(1, 9, 4, 4))
    with pytest.raises(UnsupportedLayerError, match="no weight yet"):
        fold_batchnorm(nn.LazyLinear(3), X)
    uncopyable = Seen(straight)
    uncopyable.lock = (n for n in [1])
    with pytest.raises(PlanError, match="deepcopy"):
        fold_batchnorm(uncopyable, X)


@pytest.mark.parametrize(
    ("expected", "got", "agree"),
    [
        ([torch.ones(3)], [torch.ones(3) * (1 + 5e-5)], True),
        ([torch.ones(3)], [torch.ones(3) * (1 + 2e-4)], False),
        ([torch.ones(3).double()], [torch.ones(3).double() * (1 + 1e-9)], False),
        ([torch.ones(3).bfloat16()], [torch.ones(3).bfloat16() * 1.05], True),
        ([torch.ones(3)], [torch.ones(3), torch.ones(3)], False),
        ([torch.ones(3)], [torch.ones(1, 3)], False),
        ([torch.tensor([1.0, torch.inf])], [torch.tensor([1.0, torch.inf])], True),
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, torch.nan])], False),
        ([torch.zeros(3)], [torch.zeros(3)], True),
        ([torch.zeros(3)], [torch.full((3,), 1e-6)], False),
        ([torch.tensor([1, 2])], [torch.tensor([1, 3])], True),
    ],
)
def test_agreement(expected, got, agree):
    assert outputs_agree(expected, got) is agree


@pytest.mark.cuda
def test_cuda(device):
    model, x = seeded(lambda: (settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), X))()
    folded = fold_batchnorm(model.to(device), x.to(device))
    assert folded[0].bias.device == device
    assert_same_function(model, folded, x.to(device), 1e-4)


class NeedsItsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.weight.sum()


def test_a_forward_that_fails_without_the_norm_keeps_it():
    model, x = NeedsItsNorm().eval(), torch.randn(2, 3, 5, 5)
    folded = lnn.fold_batchnorm(model, x)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert torch.equal(folded(x), model(x))
