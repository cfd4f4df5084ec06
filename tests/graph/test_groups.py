"""Channel groups of whole models, also of hostile ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_nn import SVDConv2d, TuckerConv2d
from lowrank_nn.errors import PlanError
from lowrank_nn.graph import ChannelGroup, find_groups
from lowrank_nn.graph.inputs import map_tensors
from tests.graph.removal import assert_removable
from tests.graph.test_rules import settled
from tests.zoo import ZOO

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def free(groups):
    return {group.name: group.size for group in groups if not group.frozen}


def checked(model, inputs):
    """The groups, each held against brute force."""
    groups = find_groups(settled(model), inputs)
    assert_removable(model, inputs, groups)
    return groups


REMOVABLE = {  # without those frozen by the recurrent layer, by the branch on std
    "lenet5": 4, "alexnet": 5, "vgg16": 15, "inception": 20, "resnet20": 10, "mobilenet_v2": 9, "vit": 5, "unet": 12,
    "transformer": 5, "language": 5, "crnn": 3, "tied": 1, "control_flow": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    model, inputs = ZOO[name]()
    double = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
    before = copy.deepcopy(model.double().state_dict())
    groups = find_groups(model, double)
    assert len(free(groups)) == REMOVABLE[name]
    assert len({group.name for group in groups}) == len(groups)
    # The attention of vit and transformer takes its width from its input: it does not become smaller by sizes alone.
    simple = [group for group in groups if not any("att" in member.name for member in group.members)]
    assert_removable(model, double, simple)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


class Windows(nn.Module):
    """Windows of tokens, shifted, as in Swin, with a linear layer inside, and the patches merged after it."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Conv2d(3, 6, 1), nn.Linear(6, 6)
        self.merge = nn.Linear(24, 5)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
        n, h, w, c = x.shape
        y = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.inner(y).view(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        x = x + y.roll((1, 1), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.merge(x).mean((1, 2))


class Twice(nn.Module):
    """One convolution on inputs from two places; what it returns is added to a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.both = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head((self.both(self.a(x)) + self.both(self.b(x)).relu_()).mean((2, 3)))


class Grouped(nn.Module):
    """A norm written by hand, over groups of channels, between convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.after, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv(x)
        grouped = x.view(x.shape[0], -1, 3, *x.shape[2:]).flatten(2)
        x = ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 0.1)).view_as(x)
        return self.head(self.after(x).amax((2, 3)))


class Branching(nn.Module):
    """Another way for every sign of the input, and a counter in a buffer."""

    def __init__(self):
        super().__init__()
        self.dark, self.bright, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image, *, options):
        self.calls += 1
        conv = self.bright if image.mean() > options["threshold"] else self.dark
        return {"logits": [self.head(conv(image).mean((2, 3)))]}


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad


def sequential(*middle, width=6):
    return nn.Sequential(nn.Conv2d(3, 6, 1), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


HOSTILE = {
    "windows": (Windows, {"embed": 6}),
    "called twice": (Twice, {"a": 6, "both": 6}),
    "groups by hand": (Grouped, {"conv": 4, "after": 6}),
    "autograd function": (lambda: sequential(Call(Sine.apply)), {"0": 6}),
    "data parallel": (lambda: nn.DataParallel(sequential(nn.ReLU(inplace=True)), device_ids=[]), {"module.0": 6}),
    "checkpointed": (
        lambda: sequential(Call(lambda x: checkpoint(torch.tanh, x, use_reentrant=False))), {"0": 6}
    ),
    "own ranks": (
        lambda: sequential(TuckerConv2d(6, 8, 3, rank=(5, 4)), SVDConv2d(8, 6, 1, rank=3)),
        {"0": 6, "1.reduce": 4, "1.core": 5, "1.expand": 8, "2.reduce": 3, "2.expand": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_models(build, expected):
    assert free(checked(build(), IMAGE)) == expected


def test_branch_on_data_and_a_mutated_buffer():
    model = settled(Branching())
    model.calls.zero_()
    inputs = {"image": IMAGE, "options": {"threshold": 0.5}}
    groups = find_groups(model, inputs)
    assert free(groups) == {"dark": 6}
    assert_removable(model, inputs, groups)
    assert model.calls == 0


class Auxiliary(nn.Module):
    """A second head for training; ``wants`` targets there or not."""

    def __init__(self, wants):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.extra = nn.Linear(6, 4)
        self.wants = wants

    def forward(self, x, targets=None):
        x = self.norm(self.norm(self.conv(x))).mean((2, 3))
        if not self.training:
            return self.head(x)
        return self.head(x), self.extra(x), targets.sum() if self.wants else 0


@pytest.mark.parametrize("wants", [False, True])
def test_head_that_is_used_in_training_only(wants):
    model = settled(Auxiliary(wants))
    before = copy.deepcopy(model.state_dict())
    groups = find_groups(model, IMAGE)
    assert free(groups) == {"conv": 6}
    assert ("extra.weight" in {member.name for member in groups[0].members}) or wants
    assert_removable(model, IMAGE, groups)
    if not wants:
        assert_removable(model.train(), IMAGE, groups)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.hidden(x).relu())


def test_tied_embedding():
    tokens = torch.randint(0, 20, (2, 5))
    groups = checked(Tied(), tokens)
    assert free(groups) == {"embed#2": 8}  # the other are the words
    (width,) = (group for group in groups if not group.frozen)
    assert [(member.name, member.dim, member.role) for member in width.members] == [
        ("embed.weight", 1, "out"), ("hidden.weight", 0, "out"), ("hidden.weight", 1, "in"), ("hidden.bias", 0, "out"),
    ]  # fmt: skip


def test_a_group_prints_what_it_removes():
    (group, _) = find_groups(sequential(nn.BatchNorm2d(6)), IMAGE.float())
    assert str(group).splitlines() == [
        "0: 6 units, removable",
        "  0.weight        dim 0  out      1 per unit",
        "  0.bias          dim 0  out      1 per unit",
        "  1.running_mean  dim 0  through  1 per unit",
        "  1.running_var   dim 0  through  1 per unit",
        "  1.weight        dim 0  through  1 per unit",
        "  1.bias          dim 0  through  1 per unit",
        "  4.weight        dim 1  in       1 per unit",
    ]
    assert isinstance(group, ChannelGroup)


def test_a_part_that_must_stay_is_a_group_of_its_own():
    model = sequential(Call(lambda x: torch.cat([x[:, :3] * torch.arange(1.0, 4)[:, None, None], x[:, 3:]], 1)))
    groups = find_groups(model, IMAGE.float())
    assert [(group.name, group.size, bool(group.frozen)) for group in groups] == [("0", 3, True), ("4", 4, True)]


def test_a_forward_that_fails():
    with pytest.raises(PlanError, match="the forward failed"):
        find_groups(sequential(), torch.randn(2, 5, 8, 8))


def test_nothing_is_left_behind():
    model = sequential(nn.BatchNorm2d(6), nn.Dropout(0.5)).train()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    groups = [find_groups(model, IMAGE.float()) for _ in range(2)]
    assert groups[0] == groups[1]
    assert model.training
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_on_the_meta_device():
    model, inputs = ZOO["mobilenet_v2"]()
    assert find_groups(copy.deepcopy(model).to("meta"), inputs.to("meta")) == find_groups(model, inputs)


@pytest.mark.cuda
def test_on_cuda(device):
    model, inputs = ZOO["vit"]()
    assert find_groups(copy.deepcopy(model).to(device), inputs.to(device)) == find_groups(model, inputs)


class BatchAsChannels(nn.Module):
    """Normalises groups of channels of all samples at once: of one channel each only at batch size 2."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.first(x)
        return self.last(F.group_norm(y.flatten(0, 1)[None], 16).view_as(y))


def test_a_second_batch_size_shows_what_treats_the_batch_as_channels():
    assert free(find_groups(BatchAsChannels().double(), IMAGE)) != {"first": 8}


def test_a_model_that_takes_one_batch_size():
    class One(nn.Sequential):
        def forward(self, x):
            assert len(x) == 2
            return super().forward(x)

    assert free(checked(One(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double(), IMAGE)) == {"0": 8}
